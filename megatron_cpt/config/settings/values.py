"""Typed scalar values of configuration files: counts with a suffix, durations, walltimes.

YAML 1.1 reads `3e-4` as text, `24:00:00` as 86400 and `no` as False; these parsers accept what a person meant and
refuse the rest with the reason. Arithmetic is exact: decimal, never binary fractions.
"""

import math
import re
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from fractions import Fraction

RULE_KINDS = ("share", "epochs", "weight", "ratio")
"""How a rule of a blend states what shards give (`data/lists/rescale.py`)."""

_SUFFIX = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_COUNT = re.compile(r"([0-9]+(?:_[0-9]+)*(?:\.[0-9]+)?(?:e\+?[0-9]{1,2})?)\s*([KMBT]?)", re.IGNORECASE)
_WALLTIME = re.compile(r"(?:(\d+)-)?(\d+):(\d+)(?::(\d+))?")
_UNITS = {
    "iter": "iterations",
    "iters": "iterations",
    "iteration": "iterations",
    "iterations": "iterations",
    "step": "iterations",
    "steps": "iterations",
    "sample": "samples",
    "samples": "samples",
    "token": "tokens",
    "tokens": "tokens",
}


@dataclass(frozen=True)
class Duration:
    """A length of training: `amount` in `unit`."""

    amount: float
    unit: str
    """iterations, samples, tokens or fraction (of the stage)."""

    def samples(self, *, global_batch_size: int, seq_length: int, train_samples: int) -> int:
        """Return the duration in samples, rounded up to a whole sample."""
        amount = Decimal(str(self.amount))
        if self.unit == "tokens":
            return -(-math.ceil(amount) // seq_length)
        factor = {"iterations": global_batch_size, "samples": 1, "fraction": train_samples}[self.unit]
        return math.ceil(amount * factor)

    def __str__(self) -> str:
        if self.unit == "fraction":
            return repr(float(self.amount))
        return f"{int(self.amount) if self.amount == int(self.amount) else self.amount} {self.unit}"


ALL_SETTINGS = "all"
"""Consent to every change of a run's settings (`checkpoint.accept_changes: true`)."""

BatchRamp = tuple[int | Duration | tuple[int, Duration], ...]
"""A batch ramp-up: (start, increment, samples or duration), or steps ((batch, until), ...)."""


def parse_count(value: object) -> int:
    """Return a whole number of at least 0 from `123`, `1_000`, `50B`, `1.5M` or `1e9` (decimal suffixes).

    Raises: ValueError saying what is accepted.
    """
    if isinstance(value, bool):
        raise ValueError(f"{value} is a truth value, not a whole number. Write 500, 1.5M, 50B or 1e9")
    match = _COUNT.fullmatch(str(value).strip())
    if match:
        exact = Decimal(match[1].replace("_", "")) * _SUFFIX[match[2].upper()]
        if exact == exact.to_integral_value():
            return int(exact)
    raise ValueError(f"{value!r} is not a whole number of at least 0. Write 500, 1.5M, 50B or 1e9")


def parse_duration(value: object) -> Duration:
    """Return a Duration from `2000`, `"2000 iterations"`, `"1M samples"`, `"50B"` (tokens), `"50B tokens"` or `0.01`.

    A bare whole number counts iterations, a number with a suffix counts tokens, a number from 0 to 1 with a
    decimal point or an exponent is a fraction of the stage.

    Raises: ValueError saying what is accepted.
    """
    if isinstance(value, Duration):
        return value
    text = " ".join(str(value).split())
    number, _, unit = text.rpartition(" ")
    if unit.upper() in _SUFFIX or not number:
        number, unit = text, ""
    try:
        if unit in _UNITS:
            return Duration(parse_count(number), _UNITS[unit])
        if not unit and not isinstance(value, bool):
            return _parse_bare_duration(text)
    except (ValueError, InvalidOperation):
        pass
    raise ValueError(
        f"{value!r} is not a duration. Write 2000 (iterations), '1M samples', '50B tokens' or 0.01 (fraction of the stage)"
    )


def _parse_bare_duration(text: str) -> Duration:
    if text[-1:].upper() in _SUFFIX:
        return Duration(parse_count(text), "tokens")
    number = Decimal(text)
    is_fraction = not text.replace("_", "").isdigit() and 0 <= number <= 1
    return Duration(float(number), "fraction") if is_fraction else Duration(parse_count(text), "iterations")


def parse_ramp(value: object) -> BatchRamp:
    """Return a batch ramp-up from `[16, 16, 1000000]` (Megatron-LM's: the last number is samples), `[16, 16, "50B tokens"]`
    (any duration) or `[[16, 1B], [32, "3B tokens"], [64, 0.5]]` (batch, and the duration from the start until which it holds).

    Raises: ValueError saying what is accepted.
    """
    wanted = "Write [16, 16, '1M samples'] (start, increment, length) or [[16, 1B], [32, 3B]] (batch, until)"
    if not isinstance(value, list | tuple) or not value:
        raise ValueError(f"{value!r} is no batch ramp-up. {wanted}")
    pairs = [item for item in value if isinstance(item, list | tuple)]
    if pairs and (len(pairs) < len(value) or any(len(pair) != 2 for pair in pairs)):
        raise ValueError(f"{value!r} is no batch ramp-up. {wanted}")
    if pairs:
        return tuple((parse_count(batch), parse_duration(until)) for batch, until in pairs)
    if len(value) != 3:
        raise ValueError(f"{list(value)} has {len(value)} numbers. {wanted}")
    start, increment, length = value
    return parse_count(start), parse_count(increment), _parse_ramp_length(length)


def _parse_ramp_length(value: object) -> int | Duration:
    """Return samples for a bare whole number, as Megatron-LM's flag means it; else a duration."""
    duration = parse_duration(value)
    if isinstance(value, Duration) or duration.unit != "iterations" or " " in str(value).strip():
        return duration
    return int(duration.amount)


def parse_rule(value: str) -> tuple[str, Fraction]:
    """Return the kind and the exact number of a rule of a blend, `share 0.3`.

    Raises: ValueError saying what is wrong.
    """
    kind, _, number = value.strip().partition(" ")
    try:
        amount = Fraction(number.strip())
    except (ValueError, ZeroDivisionError):
        amount = Fraction(-1)
    if kind not in RULE_KINDS or amount < 0:
        raise ValueError(f"{value!r} is no rule. Write {', '.join(f'`{kind} NUMBER`' for kind in RULE_KINDS)}")
    return kind, amount


def parse_walltime(value: object) -> int:
    """Return seconds from 86400, `"24:00:00"`, `"1-12:00:00"` (days), `"1-12:00"` (days, hours, minutes) or `"30:00"`
    (minutes and seconds), as Slurm reads them.

    Raises: ValueError saying what is accepted.
    """
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    text = str(value).strip()
    match = _WALLTIME.fullmatch(text)
    seconds = _walltime_seconds(*match.groups()) if match else int(text) if text.isdecimal() else 0
    if not seconds:
        raise ValueError(f"{value!r} is not a walltime. Write '24:00:00', '1-12:00:00' or seconds")
    return seconds


def _walltime_seconds(days: str | None, first: str, second: str, third: str | None) -> int:
    """Return the seconds, or 0 where minutes or seconds exceed 59."""
    parts = [int(first), int(second), int(third or 0)]
    hours, minutes, seconds = parts if third is not None or days is not None else [0, *parts[:2]]
    if seconds > 59 or (minutes > 59 and (third is not None or days is not None)):
        return 0
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds
