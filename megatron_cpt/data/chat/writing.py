"""Masked shards of conversations while they are written: places, counts, rejects, manifests."""

import contextlib
import glob
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_cpt.data.chat.encode import TOO_MANY_TOKENS, ChatEncoder, ChatJob, EncodedPart
from megatron_cpt.data.chat.pool import ChatPool
from megatron_cpt.data.chat.selection import Selection
from megatron_cpt.data.reading.documents import Source
from megatron_cpt.data.reading.records import Problem
from megatron_cpt.data.reading.streams import Piece, pieces_of
from megatron_cpt.data.shards.indexed import token_dtype
from megatron_cpt.data.shards.masked import MaskedShardWriter
from megatron_cpt.data.tokenize.shard_writer import provenance_path
from megatron_cpt.errors import DataError
from megatron_cpt.files import whole_file
from megatron_cpt.log import Progress

KEY = "chat"
_PIECE_BYTES = 1 << 20
_HISTOGRAM = tuple(1 << power for power in range(6, 20))


def shard_prefix(output_prefix: Path, held_out: str | None = None) -> Path:
    """Return the prefix of the training shard, or of a validation set."""
    part = "" if held_out is None else f"_held_out{'_' if held_out else ''}{held_out}"
    return output_prefix.with_name(f"{output_prefix.name}{part}_{KEY}_document")


def chat_rejects_path(output_prefix: Path) -> Path:
    """Return the file of bad conversations that were skipped."""
    return output_prefix.with_name(output_prefix.name + ".rejects.jsonl")


def chat_pieces(source: Source, number: int, job: ChatJob) -> Iterator[Piece]:
    """Yield the pieces of a source; every pass over it sees the same ones."""
    return pieces_of(source, number, job.layout.streams(), _PIECE_BYTES)


def listed(counts: Mapping[str, int]) -> str:
    """Return counts as `name: 3, other: 1`."""
    return ", ".join(f"{name}: {count:,}" for name, count in counts.items())


@dataclass
class _Shard:
    """A shard in work."""

    writer: MaskedShardWriter
    counts: Counter[str] = field(default_factory=Counter)
    lengths: list[np.ndarray] = field(default_factory=list)
    rows: list[np.ndarray] = field(default_factory=list)
    per_source: dict[int, Counter[str]] = field(default_factory=dict)


