"""Typed scalar values of configuration files: counts with a suffix, durations, walltimes.

YAML 1.1 reads `3e-4` as text, `24:00:00` as 86400 and `no` as False; these parsers accept what a person meant and
refuse the rest with the reason.
"""

import math
import re
from dataclasses import dataclass

_SUFFIX = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_COUNT = re.compile(r"([0-9][0-9_]*(?:\.[0-9]+)?)\s*([KMBT]?)", re.IGNORECASE)


@dataclass(frozen=True)
class Duration:
    """A length of training: `amount` in `unit`."""

    amount: float
    unit: str
    """iterations, samples, tokens or fraction (of the stage)."""

    def samples(self, *, global_batch_size: int, seq_length: int, train_samples: int) -> int:
        """Return the duration in samples, rounded up to a whole sample."""
        factor = {
            "iterations": global_batch_size,
            "samples": 1,
            "tokens": 1 / seq_length,
            "fraction": train_samples,
        }[self.unit]
        return math.ceil(round(self.amount * factor, 9))

    def __str__(self) -> str:
        return f"{self.amount:g}" if self.unit == "fraction" else f"{self.amount:g} {self.unit}"


def parse_count(value: object) -> int:
    """Return a whole number from `123`, `1_000`, `50B`, `1.5M` or `1e9` (decimal suffixes).

    Raises: ValueError saying what is accepted.
    """
    if isinstance(value, bool):
        raise ValueError(f"{value} is a truth value, not a count")
    if isinstance(value, int):
        return value
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str):
        match = _COUNT.fullmatch(value.strip())
        if match:
            exact = float(match[1].replace("_", "")) * _SUFFIX[match[2].upper()]
            if "." not in match[1]:
                return int(match[1].replace("_", "")) * _SUFFIX[match[2].upper()]
            if abs(exact - round(exact)) < 1e-6:
                return round(exact)
        try:
            number = float(value)
        except ValueError:
            pass
        else:
            if number.is_integer():
                return int(number)
    raise ValueError(f"{value!r} is not a whole number; write 500, 1.5M, 50B or 1e9")


def parse_duration(value: object) -> Duration:
    """Return a Duration from `2000`, `"2000 iterations"`, `"1M samples"`, `"50B"` (tokens), `"50B tokens"` or `0.01`.

    A bare whole number counts iterations, a number with a suffix counts tokens, a number between 0 and 1 with a
    decimal point is a fraction of the stage.

    Raises: ValueError saying what is accepted.
    """
    if isinstance(value, Duration):
        return value
    text = str(value).strip()
    number, _, unit = text.partition(" ")
    unit = {"iters": "iterations", "iteration": "iterations", "sample": "samples", "token": "tokens"}.get(
        unit.strip(), unit.strip()
    )
    if unit in ("iterations", "samples", "tokens"):
        return Duration(parse_count(number), unit)
    if not unit and not isinstance(value, bool):
        try:
            fraction = float(text)
        except ValueError:
            if text[-1:].upper() in "KMBT":
                return Duration(parse_count(text), "tokens")
        else:
            if ("." in text or "e" in text.lower()) and 0 <= fraction <= 1:
                return Duration(fraction, "fraction")
            if fraction.is_integer() and fraction >= 0:
                return Duration(int(fraction), "iterations")
    raise ValueError(
        f"{value!r} is not a duration; write 2000 (iterations), '1M samples', '50B tokens' or 0.01 (fraction)"
    )


def parse_walltime(value: object) -> int:
    """Return seconds from 86400, `"24:00:00"`, `"1-12:00:00"` (days) or `"30:00"` (minutes and seconds).

    Raises: ValueError saying what is accepted.
    """
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    match = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", str(value).strip())
    if match is None or int(match[4]) > 59 or (match[2] is not None and int(match[3]) > 59):
        raise ValueError(f"{value!r} is not a walltime; write '24:00:00', '1-12:00:00' or seconds")
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds
