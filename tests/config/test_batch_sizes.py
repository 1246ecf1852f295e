"""Iterations and samples of a batch ramp-up, against Megatron-LM's rule step by step."""

import dataclasses
import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_cpt.config.loading.resolve import read_resolved, write_resolved
from megatron_cpt.config.megatron.arguments import megatron_flags
from megatron_cpt.config.settings import derived
from megatron_cpt.config.settings.batch_sizes import batch_sizes
from megatron_cpt.config.settings.schema import TrainingConfig
from megatron_cpt.config.settings.values import Duration, parse_ramp
from megatron_cpt.errors import ConfigError

RAMP = TrainingConfig(seq_length=32, global_batch_size=64, rampup_batch_size=(16, 16, 300), train_samples=1000)


def megatron_size(start: int, increment: int, ramp_samples: int, whole: int, consumed: int) -> int:
    """RampupBatchsizeNumMicroBatchesCalculator.update_num_microbatches of megatron-core 0.19, in exact numbers."""
    if consumed > ramp_samples:
        return whole
    per_increment = ramp_samples / ((whole - start) / increment)
    return min(start + int(consumed / per_increment) * increment, whole)


def test_without_a_ramp_up_every_step_takes_the_global_batch():
    sizes = batch_sizes(dataclasses.replace(RAMP, rampup_batch_size=None))
    assert [sizes.size(n) for n in (0, 1, 999)] == [64] * 3
    assert (sizes.samples(7), sizes.iterations(448), sizes.iterations(449)) == (448, 7, 8)


def test_the_batch_grows_in_equal_shares_of_the_samples():
    sizes = batch_sizes(RAMP)
    assert [sizes.size(n) for n in range(14)] == [16] * 7 + [32] * 3 + [48] * 2 + [64] * 2
    assert [sizes.samples(n) for n in (0, 1, 7, 10, 12, 13)] == [0, 16, 112, 208, 304, 368]


@given(
    start=st.integers(1, 9),
    increment=st.integers(1, 9),
    increments=st.integers(1, 12),
    ramp_samples=st.integers(1, 2000),
)
def test_iterations_and_samples_are_inverse_and_follow_megatrons_rule(start, increment, increments, ramp_samples):
    whole = start + increment * increments
    sizes = batch_sizes(
        TrainingConfig(global_batch_size=whole, rampup_batch_size=(start, increment, ramp_samples), train_iters=1)
    )
    consumed = 0
    for iteration in range(60):
        assert sizes.samples(iteration) == consumed
        assert sizes.iterations(consumed) == iteration
        assert sizes.iterations(consumed + 1) == iteration + 1
        share = Fraction(consumed * increments, ramp_samples)
        if share.denominator > 1 or share == 0:  # Megatron-LM's floating point is allowed to err at a boundary
            assert sizes.size(iteration) == megatron_size(start, increment, ramp_samples, whole, consumed)
        consumed += sizes.size(iteration)


def test_the_stage_length_counts_the_small_steps():
    assert derived.train_iters(RAMP) == 23  # 12 ramp steps take 304 samples, 11 whole ones 704
    assert derived.train_samples(RAMP) == 1008
    assert derived.train_tokens(RAMP) == 1008 * 32
    tokens = dataclasses.replace(RAMP, train_samples=None, train_tokens=1000 * 32)
    assert derived.train_iters(tokens) == 23
    assert derived.train_samples(dataclasses.replace(RAMP, train_samples=None, train_iters=13)) == 368


def test_iterations_of_a_warm_up_are_the_first_ones_and_of_a_cooldown_the_last():
    ten = Duration(10, "iterations")
    assert derived.duration_samples(ten, RAMP) == 208
    assert derived.duration_samples(ten, RAMP, is_at_end=True) == 640
    assert derived.duration_samples(Duration(0.5, "fraction"), RAMP) == 504


@pytest.mark.parametrize("ramp", [(16, 16, 1), (16, 48, 5), (63, 1, 10**9)])
def test_short_and_long_ramps_end_at_the_global_batch(ramp):
    sizes = batch_sizes(dataclasses.replace(RAMP, rampup_batch_size=ramp))
    assert sizes.size(10**9) == 64


