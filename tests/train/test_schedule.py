"""The learning rate against the published formulas, point by point."""

import math

import pytest

from megatron_cpt.train.stage.schedule import ANNEAL, STEEPNESS, Schedule
from tests.tolerances import assert_fp64_rounding


def curve(**changes):
    values = {
        "style": "constant", "lr": 1.0, "min_lr": 0.1, "warmup_init": 0.0, "warmup": 100, "cooldown": 0,
        "cooldown_style": "linear", "total": 1000,
    }  # fmt: skip
    values |= changes
    return Schedule(**{"decay": values["total"], **values})


def test_the_warm_up_is_linear_from_its_start_to_the_peak():
    warm = curve(warmup_init=0.2)
    assert_fp64_rounding([warm.learning_rate(n) for n in (0, 25, 50, 100, 500)], [0.2, 0.4, 0.6, 1.0, 1.0])


def test_without_a_warm_up_the_first_sample_has_the_peak():
    assert curve(warmup=0, style="cosine").learning_rate(0) == 1.0


def test_cosine_falls_to_the_minimum_along_half_a_period():
    rate = curve(style="cosine").learning_rate
    assert_fp64_rounding([rate(100), rate(550), rate(1000)], [1.0, 0.55, 0.1])
    assert_fp64_rounding(rate(325), 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 0.25)))


def test_linear_falls_along_a_line():
    assert_fp64_rounding(curve(style="linear").learning_rate(325), 0.1 + 0.9 * 0.75)


def test_inverse_square_root_is_megatrons():
    rate = curve(style="inverse-square-root").learning_rate
    assert_fp64_rounding(rate(400), math.sqrt(100 / 400))
    assert_fp64_rounding(curve(style="inverse-square-root", total=10**6).learning_rate(10**6 - 1), 0.1)


@pytest.mark.parametrize("style", ["linear", "cosine", "exponential", "minus_sqrt"])
def test_wsd_holds_and_then_anneals_to_the_minimum(style):
    rate = curve(style="WSD", cooldown=200, cooldown_style=style).learning_rate
    assert [rate(100), rate(800)] == [1.0, 1.0]
    assert_fp64_rounding(rate(1000), 0.1)
    expected = {"linear": 0.5, "cosine": 0.5, "exponential": 2 * 0.5**0.5 - 1, "minus_sqrt": 1 - 0.5**0.5}
    assert_fp64_rounding(rate(900), 0.1 + 0.9 * expected[style])


def test_every_anneal_runs_from_one_to_zero_and_never_rises():
    for shape in ANNEAL.values():
        values = [shape(step / 50) for step in range(51)]
        assert values[0] == 1
        assert_fp64_rounding(values[-1], 0.0)
        assert values == sorted(values, reverse=True)


@pytest.mark.parametrize("style", ["infinite-cosine", "infinite-inverse-square-root"])
def test_infinite_forms_cool_to_a_constant_hold_it_and_anneal(style):
    rate = curve(style=style, hold=0.4, hold_start=500, cooldown=200).learning_rate
    assert_fp64_rounding(rate(100), 1.0)
    assert_fp64_rounding([rate(500), rate(650), rate(800)], [0.4, 0.4, 0.4])
    assert_fp64_rounding(rate(900), 0.25)
    assert_fp64_rounding(rate(1000), 0.1)
    falling = [rate(n) for n in range(100, 501, 20)]
    assert falling == sorted(falling, reverse=True)


def test_the_infinite_inverse_square_root_follows_its_formula():
    def h(x):
        return 1 / math.sqrt(1 + STEEPNESS * x) - 1

    rate = curve(style="infinite-inverse-square-root", hold=0.4, hold_start=500).learning_rate
    assert_fp64_rounding(rate(200), 1.0 + (0.4 - 1.0) / h(1) * h(0.25))


def test_a_constant_schedule_can_cool_down():
    rate = curve(cooldown=500, min_lr=0.0).learning_rate
    assert_fp64_rounding([rate(500), rate(750), rate(1000)], [1.0, 0.5, 0.0])


