"""A stage of a million steps is read as columns and thinned without a shift; a short one is read as it is."""

import random

import pytest

from megatron_cpt.evaluate.report import steps as module
from megatron_cpt.evaluate.report.stages import smoothed
from megatron_cpt.evaluate.report.steps import Steps
from tests.tolerances import assert_fp64_rounding


def filled(count: int) -> Steps:
    """Return the columns of `count` steps with random losses."""
    chooser, steps = random.Random(count), Steps()
    for number in range(1, count + 1):
        steps.add({"iteration": number, "consumed_tokens": number * 8, "loss": chooser.random(), "lr": 1 / number})
    return steps


def test_a_short_stage_is_not_thinned():
    records = filled(100).records()
    assert [record["iteration"] for record in records] == list(range(1, 101))
    assert records[9] == {"iteration": 10, "consumed_tokens": 80, "loss": records[9]["loss"], "lr": 0.1}


@pytest.mark.parametrize("count", [20_001, 65_537, 100_000])
def test_a_long_stage_keeps_its_mean_its_end_and_its_places(count):
    steps = filled(count)
    records = steps.records()
    assert len(records) <= module.MOST_STEPS and records[-1]["iteration"] == count == steps.tokens // 8
    chooser = random.Random(count)
    losses = [chooser.random() for _ in range(count)]
    width = -(-count // module.MOST_STEPS)
    for index in (0, 17, len(records) - 1):
        part = losses[index * width : (index + 1) * width]
        assert_fp64_rounding(records[index]["loss"], sum(part) / len(part))
        assert records[index]["iteration"] == index * width + len(part)


def test_steps_after_a_cut_do_not_count():
    steps = filled(50)
    steps.cut(20)
    assert steps.records()[-1]["iteration"] == 20
    steps.cut(-1)
    assert steps.records() == [] and steps.tokens == 0


@pytest.mark.parametrize("window", [1, 2, 3, 8, 25, 1000])
@pytest.mark.parametrize("count", [0, 1, 2, 7, 100])
def test_a_running_sum_smooths_as_summing_each_window_does(count, window):
    chooser = random.Random(count)
    values = [chooser.gauss(3, 1) for _ in range(count)]
    expected = []
    for index in range(count):
        reach = min(index, count - 1 - index, window // 2)
        part = values[index - reach : index + reach + 1]
        expected.append(sum(part) / len(part))
    assert_fp64_rounding(smoothed(values, window), expected)
