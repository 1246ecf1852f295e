"""Shards opened when a sample of theirs is asked for, as many at once as the system allows.

A shard takes two memory maps and three more per epoch, and a process has 65,530 (vm.max_map_count) where nobody raised it: a
blend of 10,000 shards cannot be open at once. The shards that were used last stay open; opening one takes a few milliseconds.
"""

import contextlib
import resource
import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_cpt.train.samples.shard_samples import ShardSamples

_KEPT_MAPS = 15_000
"""Maps left to everything else: libraries, threads' stacks, large arrays."""
_KEPT_FILES = 1_000
_DEFAULT_MAPS = 65_530


class OpenShards:
    """The shards of a process that are open, the one used last at the end. Safe to use from several threads."""

    def __init__(self, most_maps: int | None = None):
        self._most_maps = most_maps
        self._open: OrderedDict[int, tuple[ShardSamples, int]] = OrderedDict()
        self._num_maps = 0
        self._lock = threading.RLock()  # a shard may be forgotten by the collector while one is opened

    def get(self, shard: "ShardOnDemand") -> ShardSamples:
        """Return the samples of a shard, opened if need be; others are closed to make room."""
        with self._lock:
            found = self._open.get(id(shard))
            if found is None:
                samples = shard.open()
                maps = 2 + 3 * len(samples.epochs) + (2 if samples.masks else 0)
                most = self._most_maps if self._most_maps is not None else _allowed_maps()
                while self._open and self._num_maps + maps > most:
                    self._num_maps -= self._open.popitem(last=False)[1][1]
                found = self._open[id(shard)] = (samples, maps)
                self._num_maps += maps
            self._open.move_to_end(id(shard))
            return found[0]

    def forget(self, shard: "ShardOnDemand") -> None:
        """Close a shard that is used no more."""
        with self._lock:
            found = self._open.pop(id(shard), None)
            self._num_maps -= found[1] if found else 0


class ShardOnDemand:
    """A shard's samples as returned by `ShardSamples`, reopened by `open` after the process has closed them."""

    def __init__(self, open: Callable[[], ShardSamples], shards: OpenShards):
        self.open, self._shards = open, shards
        self.first_sample = shards.get(self).first_sample
        self.prompt_loss_weight = 0.0

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._samples()[index]

    def spans(self, index: int) -> list[tuple[int, int, int]]:
        """Return (document, its first token here, tokens) of each document with tokens in a sample, in order."""
        return self._samples().spans(index)

    def _samples(self) -> ShardSamples:
        samples = self._shards.get(self)
        samples.prompt_loss_weight = self.prompt_loss_weight
        return samples

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError):  # it was never made whole
            self._shards.forget(self)


def _allowed_maps() -> int:
    """Return the number of maps available to shards, each with its file."""
    try:
        maps = int(Path("/proc/sys/vm/max_map_count").read_text(encoding="ascii"))
    except (OSError, ValueError):
        maps = _DEFAULT_MAPS
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    files = maps if files == resource.RLIM_INFINITY else files
    return max(min(maps - _KEPT_MAPS, (files - _KEPT_FILES) * 5 // 6), 100)