def sizes_of(ramp, **changes):
    return batch_sizes(dataclasses.replace(RAMP, rampup_batch_size=parse_ramp(ramp), **changes))


@pytest.mark.parametrize("length", ["300 samples", "9600 tokens", "9.6K", "9_570 tokens", 0.3])
def test_the_same_ramp_in_samples_tokens_or_a_fraction_of_the_stage(length):
    assert sizes_of([16, 16, length]) == batch_sizes(RAMP)


def test_a_length_in_iterations_is_shared_among_the_batches():
    assert [sizes_of([16, 16, "6 iterations"]).size(n) for n in range(8)] == [16, 16, 32, 32, 48, 48, 64, 64]
    assert [sizes_of([16, 16, "7 steps"]).size(n) for n in range(9)] == [16, 16, 16, 32, 32, 48, 48, 64, 64]


@pytest.mark.parametrize(
    "steps",
    [
        [[16, 3], [32, "5 iterations"]],
        [[16, "48 samples"], [32, "112 samples"]],
        [[16, "1536 tokens"], [32, "3.584K"]],
        [[16, 0.048], [32, 0.112]],
        [[16, 3], [32, 0.112]],
    ],
)
def test_steps_hold_until_their_place_in_any_duration(steps):
    assert [sizes_of(steps).size(n) for n in range(7)] == [16, 16, 16, 32, 32, 64, 64]


def test_a_step_that_runs_past_its_place_shortens_the_next():
    sizes = sizes_of([[48, "50 samples"], [56, "110 samples"]])
    assert [sizes.samples(n) for n in range(5)] == [0, 48, 96, 152, 216]


@given(
    iterations=st.integers(1, 400),
    parts=st.lists(st.integers(1, 99), min_size=1, max_size=4, unique=True),
    start=st.integers(1, 9),
)
def test_a_fraction_of_iterations_is_of_the_samples_that_they_take(iterations, parts, start):
    steps = [[start * 2**n, part / 100] for n, part in enumerate(sorted(parts))]
    whole = start * 2 ** len(steps)
    training = dataclasses.replace(
        RAMP, rampup_batch_size=parse_ramp(steps), global_batch_size=whole, train_samples=None, train_iters=iterations
    )
    sizes, total = batch_sizes(training), derived.train_samples(training)
    assert sum(sizes.size(n) for n in range(iterations)) == total
    for n in range(iterations):  # each step has the batch of the place where it begins, up to the rounding of one step
        at = sizes.samples(n)
        expected = next((size for size, part in steps if at < math.ceil(part * total)), whole)
        late = next((size for size, part in steps if at < math.ceil(part * (total + whole))), whole)
        assert late <= sizes.size(n) <= expected


def test_a_fraction_without_a_length_is_refused():
    with pytest.raises(ConfigError, match="the stage's length is not known"):
        sizes_of([16, 16, 0.5], train_samples=None)


@pytest.mark.parametrize(
    "ramp", ["[16, 16, 300]", "[16, 16, 50B tokens]", "[16,16,0.5]", "[[16, 2], [32, 0.5], [48, 9]]"]
)
def test_a_ramp_is_written_and_read_back_equal(tree, tmp_path, ramp):
    loaded = tree.load(f"training.rampup_batch_size={ramp}", "training.global_batch_size=64", size="short")
    write_resolved(loaded, tmp_path / "config.yaml")
    assert read_resolved(tmp_path / "config.yaml") == loaded.config


def test_megatron_lm_gets_every_ramp_as_its_step_schedule(tree):
    for ramp in ("[16,16,300]", "[[16,112 samples],[32,208 samples],[48,300 samples]]"):
        loaded = tree.load(f"training.rampup_batch_size={ramp}", "training.global_batch_size=64")
        flags = megatron_flags(loaded.config)
        schedule = flags[flags.index("--step-batch-size-schedule") + 1]
        assert schedule == "0:16 7168:32 13312:48 19456:64"  # a sample has 64 tokens
        assert "--global-batch-size" not in flags and "--rampup-batch-size" not in flags
