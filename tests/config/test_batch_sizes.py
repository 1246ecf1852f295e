"""Iterations and samples of a batch ramp-up, against Megatron-LM's rule step by step."""

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_cpt.config import derived
from megatron_cpt.config.batch_sizes import batch_sizes
from megatron_cpt.config.schema import TrainingConfig
from megatron_cpt.config.values import Duration

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
        share = consumed * increments / ramp_samples
        if not math.isclose(share, round(share), rel_tol=1e-9) or share == 0:  # floating point may err at a boundary
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
