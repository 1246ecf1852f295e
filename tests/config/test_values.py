"""Counts, durations and walltimes: what a person means is read exactly, the rest is refused."""

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_cpt.config.settings.values import Duration, parse_count, parse_duration, parse_walltime

STAGE = {"global_batch_size": 8, "seq_length": 4096, "train_samples": 1000}


@pytest.mark.parametrize(
    ("text", "count"),
    [
        (5, 5),
        ("123", 123),
        ("1_000", 1000),
        ("50B", 50 * 10**9),
        ("1.5M", 1_500_000),
        ("1e9", 10**9),
        (2e9, 2 * 10**9),
        ("80 b", 80 * 10**9),
        ("1.123456789012T", 1_123_456_789_012),
        ("15.6T", 15_600_000_000_000),
        (0, 0),
    ],
)
def test_counts_are_read_exactly(text: object, count: int) -> None:
    assert parse_count(text) == count


@pytest.mark.parametrize(
    "text", ["1.5", "-3", -3, "abc", True, None, "1__0", "_1", "1_", "5Q", "", "nan", "inf", 0.5, "1e999", []]
)
def test_what_is_no_count_is_refused_with_what_is_accepted(text: object) -> None:
    with pytest.raises(ValueError, match="Write 500, 1.5M, 50B or 1e9"):
        parse_count(text)


@given(st.integers(0, 10**15), st.sampled_from(["K", "M", "B", "T"]))
def test_a_suffix_multiplies_exactly_whatever_the_number(number: int, suffix: str) -> None:
    factor = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}[suffix]
    assert parse_count(f"{number}{suffix}") == number * factor
    assert parse_count(str(number)) == parse_count(number) == number


@given(st.decimals(0, 10**6, places=6, allow_nan=False))
def test_a_decimal_with_a_suffix_is_exact_or_refused(number: object) -> None:
    exact = Fraction(str(number)) * 1000
    if exact.denominator == 1:
        assert parse_count(f"{number}K") == exact
    else:
        with pytest.raises(ValueError, match="is not a whole number"):
            parse_count(f"{number}K")


@pytest.mark.parametrize(
    ("text", "duration"),
    [
        (2000, Duration(2000, "iterations")),
        ("2000", Duration(2000, "iterations")),
        ("2000 iterations", Duration(2000, "iterations")),
        ("1 iteration", Duration(1, "iterations")),
        ("1M samples", Duration(10**6, "samples")),
        ("50B tokens", Duration(50 * 10**9, "tokens")),
        ("50B", Duration(50 * 10**9, "tokens")),
        (0.01, Duration(0.01, "fraction")),
        ("0.5", Duration(0.5, "fraction")),
        (1.0, Duration(1.0, "fraction")),
        ("1e-3", Duration(0.001, "fraction")),
        (0, Duration(0, "iterations")),
    ],
)
def test_durations_are_iterations_samples_tokens_or_fractions(text: object, duration: Duration) -> None:
    assert parse_duration(text) == duration


@pytest.mark.parametrize(
    "text", ["fast", "-5", "-5 samples", -1, 1.5, True, None, "5 epochs", "", "nan", "1.5 samples"]
)
def test_what_is_no_duration_is_refused(text: object) -> None:
    with pytest.raises(ValueError, match="is not a duration"):
        parse_duration(text)


@given(
    st.one_of(
        st.builds(Duration, st.integers(0, 10**15), st.sampled_from(["iterations", "samples", "tokens"])),
        st.builds(Duration, st.floats(0, 1), st.just("fraction")),
    )
)
def test_a_duration_survives_being_written_and_read(duration: Duration) -> None:
    assert parse_duration(str(duration)) == duration


def test_durations_become_samples_rounded_up() -> None:
    assert Duration(3, "iterations").samples(**STAGE) == 24
    assert Duration(7, "samples").samples(**STAGE) == 7
    assert Duration(4097, "tokens").samples(**STAGE) == 2
    assert Duration(0.0501, "fraction").samples(**STAGE) == 51


@given(st.integers(0, 10**6), st.integers(1, 10**9))
def test_a_decimal_fraction_of_a_stage_is_exact(millionths: int, train_samples: int) -> None:
    duration = Duration(millionths / 10**6, "fraction")
    samples = duration.samples(global_batch_size=1, seq_length=1, train_samples=train_samples)
    assert samples == math.ceil(Fraction(millionths, 10**6) * train_samples)


@given(st.integers(0, 10**15), st.integers(1, 10**6))
def test_tokens_become_whole_samples_exactly(tokens: int, seq_length: int) -> None:
    samples = Duration(tokens, "tokens").samples(global_batch_size=1, seq_length=seq_length, train_samples=1)
    assert (samples - 1) * seq_length < tokens <= samples * seq_length or tokens == samples == 0


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        (86400, 86400),
        ("3600", 3600),
        ("24:00:00", 86400),
        ("1-12:00:00", 129600),
        ("1-12:30", 131400),
        ("30:00", 1800),
        ("90:00", 5400),
        ("100:00:01", 360001),
    ],
)
def test_walltimes_are_seconds_as_slurm_reads_them(text: object, seconds: int) -> None:
    assert parse_walltime(text) == seconds


@pytest.mark.parametrize(
    "text", ["1h", "24:60:00", "24:00:60", "1:2:3:4", 0, -5, True, "", "0:00", None, "1-", "12:61"]
)
def test_what_is_no_walltime_is_refused(text: object) -> None:
    with pytest.raises(ValueError, match="is not a walltime"):
        parse_walltime(text)
