"""Exact arithmetic of token budgets: integers that sum exactly, ratios without floating point."""

import math
from collections.abc import Sequence
from fractions import Fraction


def exact(number: float | int | str | Fraction) -> Fraction:
    """Return the number that a person wrote: 0.1 is one tenth, not the nearest double."""
    return Fraction(repr(number)) if isinstance(number, float) else Fraction(number)


def apportion(total: int, weights: Sequence[int | Fraction]) -> list[int]:
    """Return whole numbers in proportion to `weights` that sum to `total` exactly, each within 1 of its quota.

    Largest remainder (Hamilton); ties go to the earlier entry. Weights are not negative and not all 0.
    """
    scale = math.lcm(*(Fraction(weight).denominator for weight in weights))
    whole = [int(weight * scale) for weight in weights]
    sum_weights = sum(whole)
    shares = [total * weight // sum_weights for weight in whole]
    remainders = [total * weight % sum_weights for weight in whole]
    missing = total - sum(shares)
    for index in sorted(range(len(whole)), key=lambda index: -remainders[index])[:missing]:
        shares[index] += 1
    return shares


def spread_samples(tokens: Sequence[int], num_samples: int) -> list[int]:
    """Return the samples of each entry, summing to `num_samples`: the differences of floored running sums.

    Each entry, and each run of neighbouring entries (a corpus), is within one sample of its exact share: rounding does
    not add up over the many small shards of a corpus, as it would with every shard rounded for itself.
    """
    total = sum(tokens)
    samples, running, before = [], 0, 0
    for amount in tokens:
        running += amount
        now = num_samples * running // total
        samples.append(now - before)
        before = now
    return samples


def scale_tokens(tokens: int, ratio: Fraction) -> int:
    """Return `ceil(tokens * ratio)` in integers, as LLM-jp's rescaling states it."""
    return -(-tokens * ratio.numerator // ratio.denominator)
