"""Each kind of comparison accepts what rounding does, and refuses the least that is more."""

import math

import numpy as np
import pytest
import torch

from tests.tolerances import (
    BF16_ROUNDING,
    FP32_ROUNDING,
    FP64_ROUNDING,
    assert_about,
    assert_bf16_rounding,
    assert_estimate,
    assert_fp32_rounding,
    assert_fp64_rounding,
    assert_same_bits,
)


@pytest.mark.parametrize(
    ("dtype", "rounding"),
    [(torch.float64, FP64_ROUNDING), (torch.float32, FP32_ROUNDING), (torch.bfloat16, BF16_ROUNDING)],
)
def test_a_rounding_is_half_a_step_of_the_format(dtype, rounding):
    assert torch.finfo(dtype).eps == 2 * rounding
    nearest = torch.tensor(1 + rounding, dtype=torch.float64).to(dtype)
    assert abs(float(nearest) - (1 + rounding)) in (0.0, rounding)


def test_the_same_bits_are_values_types_and_shapes():
    assert_same_bits({"a": [1.5, math.nan]}, {"a": [1.5, math.nan]})
    for found in ([1.5 + 1e-15], [1.5, 1.5], np.array([1.5], np.float32)):
        with pytest.raises(AssertionError):
            assert_same_bits(found, [1.5])


@pytest.mark.parametrize(
    ("check", "rounding"), [(assert_fp32_rounding, FP32_ROUNDING), (assert_fp64_rounding, FP64_ROUNDING)]
)
def test_roundings_add_up_and_each_value_is_measured_by_itself(check, rounding):
    check([1.0, 1000.0], [1.0 + 9 * rounding, 1000.0], roundings=10)
    with pytest.raises(AssertionError, match="1 of 2 values"):
        check([1.0, 1000.0], [1.0 + 12 * rounding, 1000.0], roundings=10)


def test_roundings_of_bf16_add_up_as_a_random_walk_and_a_mean_divides_them():
    assert_bf16_rounding(1 + 3.9 * BF16_ROUNDING, 1.0, roundings=16)
    assert_bf16_rounding(1 + 0.9 * BF16_ROUNDING, 1.0, roundings=16, averaged=16)
    with pytest.raises(AssertionError):
        assert_bf16_rounding(1 + 1.1 * BF16_ROUNDING, 1.0, roundings=16, averaged=16)


def test_elements_of_a_tensor_are_measured_by_its_largest_when_asked():
    found, expected = torch.tensor([100.0, 1e-7]), torch.tensor([100.0, 0.0])
    assert_fp32_rounding(found, expected, of_largest=True)
    with pytest.raises(AssertionError, match="expected"):
        assert_fp32_rounding(found, expected)


@pytest.mark.parametrize("found", [math.nan, [1.0, 1.0], {"a": 1.0}, math.inf])
def test_what_is_no_number_or_of_another_form_is_never_close(found):
    for check in (assert_fp32_rounding, assert_bf16_rounding, assert_fp64_rounding):
        with pytest.raises((AssertionError, TypeError)):
            check(found, 1.0)
    with pytest.raises(AssertionError):
        assert_fp32_rounding({"a": 1.0}, {"b": 1.0})
    with pytest.raises(AssertionError):
        assert_fp32_rounding([(1.0, 2.0)], [(1.0, 2.0), (3.0, 4.0)])


def test_an_estimate_is_as_close_as_its_draws_make_it():
    assert_estimate(0.5 + 0.019, 0.5, deviation=0.5, draws=10_000)
    with pytest.raises(AssertionError):
        assert_estimate(0.5 + 0.021, 0.5, deviation=0.5, draws=10_000)


def test_an_approximation_needs_a_reason():
    assert_about(1.04, 1.0, within=0.05, why="a name is rounded to two digits")
    with pytest.raises(AssertionError, match="rounded to two digits"):
        assert_about(1.06, 1.0, within=0.05, why="a name is rounded to two digits")
    with pytest.raises(AssertionError, match="say why"):
        assert_about(1.04, 1.0, within=0.05, why="because")
