"""A relation between settings that does not hold, and the commonest of them: one number must divide another."""

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """A relation that does not hold."""

    keys: tuple[str, ...]
    """The settings that it relates; the file that sets one of the first is where the message points."""
    text: str
    """`<key> is <found>. <needed>. <do>.`"""


def not_multiple(
    number: tuple[str, int], divisor: tuple[str, int], more_keys: tuple[str, ...], advice: str
) -> Iterator[Problem]:
    """Yield a problem where `number` (dotted key and value) is no multiple of `divisor` (name and value)."""
    key, value = number
    name, size = divisor
    if value % size:
        yield Problem((key, *more_keys), f"{key} is {value}, not a multiple of {name} ({size}). {advice}")


def nearest_multiples(value: int, step: int) -> str:
    """Return the nearest multiples of `step` below and above: `96 or 128`; `32` where there is none below."""
    below = value // step * step
    return f"{below} or {below + step}" if below else str(step)
