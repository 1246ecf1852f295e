"""The order in which a stage reads its samples: an order of its own, or the continuation of another stage's, exact to the sample.

An order draws `num_samples` samples, a round, from the entries of a data list by `blend_order`. The next round repeats
it with every shard drawn from where the round before stopped, so that shares stay and no document is read again before
its epoch is exhausted. A stage reads `[position, position + count)` of an order: an order of its own is one round from
position 0; a stage that continues another starts where that one stopped. The run directory of a continuing stage stores
the order in `data_order.json`, because the run that started it can be deleted.
"""

import dataclasses
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from megatron_cpt.config.settings.derived import train_samples
from megatron_cpt.config.settings.schema import TrainingConfig
from megatron_cpt.data.blend.order import blend_order
from megatron_cpt.data.lists.budget import spread_samples
from megatron_cpt.data.lists.entry import DataEntry
from megatron_cpt.errors import DataError
from megatron_cpt.files import write_json


@dataclass(frozen=True, kw_only=True)
class StageOrder:
    """Which samples of which shards a stage reads, in order. Arrays are computed when first asked for, once per process."""

    entries: tuple[DataEntry, ...]
    """The data list that a round is drawn from."""
    num_samples: int
    """Samples of a round."""
    count: int
    """Samples that the stage reads."""
    seq_length: int
    """Tokens of a sample."""
    seed: int
    """The seed that the order of documents follows from."""
    shuffle_in_corpus: bool = False
    position: int = 0
    """Samples of the order that were read before the stage."""
    source: str = ""
    """Description of the earlier readers; empty for the stage's own order."""

    @property
    def is_continued(self) -> bool:
        """Whether another list or another run began the order."""
        return bool(self.source)

    @property
    def shuffle_seed(self) -> int | None:
        """The seed of shuffling within corpora, None where shards are spread evenly."""
        return self.seed if self.shuffle_in_corpus else None

    @property
    def corpora(self) -> list[str]:
        """The corpus of each entry."""
        return [entry.corpus or entry.prefix for entry in self.entries]

    @cached_property
    def samples_per_round(self) -> list[int]:
        """Samples of each entry in a round."""
        return spread_samples([entry.tokens or 0 for entry in self.entries], self.num_samples)

    @cached_property
    def drawn(self) -> list[range]:
        """Samples of each entry that the stage reads, counted from the order's beginning."""
        before, after = (self._drawn_by(samples) for samples in (self.position, self.position + self.count))
        return [range(int(first), int(last)) for first, last in zip(before, after, strict=True)]

    @cached_property
    def stage_entries(self) -> list[DataEntry]:
        """The data list of the stage; `indices` numbers its entries.

        For an order of its own it is the order's list. For a continued order these are the entries with samples for the
        stage, and their tokens; a shard of a replay buffer starts after the samples that the order has already drawn.
        """
        if not self.is_continued:
            return list(self.entries)
        return [
            dataclasses.replace(
                entry,
                tokens=len(part) * self.seq_length,
                # A replay buffer counts the samples of a shard over all stages; part.start counts those of this
                # order.
                first_sample=None if entry.first_sample is None else entry.first_sample + part.start,
            )
            for entry, part in zip(self.entries, self.drawn, strict=True)
            if part
        ]

    def is_listed(self, entry: int) -> bool:
        """Return whether an entry of the order is in the stage's data list."""
        return not self.is_continued or bool(self.drawn[entry])

    def indices(self) -> tuple[np.ndarray, np.ndarray]:
        """Return (number in `stage_entries` int32 [count], sample of that entry int64 [count]) of the stage's samples.

        An entry's samples are counted from the first one that the stage draws of it.
        """
        rounds, places = np.divmod(
            np.arange(self.position, self.position + self.count, dtype=np.int64), self.num_samples
        )
        entry_index, sample_index = (part[places] for part in self._round)
        per_round = np.array(self.samples_per_round, dtype=np.int64)
        start = np.array([part.start for part in self.drawn], dtype=np.int64)
        # `dataset_id` numbers the stage's own list, so `is_listed` must leave out the same entries as
        # `stage_entries`.
        number = np.cumsum([self.is_listed(entry) for entry in range(len(self.entries))], dtype=np.int32) - 1
        # A round repeats the order of entries, not their samples: round r starts r x per_round samples further in
        # each shard, so no document repeats before its epoch is exhausted.
        sample_index = sample_index + rounds * per_round[entry_index] - start[entry_index]
        return number[entry_index].astype(np.int32), sample_index

    @cached_property
    def _round(self) -> tuple[np.ndarray, np.ndarray]:
        """(Entry, sample of that entry) of each sample of the first round."""
        return blend_order(self.samples_per_round, self.corpora, shuffle_seed=self.shuffle_seed)

    def _drawn_by(self, samples: int) -> np.ndarray:
        """Return the number of each entry's samples among the order's first `samples` samples."""
        rounds, rest = divmod(samples, self.num_samples)
        drawn: np.ndarray = rounds * np.array(self.samples_per_round, dtype=np.int64)
        if rest:  # whole rounds need no order
            drawn = drawn + np.bincount(self._round[0][:rest], minlength=len(self.entries))
        return drawn

    def __getstate__(self) -> dict[str, Any]:
        """Leave a round's arrays behind: other ranks read the index cache, and the ranges in `drawn` are small."""
        return {name: value for name, value in self.__dict__.items() if name != "_round"}


def write_order(path: Path, order: StageOrder) -> None:
    """Write a continued order as JSON that `read_order` reads back equal."""
    values = dataclasses.asdict(order)
    del values["count"], values["seq_length"]  # the stage's own settings
    values["entries"] = [
        {name: value for name, value in entry.items() if value is not None} for entry in values["entries"]
    ]
    write_json(path, values)


def read_order(path: Path, training: TrainingConfig) -> StageOrder:
    """Return the order in a file, as a stage with these settings reads it. Raises: DataError when it holds none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        entries = tuple(DataEntry(**entry) for entry in values.pop("entries"))
        return StageOrder(**values, entries=entries, count=train_samples(training), seq_length=training.seq_length)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as problem:
        raise DataError(f"{path}: not the order of a stage ({problem}). Restore it, or start a new variant.") from None
