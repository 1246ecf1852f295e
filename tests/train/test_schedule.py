"""The learning rate against the published formulas, point by point."""

import math

import pytest

from megatron_cpt.train.schedule import ANNEAL, STEEPNESS, Schedule


def curve(**changes):
    values = {
        "style": "constant", "lr": 1.0, "min_lr": 0.1, "warmup_init": 0.0, "warmup": 100, "cooldown": 0,
        "cooldown_style": "linear", "total": 1000,
    }  # fmt: skip
    return Schedule(**values | changes)


def test_the_warm_up_is_linear_from_its_start_to_the_peak():
    warm = curve(warmup_init=0.2)
    assert [warm.learning_rate(n) for n in (0, 25, 50, 100, 500)] == pytest.approx([0.2, 0.4, 0.6, 1.0, 1.0])


def test_without_a_warm_up_the_first_sample_has_the_peak():
    assert curve(warmup=0, style="cosine").learning_rate(0) == 1.0


def test_cosine_falls_to_the_minimum_along_half_a_period():
    rate = curve(style="cosine").learning_rate
    assert [rate(100), rate(550), rate(1000)] == pytest.approx([1.0, 0.55, 0.1])
    assert rate(325) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 0.25)))


def test_linear_falls_along_a_line():
    assert curve(style="linear").learning_rate(325) == pytest.approx(0.1 + 0.9 * 0.75)


def test_inverse_square_root_is_megatrons():
    rate = curve(style="inverse-square-root").learning_rate
    assert rate(400) == pytest.approx(math.sqrt(100 / 400))
    assert curve(style="inverse-square-root", total=10**6).learning_rate(10**6 - 1) == pytest.approx(0.1)


@pytest.mark.parametrize("style", ["linear", "cosine", "exponential", "minus_sqrt"])
def test_wsd_holds_and_then_anneals_to_the_minimum(style):
    rate = curve(style="WSD", cooldown=200, cooldown_style=style).learning_rate
    assert [rate(100), rate(800)] == [1.0, 1.0]
    assert rate(1000) == pytest.approx(0.1)
    expected = {"linear": 0.5, "cosine": 0.5, "exponential": 2 * 0.5**0.5 - 1, "minus_sqrt": 1 - 0.5**0.5}
    assert rate(900) == pytest.approx(0.1 + 0.9 * expected[style])


def test_every_anneal_runs_from_one_to_zero_and_never_rises():
    for shape in ANNEAL.values():
        values = [shape(step / 50) for step in range(51)]
        assert values[0] == 1 and values[-1] == pytest.approx(0, abs=1e-12)
        assert values == sorted(values, reverse=True)


@pytest.mark.parametrize("style", ["infinite-cosine", "infinite-inverse-square-root"])
def test_infinite_forms_cool_to_a_constant_hold_it_and_anneal(style):
    rate = curve(style=style, hold=0.4, hold_start=500, cooldown=200).learning_rate
    assert rate(100) == pytest.approx(1.0)
    assert [rate(500), rate(650), rate(800)] == pytest.approx([0.4, 0.4, 0.4])
    assert rate(900) == pytest.approx(0.25)
    assert rate(1000) == pytest.approx(0.1)
    falling = [rate(n) for n in range(100, 501, 20)]
    assert falling == sorted(falling, reverse=True)


def test_the_infinite_inverse_square_root_follows_its_formula():
    def h(x):
        return 1 / math.sqrt(1 + STEEPNESS * x) - 1

    rate = curve(style="infinite-inverse-square-root", hold=0.4, hold_start=500).learning_rate
    assert rate(200) == pytest.approx(1.0 + (0.4 - 1.0) / h(1) * h(0.25))


def test_a_constant_schedule_can_cool_down():
    rate = curve(cooldown=500, min_lr=0.0).learning_rate
    assert [rate(500), rate(750), rate(1000)] == pytest.approx([1.0, 0.5, 0.0])