class ChatWriting:
    """The second pass: pieces are encoded and written, in order."""

    def __init__(
        self,
        sources: Sequence[Source],
        output_prefix: Path,
        encoder: ChatEncoder,
        identity: dict[str, Any],
        selection: Selection | None,
        on_bad: str,
    ):
        self.sources, self.output_prefix, self.encoder = sources, output_prefix, encoder
        self.identity, self.selection, self.on_bad = identity, selection, on_bad
        names = selection.sets if selection else []
        self.prefixes = [shard_prefix(output_prefix), *(shard_prefix(output_prefix, name) for name in names)]
        self.lines = [0] * len(sources)
        self.rejects: list[Counter[str]] = [Counter() for _ in sources]
        self.notes: list[Counter[str]] = [Counter() for _ in sources]

    def run(self, pool: ChatPool) -> dict[Path, dict[str, Any]]:
        """Write all shards; return their manifests by prefix."""
        dtype = token_dtype(self.encoder.tokenizer.vocab_size)
        progress = Progress("prepare-chat", sum(source.size for source in self.sources) / 1e6, "MB")
        with contextlib.ExitStack() as files:
            shards = [_Shard(files.enter_context(MaskedShardWriter(prefix, dtype))) for prefix in self.prefixes]
            path = chat_rejects_path(self.output_prefix)
            for left_behind in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
                left_behind.unlink(missing_ok=True)
            rejects = files.enter_context(whole_file(path))
            for piece, result in pool.results("encode", self._tasks()):
                for problem in result.problems:
                    self._reject(piece.source, problem, rejects)
                for number, part in result.parts.items():
                    self._write(shards[number], part, result.source)
                self.notes[result.source] += result.notes
                self.lines[result.source] += result.num_lines
                progress.add(piece.disk_bytes / 1e6)
            self._check_sources()
            if not shards[0].counts["conversations"] + shards[0].counts["texts"]:
                reasons = sum(self.rejects, Counter()) + sum(self.notes, Counter())
                raise DataError(
                    f"{self.output_prefix}: no conversation is left ({listed(reasons)}). Look at the input."
                )
            manifests = {
                prefix: self._finish(prefix, shard)
                for prefix, shard in reversed([*zip(self.prefixes, shards, strict=True)])
            }
        if not any(self.rejects):
            chat_rejects_path(self.output_prefix).unlink()
        return {prefix: manifests[prefix] for prefix in self.prefixes}

    def _tasks(self) -> Iterator[tuple[Any, ...]]:
        fates = iter(self.selection.fates) if self.selection else None
        for number, source in enumerate(self.sources):
            for piece in chat_pieces(source, number, self.encoder.job):
                yield piece, None if fates is None else next(fates)

    def _reject(self, source: int, problem: Problem, file: Any) -> None:
        path, line = self.sources[source].path, self.lines[source] + problem.line + 1
        is_long = problem.kind == TOO_MANY_TOKENS
        if self.encoder.job.on_long == "fail" if is_long else self.on_bad == "fail":
            detail = f" ({problem.detail})" if problem.detail else ""
            advice = (
                "--on-long truncate or drop" if is_long else "--on-bad skip, which counts it and keeps it in a file"
            )
            raise DataError(
                f"{path}:{line}: {problem.kind}{detail}. A good conversation is needed. Correct it, or continue with {advice}."
            )
        self.rejects[source][problem.kind] += 1
        file.write(json.dumps(problem.record(str(path), line), ensure_ascii=False) + "\n")

    def _write(self, shard: _Shard, part: EncodedPart, source: int) -> None:
        lengths = np.array([len(ids) for ids in part.ids], dtype=np.int64)
        shard.writer.add(np.concatenate(part.ids), np.concatenate(part.masks), lengths)
        shard.counts += part.counts
        shard.lengths.append(lengths)
        first = self.lines[source] + 1
        shard.rows.append(np.array([(source, first + line) for line in part.lines], dtype=np.int64))
        counts = shard.per_source.setdefault(source, Counter())
        counts.update({"documents": len(lengths), "tokens": int(lengths.sum()), "bytes": part.counts["bytes"]})

    def _check_sources(self) -> None:
        for source in self.sources:
            source.check_unchanged()

    def _finish(self, prefix: Path, shard: _Shard) -> dict[str, Any]:
        with whole_file(provenance_path(prefix), "wb") as file:
            np.save(file, np.concatenate([np.empty((0, 2), np.int64), *shard.rows]))
        nothing: Counter[str] = Counter()
        is_training = prefix == self.prefixes[0]
        return shard.writer.finish(
            self.identity
            | {
                "key": KEY,
                "is_held_out": not is_training,
                "bytes": shard.counts["bytes"],
                "lines": sum(self.lines),
                "rejects": dict(sum(self.rejects, nothing)),
                "notes": dict(sum(self.notes, nothing)),
                "held_out_shards": [path.name for path in self.prefixes[1:]] if is_training else [],
                "statistics": self._statistics(shard),
                "sources": [
                    source.identity()
                    | {"lines": self.lines[number], "documents": 0, "tokens": 0, "bytes": 0}
                    | shard.per_source.get(number, nothing)
                    | {"rejects": dict(self.rejects[number]), "notes": dict(self.notes[number])}
                    for number, source in enumerate(self.sources)
                ],
            }
        )

    def _statistics(self, shard: _Shard) -> dict[str, Any]:
        lengths = np.concatenate([np.empty(0, np.int64), *shard.lengths])
        bins = np.searchsorted(_HISTOGRAM, lengths)
        histogram = Counter(f"<= {_HISTOGRAM[b]}" if b < len(_HISTOGRAM) else "more" for b in np.sort(bins).tolist())
        turns = {role: shard.counts[f"turns {role}"] for role in ("system", "user", "assistant")}
        turns |= {"tool": count} if (count := shard.counts["turns tool"]) else {}
        return {
            "conversations": shard.counts["conversations"],
            "texts": shard.counts["texts"],
            "turns": turns,
            "truncated": shard.counts["truncated"],
            "marks": _named(shard.counts, "mark "),
            "given_to_the_template": _named(shard.counts, "given "),
            "not_read": {kind: _named(shard.counts, f"unread {kind} ") for kind in ("record", "turn")},
            "duplicate_prompts": self.selection.duplicates if self.selection else 0,
            "not_drawn": self.selection.not_drawn if self.selection else 0,
            "length_histogram": dict(histogram),
        }


def _named(counts: Counter[str], start: str) -> dict[str, int]:
    return {name.removeprefix(start): count for name, count in sorted(counts.items()) if name.startswith(start)}
