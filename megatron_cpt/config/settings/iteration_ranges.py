"""Ranges of iterations, 1-based as the log prints them and inclusive: `120-140` or `120`.

The file `<run>/skip_iterations.txt` holds one range a line; `#` begins a comment.
"""

import re
from collections.abc import Iterable
from pathlib import Path

from megatron_cpt.errors import ConfigError

Ranges = tuple[tuple[int, int], ...]
"""Disjoint ranges (first, last) in ascending order."""
_RANGE = re.compile(r"(\d+)(?:\s*-\s*(\d+))?")


def parse_range(text: str) -> tuple[int, int]:
    """Return the first and the last iteration of a range.

    Raises: ValueError saying what is wrong.
    """
    match = _RANGE.fullmatch(text.strip())
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= first <= last:
        raise ValueError(f"{text!r} is no range of iterations. Write '120-140' or '120', counted from 1")
    return first, last


def merged(ranges: Iterable[tuple[int, int]]) -> Ranges:
    """Return the same iterations as disjoint ranges in ascending order."""
    joined: list[tuple[int, int]] = []
    for first, last in sorted(ranges):
        if joined and first <= joined[-1][1] + 1:
            joined[-1] = joined[-1][0], max(joined[-1][1], last)
        else:
            joined.append((first, last))
    return tuple(joined)


def contains(ranges: Ranges, iteration: int) -> bool:
    """Return whether an iteration lies in one of the ranges."""
    return any(first <= iteration <= last for first, last in ranges)


def clipped(ranges: Ranges, first: int, last: int) -> Ranges:
    """Return the part of the ranges that lies within `first` to `last`."""
    return tuple((max(a, first), min(b, last)) for a, b in ranges if a <= last and b >= first)


def ranges_text(ranges: Iterable[tuple[int, int]]) -> list[str]:
    """Return the ranges in the format of settings and files."""
    return [f"{first}-{last}" if last > first else str(first) for first, last in ranges]


def read_ranges(path: Path) -> list[tuple[int, int]]:
    """Return the ranges of a file in its order; none when there is no such file.

    Raises: ConfigError naming the line that is no range.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    found = []
    for number, line in enumerate(lines, start=1):
        text = line.partition("#")[0].strip()
        if text:
            try:
                found.append(parse_range(text))
            except ValueError as problem:
                raise ConfigError(f"{path}:{number}: {problem}.") from None
    return found
