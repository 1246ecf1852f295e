"""The replay buffer: the shards of earlier stages and how far each has been drawn.

A stage that finishes appends its corpora and advances the positions of the replayed shards; the next stage draws the
corpus `buffer` from it and continues from these positions, without replacement until a shard is exhausted. The file is
YAML, changed under a lock and replaced whole:

    format: 1
    stages: [math/demo-5m/8M/main]
    shards:
    - {prefix: "data/D1_text_document", corpus: "D1", added_by: "math/demo-5m/8M/main", drawn_tokens: 0}
"""

import contextlib
import fcntl
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import yaml

from megatron_cpt.config.loading.sources import parse_yaml
from megatron_cpt.data.lists.entry import DataEntry
from megatron_cpt.errors import ConfigError, DataError
from megatron_cpt.files import write_text

CORPUS = "buffer"
"""Name in `data.mix` of everything in the buffer that the mix does not name itself."""


@dataclass(frozen=True, kw_only=True)
class BufferShard:
    """One shard of the buffer."""

    prefix: str
    corpus: str
    added_by: str
    """Stage that brought it in."""
    drawn_tokens: int = 0
    """Tokens that stages have replayed of it."""

    def first_sample(self, seq_length: int) -> int:
        """Return the first sample that no stage has drawn, where samples have `seq_length` tokens."""
        return -(-self.drawn_tokens // seq_length)


@dataclass(frozen=True, kw_only=True)
class Buffer:
    """The shards of a replay buffer by prefix, and the stages that have been appended."""

    stages: tuple[str, ...] = ()
    shards: dict[str, BufferShard] = field(default_factory=dict)

    def of_earlier_stages(self, stage: str) -> "Buffer":
        """Return the buffer without what `stage` itself brought in."""
        kept = {prefix: shard for prefix, shard in self.shards.items() if shard.added_by != stage}
        return replace(self, shards=kept)


def read_buffer(path: Path) -> Buffer:
    """Return the buffer in `path`; an empty one where there is no file yet.

    Raises: DataError when the file is no buffer.
    """
    if not path.exists():
        return Buffer()
    try:
        value = parse_yaml(path.read_text(encoding="utf-8"))
        shards = [BufferShard(**row) for row in value["shards"]]
        if value["format"] != 1 or any(shard.drawn_tokens < 0 for shard in shards):
            raise ValueError("format 1 and positions that are not negative are needed")
        return Buffer(stages=tuple(value["stages"]), shards={shard.prefix: shard for shard in shards})
    except (yaml.YAMLError, ConfigError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as problem:
        raise DataError(f"{path}: not a replay buffer ({problem}). Restore it or start another one.") from None


def append_stage(
    path: Path, stage: str, entries: Sequence[DataEntry], num_samples: Sequence[int], seq_length: int
) -> bool:
    """Append a finished stage to the buffer; return False, changing nothing, if it has been appended before.

    Shards that came from the buffer (`first_sample` is set) advance by the samples that the stage drew; the others are
    added with no samples drawn.
    """
    with _locked(path):
        buffer = read_buffer(path)
        if stage in buffer.stages:
            return False
        shards = dict(buffer.shards)
        for entry, samples in zip(entries, num_samples, strict=True):
            if entry.first_sample is None:
                new = BufferShard(prefix=entry.prefix, corpus=entry.corpus or entry.prefix, added_by=stage)
                shards.setdefault(entry.prefix, new)
            elif entry.prefix in shards:
                drawn = (entry.first_sample + samples) * seq_length
                held = shards[entry.prefix]
                shards[entry.prefix] = replace(held, drawn_tokens=max(held.drawn_tokens, drawn))
        _write(path, Buffer(stages=(*buffer.stages, stage), shards=shards))
    return True


def _write(path: Path, buffer: Buffer) -> None:
    rows = [
        f"- {{prefix: {json.dumps(shard.prefix, ensure_ascii=False)}, corpus: {json.dumps(shard.corpus, ensure_ascii=False)}, "
        f"added_by: {json.dumps(shard.added_by, ensure_ascii=False)}, drawn_tokens: {shard.drawn_tokens}}}\n"
        for shard in buffer.shards.values()
    ]
    write_text(path, f"format: 1\nstages: {json.dumps(list(buffer.stages))}\nshards:\n{''.join(rows)}")


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the buffer's lock: two stages that end at once append one after the other."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
