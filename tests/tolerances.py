"""How close two floating-point results have to be: one function per kind of comparison, each with the reason of its limit.

    assert_same_bits            the same operations in the same order: nothing is allowed to differ
    assert_fp64_rounding        a formula in Python's floats, written down twice
    assert_fp32_rounding        the same mathematics in fp32, summed in another order or by other kernels
    assert_bf16_rounding        the same where the operands are rounded to bf16
    assert_estimate             a mean over random draws, against its expectation
    assert_about                an approximation by its nature; the caller says why it is as good as that

A limit is computed from the number of roundings and from the format, never from what one machine happened to show: another
processor has other kernels, and its results differ by other roundings. `ONEDNN_MAX_CPU_ISA`, the number of threads and
`SHUFFLED_SUMS=1` (`tests/shuffled_sums.py`) vary them (CONTRIBUTING.md, Tests). `tests/test_policy.py` forbids tolerances elsewhere.

Arguments are numbers, arrays, tensors, and lists, tuples and dictionaries of them.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

FP64_ROUNDING, FP32_ROUNDING, BF16_ROUNDING = 2.0**-53, 2.0**-24, 2.0**-8
"""Largest relative error of one rounding to nearest: half the distance from 1 to the next number (52, 23, 7 bits)."""

STEP_ROUNDINGS = 128
"""Roundings that follow each other in a training step of `tests/train/tiny.py`: each of 4 layers makes some 16 results from
each other forward (norms, products of matrices, rotary angles, softmax, activation, residual sums) and 16 backward."""

RUN_ROUNDINGS = 512
"""The same in the runs of `tests/train/conftest.py`: 8 steps of 2 layers, each step from the weights of the one before."""

STEP_TOKENS = 512
"""Tokens over which the loss of a step of `tests/train/tiny.py` is a mean, and over which its gradients are sums."""

LARGEST_Z = 4.0
"""Standard errors: one estimate in 16 000 is farther away by chance. Seeds are fixed: a test that passes goes on passing."""


def assert_same_bits(found: Any, expected: Any) -> None:
    """Check that all values, types and shapes are the same; NaN equals NaN."""
    for where, left, right in _pairs(found, expected):
        assert left.dtype == right.dtype, f"{where}: {left.dtype}, expected {right.dtype}"
        assert left.tobytes() == right.tobytes(), f"{where}: {(left != right).sum()} of {left.size} values differ"


def assert_fp64_rounding(found: Any, expected: Any, *, roundings: int = 1024) -> None:
    """Check that a formula in double precision has the value of the same formula written in another way.

    A thousand roundings are 1e-13: enough for every formula here, and eight digits below the least that a wrong one differs by.
    Where the expected value is 0, terms of size 1 have cancelled.
    """
    for where, left, right in _pairs(found, expected):
        _check(where, left, right, roundings * FP64_ROUNDING * np.where(right == 0, 1.0, np.abs(right)))


def assert_fp32_rounding(
    found: Any, expected: Any, *, roundings: int = STEP_ROUNDINGS, of_largest: bool = False, terms: float = 0.0
) -> None:
    """Check that fp32 results differ by rounding only: by `roundings` x 2^-24, the sum of the worst case of each.

    A sum of many terms counts once: in another order its error grows with the square root of the number at most, and
    mostly cancels. `of_largest` is for the elements of a tensor: an element that is a small difference of large terms has
    the errors of its terms, so that the largest element is the measure of all. Where all elements are such differences (the
    gradient of a softmax over one key is 0), `terms` is the size of the terms.
    """
    for where, left, right in _pairs(found, expected):
        scale = np.maximum(np.abs(right).max(initial=0) if of_largest else np.abs(right), terms)
        _check(where, left, right, roundings * FP32_ROUNDING * scale)


def assert_bf16_rounding(
    found: Any, expected: Any, *, roundings: int = STEP_ROUNDINGS, averaged: int = 1, of_largest: bool = False
) -> None:
    """Check that results of bf16 operands differ by rounding only: by 2^-8 x sqrt(`roundings` / `averaged`).

    The worst case of each rounding would add up to half of the value here and accept anything. Roundings are independent of
    each other, so that they add up as a random walk does, and a mean (or a norm) over `averaged` elements divides by the
    square root of their number. Where both sides have the same bf16 operands only the few results that lie next to a tie
    are rounded to different sides; a state that has to be the same is compared with `assert_same_bits`.
    """
    for where, left, right in _pairs(found, expected):
        scale = np.abs(right).max(initial=0) if of_largest else np.abs(right)
        _check(where, left, right, BF16_ROUNDING * math.sqrt(roundings / averaged) * scale)


def assert_estimate(found: float, expected: float, *, deviation: float, draws: float) -> None:
    """Check that a mean over `draws` independent draws with a standard deviation estimates its expectation."""
    error = LARGEST_Z * deviation / math.sqrt(draws)
    assert abs(found - expected) <= error, f"{found} is not {expected} +- {error:.3g}"


def assert_about(found: Any, expected: Any, *, within: float, why: str) -> None:
    """Check an approximation to the relative distance `within`; `why` says where that distance comes from."""
    assert len(why.split()) > 3, "say why the result is as close as that and no closer"
    for where, left, right in _pairs(found, expected):
        _check(where, left, right, within * np.abs(right), why)


def _check(where: str, found: np.ndarray, expected: np.ndarray, limit: Any, why: str = "rounding") -> None:
    """Check |found - expected| <= limit; equal infinities are equal, NaN is never."""
    with np.errstate(invalid="ignore"):
        difference = np.where(found == expected, 0.0, np.abs(found.astype(np.float64) - expected.astype(np.float64)))
    limit = np.broadcast_to(limit, difference.shape)
    too_far = ~(difference <= limit)
    if too_far.any():
        at = np.unravel_index(np.argmax(np.where(np.isnan(difference), np.inf, difference - limit)), difference.shape)
        raise AssertionError(
            f"{where}: {too_far.sum()} of {difference.size} values differ by more than {why} allows; "
            f"{found[at]!r} at {[int(n) for n in at]}, expected {expected[at]!r} +- {limit[at]:.3g}"
        )


def _pairs(found: Any, expected: Any, where: str = "result") -> list[tuple[str, np.ndarray, np.ndarray]]:
    """Return (place, found, expected) of each array in two nested results of the same form."""
    if isinstance(expected, Mapping):
        assert found.keys() == expected.keys(), f"{where}: {list(found)}, expected {list(expected)}"
        return [pair for name in expected for pair in _pairs(found[name], expected[name], f"{where}[{name!r}]")]
    if isinstance(expected, list | tuple) and any(_is_nested(part) for part in expected):
        assert len(found) == len(expected), f"{where}: {len(found)} parts, expected {len(expected)}"
        numbered = enumerate(zip(found, expected))
        return [pair for n, (one, other) in numbered for pair in _pairs(one, other, f"{where}[{n}]")]
    left, right = _array(found), _array(expected)
    assert left.shape == right.shape, f"{where}: shape {left.shape}, expected {right.shape}"
    return [(where, left, right)]


def _is_nested(part: Any) -> bool:
    return isinstance(part, list | tuple | Mapping) or (hasattr(part, "shape") and part.shape != ())


def _array(value: Any) -> np.ndarray:
    """Return a number, a list of numbers, an array or a tensor as an array; bf16, which numpy has not, as fp32."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        value = (value.float() if str(value.dtype) == "torch.bfloat16" else value).numpy()
    return np.asarray(value)
