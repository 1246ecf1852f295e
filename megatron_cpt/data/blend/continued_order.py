"""The order of a stage that goes on where another order stopped, exact to the sample.

An order is `num_samples` samples drawn from the entries of a data list by `blend_order`, a round. It goes on for ever: the next
round repeats it with every shard drawn from where it stopped, so that shares stay and no document comes again before its epoch
is exhausted. A stage that continues it reads `[position, position + its samples)`. What a stage needs to know of that order
stands in its run directory, `data_order.json`: the run that began it may be gone.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_cpt.data.blend.order import blend_order
from megatron_cpt.data.lists.budget import spread_samples
from megatron_cpt.data.lists.entry import DataEntry
from megatron_cpt.errors import DataError
from megatron_cpt.files import write_json


@dataclass(frozen=True, kw_only=True)
class ContinuedOrder:
    """Where in which order a stage begins to read."""

    source: str
    """Who had read before, in words."""
    position: int
    """Samples of the order that were read before the stage."""
    num_samples: int
    """Samples of a round."""
    seed: int
    """The seed that the order of documents follows from."""
    shuffle_in_corpus: bool
    entries: tuple[DataEntry, ...]
    """The data list of the run that began the order."""

    @property
    def shuffle_seed(self) -> int | None:
        """The seed of shuffling within corpora, None where shards are spread evenly."""
        return self.seed if self.shuffle_in_corpus else None

    def samples_per_round(self) -> list[int]:
        """Return the samples of each entry in a round."""
        return spread_samples([entry.tokens or 0 for entry in self.entries], self.num_samples)

    def corpora(self) -> list[str]:
        """Return the corpus of each entry."""
        return [entry.corpus or entry.prefix for entry in self.entries]

    def round(self) -> tuple[np.ndarray, np.ndarray]:
        """Return (entry, sample of that entry) of each sample of the first round."""
        return blend_order(self.samples_per_round(), self.corpora(), shuffle_seed=self.shuffle_seed)

    def drawn(self, count: int) -> list[range]:
        """Return which of its samples, counted from the order's beginning, each entry gives to the stage's `count`."""
        dataset_index, _ = self.round()
        before, after = (self._drawn(dataset_index, samples) for samples in (self.position, self.position + count))
        return [range(int(first), int(last)) for first, last in zip(before, after, strict=True)]

    def taken(self, count: int, seq_length: int) -> list[DataEntry]:
        """Return the entries that the stage's `count` samples are drawn from, with the tokens that each gives.

        A shard of a replay buffer goes on after what the order has drawn of it.
        """
        return [
            dataclasses.replace(
                entry,
                tokens=len(part) * seq_length,
                first_sample=None if entry.first_sample is None else entry.first_sample + part.start,
            )
            for entry, part in zip(self.entries, self.drawn(count), strict=True)
            if part
        ]

    def window(self, one_round: tuple[np.ndarray, np.ndarray], count: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (entry int32 [count], sample of that entry int64 [count]) of the stage's samples, from a round's.

        Entries are numbered as in `taken`, and samples from the first one that the stage draws of an entry.
        """
        rounds, places = np.divmod(np.arange(self.position, self.position + count, dtype=np.int64), self.num_samples)
        dataset_index, sample_index = (np.asarray(part)[places] for part in one_round)
        drawn = self.drawn(count)
        start = np.array([part.start for part in drawn], dtype=np.int64)
        per_round = np.array(self.samples_per_round(), dtype=np.int64)
        number = np.cumsum([bool(part) for part in drawn], dtype=np.int32) - 1
        sample_index = sample_index + rounds * per_round[dataset_index] - start[dataset_index]
        return number[dataset_index].astype(np.int32), sample_index

    def _drawn(self, dataset_index: np.ndarray, samples: int) -> np.ndarray:
        """Return how many of the order's first `samples` samples each entry gives."""
        rounds, rest = divmod(samples, self.num_samples)
        whole = rounds * np.array(self.samples_per_round(), dtype=np.int64)
        drawn: np.ndarray = whole + np.bincount(dataset_index[:rest], minlength=len(self.entries))
        return drawn


def write_order(path: Path, order: ContinuedOrder) -> None:
    """Write an order as JSON that `read_order` reads back equal."""
    values = dataclasses.asdict(order)
    values["entries"] = [
        {name: value for name, value in entry.items() if value is not None} for entry in values["entries"]
    ]
    write_json(path, values)


def read_order(path: Path) -> ContinuedOrder:
    """Return the order in a file. Raises: DataError when it holds none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        entries = tuple(DataEntry(**entry) for entry in values.pop("entries"))
        return ContinuedOrder(**values, entries=entries)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as problem:
        raise DataError(f"{path}: not the order of a stage ({problem}). Restore it, or start a new variant.") from None