@pytest.mark.parametrize("style", ["infinite-cosine", "infinite-inverse-square-root"])
def test_an_infinite_form_without_a_first_decay_holds_at_once(style):
    rate = curve(style=style, hold=0.4, hold_start=100, cooldown=200).learning_rate
    assert_fp64_rounding([rate(50), rate(100), rate(101)], [0.5, 0.4, 0.4])


def test_a_geometric_cooldown_falls_by_the_same_factor():
    rate = curve(
        style="infinite-cosine", hold=0.4, hold_start=500, cooldown=200, cooldown_style="geometric"
    ).learning_rate
    assert_fp64_rounding([rate(800), rate(1000)], [0.4, 0.1])
    for samples in range(800, 1001, 20):  # arXiv:2403.08763, section 7: hold x (min / hold)^r
        assert_fp64_rounding(rate(samples), 0.4 * math.exp(-math.log(0.4 / 0.1) * (samples - 800) / 200))


def test_a_decay_may_end_before_the_stage_or_after_it():
    early, late = curve(style="cosine", decay=550), curve(style="linear", decay=1900)
    assert_fp64_rounding([early.learning_rate(n) for n in (325, 550, 999)], [0.55, 0.1, 0.1])
    assert_fp64_rounding(late.learning_rate(1000), 0.1 + 0.9 * 0.5)


def test_weight_decay_runs_over_its_own_length_and_stays():
    for style, half in (("linear", 0.2), ("cosine", 0.2)):
        run = curve(weight_decay_style=style, weight_decay_start=0.1, weight_decay_end=0.3, weight_decay_samples=400)
        assert_fp64_rounding([run.weight_decay(n) for n in (0, 200, 400, 999)], [0.1, half, 0.3, 0.3])


def megatron_rates(style, cooldown_style, warmup, cooldown, decay):
    """Return our and megatron-core's learning rates and weight decays at every sample up to the decay's end."""
    import torch
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    group = {"params": [torch.nn.Parameter(torch.zeros(1))], "lr": 0.0}
    optimizer = torch.optim.SGD([group])
    theirs = OptimizerParamScheduler(
        optimizer, init_lr=0.01, max_lr=1.0, min_lr=0.1, lr_warmup_steps=warmup, lr_decay_steps=decay, lr_decay_style=style,
        start_wd=0.1, end_wd=0.3, wd_incr_steps=80, wd_incr_style="cosine", wsd_decay_steps=cooldown,
        lr_wsd_decay_style=cooldown_style,
    )  # fmt: skip
    ours = curve(
        style=style, warmup_init=0.01, warmup=warmup, cooldown=cooldown or 0, cooldown_style=cooldown_style, total=decay,
        weight_decay_style="cosine", weight_decay_start=0.1, weight_decay_end=0.3, weight_decay_samples=80,
    )  # fmt: skip
    rates = []
    for samples in range(decay):
        theirs.num_steps = samples
        rates.append((ours.learning_rate(samples), theirs.get_lr({}), ours.weight_decay(samples), theirs.get_wd()))
    return rates


def all_megatron_rates():
    wsd = [("WSD", shape) for shape in ("linear", "cosine", "exponential", "minus_sqrt")]
    plain = [(style, "linear") for style in ("constant", "linear", "cosine", "inverse-square-root")]
    return {
        (style, shape, warmup, cooldown): megatron_rates(style, shape, warmup, cooldown, 120)
        for style, shape in [*wsd, *plain]
        for warmup in (0, 1, 17, 119)
        for cooldown in ((0, 1, 37, 120 - warmup) if style == "WSD" else (None,))
        if warmup + (cooldown or 0) <= 120
    }


def test_every_style_that_megatron_core_has_gives_its_numbers(ranks):
    (found,) = ranks.run(all_megatron_rates, 1)
    assert len(found) > 60
    for case, rates in found.items():
        for samples, (ours, theirs, our_decay, their_decay) in enumerate(rates):
            assert_fp64_rounding({(case, samples): (ours, our_decay)}, {(case, samples): (theirs, their_decay)})
