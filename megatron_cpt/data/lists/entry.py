"""One line of a data list, independent of the format, and the common parts of lists."""

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from megatron_cpt.errors import DataError


@dataclass(frozen=True, kw_only=True)
class DataEntry:
    """One line of a data list: a shard and how much of it is read."""

    prefix: str
    """Path of the `.bin/.idx` pair without extension."""
    tokens: int | None = None
    """Tokens to draw from the shard over the run."""
    weight: Fraction | None = None
    """Relative share, where the list states no tokens; None in both: in proportion to the shard's size."""
    corpus: str | None = None
    """Name of the corpus the shard belongs to."""
    first_sample: int | None = None
    """Shards of a replay buffer: samples that earlier stages have drawn; drawing continues after them, without
    replacement, in an order that no stage's seed changes."""

    @property
    def amount(self) -> Fraction | None:
        """Tokens, else the weight, else None."""
        return Fraction(self.tokens) if self.tokens is not None else self.weight


def weights_as_tokens(entries: Sequence[DataEntry], name: str = "data list") -> list[DataEntry]:
    """Return the entries with whole weights turned into token counts.

    Raises: DataError naming the first weight that is no whole number.
    """
    for entry in entries:
        if entry.amount is None or entry.amount.denominator != 1:
            raise DataError(f"{name}: the weight of {entry.prefix} is {entry.weight}. Token counts are whole numbers.")
    return [dataclasses.replace(entry, tokens=int(entry.amount or 0), weight=None) for entry in entries]


def join_repeated(entries: Sequence[DataEntry], name: str) -> list[DataEntry]:
    """Return the entries with those of one shard joined into one, at the first's place, with the sum of their amounts.

    Read apart they would draw the same samples twice.

    Raises: DataError when a shard is in two corpora.
    """
    joined: dict[str, DataEntry] = {}
    for entry in entries:
        key = shard_path(entry.prefix)
        first = joined.setdefault(key, entry)
        if first is entry:
            continue
        if first.corpus != entry.corpus:
            raise DataError(
                f"{name}: {entry.prefix} is in the corpora {first.corpus or 'none'} and {entry.corpus or 'none'}. A shard "
                "belongs to one corpus. Name it once."
            )
        if first.tokens is not None and entry.tokens is not None:
            joined[key] = dataclasses.replace(first, tokens=first.tokens + entry.tokens)
        elif first.weight is not None and entry.weight is not None:
            joined[key] = dataclasses.replace(first, weight=first.weight + entry.weight)
    return list(joined.values())


def shard_path(prefix: str) -> str:
    """Return the resolved file of a shard's tokens, which identifies the shard for every spelling of its prefix."""
    return os.path.realpath(f"{prefix}.bin")
