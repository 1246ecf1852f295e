"""One output shard while it is written: partial files, places for ids, counts, rejects, and the final renaming.

Ids go to `.<name>.bin.partial`; the final names appear in the order `.bin`, `.idx`, `.json`, and a shard without its
manifest does not exist. The partial file is locked, so that two processes cannot write one shard.
"""

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from megatron_cpt.data.reading.documents import Source
from megatron_cpt.data.reading.records import CONTROL_TOKEN, EMPTY_TEXT, Problem
from megatron_cpt.data.shards.checksums import COLUMNS, as_text, placed, sampled_hash
from megatron_cpt.data.shards.indexed import (
    bin_path,
    idx_path,
    manifest_path,
    read_index,
    shard_options,
    write_index,
)
from megatron_cpt.data.tokenize.shard_plan import ShardPlan
from megatron_cpt.data.tokenize.workers import PieceResult, TaskResult
from megatron_cpt.data.tokenizer.interface import describe, same_tokenizer
from megatron_cpt.errors import DataError
from megatron_cpt.files import naming, read_json_object, take_lock, whole_file, write_json

FORMAT = 1
_LEFTOVER = re.compile(r"\.(.+)\.(?:idx|json|provenance\.npy|rejects\.jsonl)\.[^.]+\.partial")


class ShardWriter:
    """Collects the task results of one shard, in order, and makes it whole."""

    def __init__(
        self,
        plan: ShardPlan,
        keys: Sequence[str],
        dtype: np.dtype,
        tokenizer: dict[str, Any],
        options: dict[str, Any],
        leftovers: Sequence[Path] = (),
    ):
        """Open the partial files, and remove `leftovers` of this shard once their lock is held."""
        self.plan, self.keys, self.dtype = plan, keys, dtype
        self.tokenizer, self.options = tokenizer, options
        self.prefixes = [plan.prefix(key) for key in keys]
        self.offsets = [0] * len(keys)
        self.lengths: list[list[np.ndarray]] = [[] for _ in keys]
        self.counts = [_SourceCounts(len(keys)) for _ in plan.sources]
        self.rows: list[list[np.ndarray]] = [[] for _ in keys]
        self.sums = [np.zeros(COLUMNS, dtype=f"<u{dtype.itemsize}") for _ in keys]
        self.rejects: IO[str] | None = None
        """A nameless file: a broken source of many gigabytes must not lie in memory."""
        self.keeps_provenance = options["provenance"]
        plan.base.parent.mkdir(parents=True, exist_ok=True)
        self._files = []
        try:
            for prefix in self.prefixes:
                self._files.append(_open_partial(_partial_path(prefix)))
            for path in leftovers:
                path.unlink(missing_ok=True)
        except BaseException:
            self.abandon()
            raise

    def commit(self, result: TaskResult) -> list[tuple[str, int]]:
        """Count a task, whose predecessors are counted already; return where its ids go: (path, offset) per key.

        Raises: DataError at the first bad line where the policy is to fail.
        """
        for piece in result.pieces:
            self._count(piece)
        places = []
        for key, lengths in enumerate(result.lengths):
            places.append((str(_partial_path(self.prefixes[key])), self.offsets[key]))
            # Column sums are relative to the task's first token. `placed` rolls them to the columns of the shard.
            self.sums[key] += placed(result.sums[key], self.offsets[key] // self.dtype.itemsize)
            self.offsets[key] += int(lengths.sum(dtype=np.int64)) * self.dtype.itemsize
            self.lengths[key].append(lengths)
        return places

    def finish(self) -> list[dict[str, Any]]:
        """Flush, write index, sidecars and manifest, rename; return the manifests."""
        self._check_sources()
        manifests = []
        for key, prefix in enumerate(self.prefixes):
            with naming(bin_path(prefix)):
                os.ftruncate(self._files[key], self.offsets[key])
                os.fsync(self._files[key])
            # An older manifest beside new tokens would declare a half-replaced shard complete.
            with contextlib.suppress(FileNotFoundError):
                manifest_path(prefix).unlink()
            _partial_path(prefix).replace(bin_path(prefix))
            # The empty array gives a shard without documents its type.
            lengths = np.concatenate([np.empty(0, np.int32), *self.lengths[key]])
            write_index(idx_path(prefix), self.dtype, lengths)
            if self.keeps_provenance:
                with whole_file(provenance_path(prefix), "wb") as file:
                    np.save(file, np.concatenate([np.empty((0, 2), np.int64), *self.rows[key]]))
            manifests.append(self._manifest(key, len(lengths)))
        self._write_rejects()
        # After the rejects and the tokens of all keys: a manifest declares everything beside it complete.
        for prefix, manifest in zip(self.prefixes, manifests, strict=True):
            write_json(manifest_path(prefix), manifest)
        self._close()
        return manifests

    def abandon(self) -> None:
        """Remove the partial files."""
        for prefix in self.prefixes[: len(self._files)]:
            with contextlib.suppress(FileNotFoundError):
                _partial_path(prefix).unlink()
        self._close()

    def _close(self) -> None:
        for descriptor in self._files:
            os.close(descriptor)
        self._files = []
        if self.rejects:
            self.rejects.close()

    def _count(self, piece: PieceResult) -> None:
        counts, source = self.counts[piece.source], self.plan.sources[piece.source]
        policy = self.options["on_bad_line"]
        first = min(piece.problems, key=lambda problem: problem.line, default=None)
        if policy == "strict" and piece.first_note and (first is None or piece.first_note[0] < first.line):
            first = Problem(piece.first_note[0], piece.first_note[1])
        if first and policy != "skip":
            raise bad_line(source, counts.lines + first.line + 1, first, policy)
        for problem in piece.problems:
            counts.rejects[problem.kind] += 1
            self._reject(problem.record(os.path.abspath(source.path), counts.lines + problem.line + 1))
        if self.keeps_provenance and piece.lines is not None:
            for of_key, lines in zip(self.rows, piece.lines, strict=True):
                rows = np.empty((len(lines), 2), dtype=np.int64)
                rows[:, 0] = piece.source
                rows[:, 1] = counts.lines + 1 + lines.astype(np.int64)
                of_key.append(rows)
        counts.add(piece)

    def _check_sources(self) -> None:
        for source in self.plan.sources:
            source.check_unchanged()

    def _manifest(self, key: int, documents: int) -> dict[str, Any]:
        sources = [
            source.identity() | counts.record(key)
            for source, counts in zip(self.plan.sources, self.counts, strict=True)
        ]
        totals: Counter[str] = Counter()
        notes: Counter[str] = Counter()
        control: Counter[str] = Counter()
        for counts, source in zip(self.counts, sources, strict=True):
            totals += counts.rejects
            notes += Counter(source["notes"])
            control += counts.control_tokens[key]
        return {
            "format": FORMAT,
            "documents": documents,
            "tokens": self.offsets[key] // self.dtype.itemsize,
            "bytes": sum(counts.text_bytes[key] for counts in self.counts),
            "lines": sum(counts.lines for counts in self.counts),
            "rejects": dict(totals),
            "notes": dict(notes),
            "control_tokens": dict(sorted(control.items())),
            "checksums": {"columns": as_text(self.sums[key]), "sampled": sampled_hash(bin_path(self.prefixes[key]))},
            "dtype": self.dtype.name,
            "key": self.keys[key],
            "tokenizer": self.tokenizer,
            "options": self.options,
            "sources": sources,
        }

    def _reject(self, entry: dict[str, Any]) -> None:
        if self.rejects is None:
            self.rejects = tempfile.TemporaryFile("w+", encoding="utf-8", dir=self.plan.base.parent)  # noqa: SIM115  closed with the shard
        self.rejects.write(json.dumps(entry, ensure_ascii=False) + "\n")

    def _write_rejects(self) -> None:
        path = rejects_path(self.plan.base)
        if self.rejects:
            self.rejects.seek(0)
            with whole_file(path) as file:
                shutil.copyfileobj(self.rejects, file)
        else:
            path.unlink(missing_ok=True)


def is_finished(plan: ShardPlan, keys: Sequence[str], tokenizer: dict[str, Any], options: dict[str, Any]) -> bool:
    """Return whether every key's shard is whole, of these inputs.

    Raises: DataError when one was made with another tokenizer or other options.
    """
    finished = True
    for key in keys:
        prefix = plan.prefix(key)
        if not manifest_path(prefix).exists():
            finished = False
            continue
        manifest = read_json_object(manifest_path(prefix), DataError)
        if not same_tokenizer(manifest["tokenizer"], tokenizer):
            raise DataError(
                f"{prefix}: was tokenized with {describe(manifest['tokenizer'])}, not with {describe(tokenizer)}. "
                "Shards of one output must not mix tokenizers. Remove the old shards or choose another output."
            )
        made_with = shard_options(manifest)
        if changed := [name for name in options if made_with.get(name) != options[name]]:
            old, new = made_with.get(changed[0]), options[changed[0]]
            raise DataError(
                f"{prefix}: was tokenized with {changed[0]}={old!r}, not {new!r}. "
                "Shards of one output must not mix options. Remove the old shards or choose another output."
            )
        # Names without folders: a corpus that was moved keeps its shards.
        made_of = [(Path(entry["path"]).name, entry["size"], entry["mtime_ns"]) for entry in manifest["sources"]]
        if made_of != [(source.path.name, source.size, source.mtime_ns) for source in plan.sources]:
            finished = False
            continue
        index = read_index(prefix)
        finished &= index.num_tokens == manifest["tokens"] and index.num_documents == manifest["documents"]
    return finished


def list_leftovers(plans: Sequence[ShardPlan], keys: Sequence[str]) -> dict[Path, list[Path]]:
    """Return by base path the temporary files of index, sidecars and manifest that a killed process left behind.

    Every folder is read once: to look in it for each of its shards takes their number squared.
    """
    shard_of = {plan.prefix(key): plan.base for plan in plans for key in keys}
    shard_of |= {plan.base: plan.base for plan in plans}
    found: dict[Path, list[Path]] = {}
    for folder in {plan.base.parent for plan in plans}:
        for name in os.listdir(folder) if folder.is_dir() else ():
            match = _LEFTOVER.fullmatch(name)
            if match and (base := shard_of.get(folder / match[1])):
                found.setdefault(base, []).append(folder / name)
    return found


def is_of_an_older_release(prefix: Path) -> bool:
    """Return whether a shard is there that was tokenized before its manifest told of control tokens and BOS."""
    return manifest_path(prefix).exists() and _is_older(read_json_object(manifest_path(prefix), DataError))


def _is_older(manifest: dict[str, Any]) -> bool:
    options = manifest.get("options") or {}
    return "append_eod" in options and not options.get("adopted") and "special_tokens" not in options


def check_neighbours(output_dir: Path, tokenizer: dict[str, Any]) -> bool:
    """Refuse an output folder that contains shards of another tokenizer under any name.

    Returns whether there are some that were tokenized by an earlier release.

    Raises: DataError naming the first.
    """
    is_older = False
    for path in sorted(output_dir.rglob("*_document.json")):
        manifest = read_json_object(path, DataError)
        is_older |= _is_older(manifest)
        if isinstance(manifest, dict) and not same_tokenizer(manifest.get("tokenizer"), tokenizer):
            raise DataError(
                f"{path}: is of a shard tokenized with {describe(manifest.get('tokenizer'))}, not with "
                f"{describe(tokenizer)}. Shards of one folder must not mix tokenizers. Choose another output."
            )
    return is_older


def bad_line(source: Source, line: int, problem: Problem, policy: str) -> DataError:
    """Return the error that names a bad line."""
    detail = f" ({problem.detail})" if problem.detail else ""
    advice = (
        "--on-bad-line fail passes over what loses nothing"
        if policy == "strict" and problem.raw is None
        else "Repair it with `megatron-cpt data repair`, or count it and continue with --on-bad-line skip"
    )
    return DataError(f"{source.path}:{line}: {problem.kind}{detail}. Every line must be a document. {advice}.")


def provenance_path(prefix: Path) -> Path:
    """Return the sidecar with the origin of each document: int64 [documents, 2], source number and line."""
    return prefix.with_name(prefix.name + ".provenance.npy")


def rejects_path(base: Path) -> Path:
    """Return the file of lines that were skipped."""
    return base.with_name(base.name + ".rejects.jsonl")


class _SourceCounts:
    """Results of one source so far; lists have one entry per key."""

    def __init__(self, num_keys: int):
        self.lines = 0
        self.documents, self.tokens, self.text_bytes = [0] * num_keys, [0] * num_keys, [0] * num_keys
        self.empty, self.without_tokens, self.with_control = [0] * num_keys, [0] * num_keys, [0] * num_keys
        self.control_tokens: list[Counter[str]] = [Counter() for _ in range(num_keys)]
        self.rejects: Counter[str] = Counter()
        self.notes: Counter[str] = Counter()

    def add(self, piece: PieceResult) -> None:
        self.lines += piece.num_lines
        self.documents = _added(self.documents, piece.documents)
        self.tokens = _added(self.tokens, piece.tokens)
        self.text_bytes = _added(self.text_bytes, piece.text_bytes)
        self.empty = _added(self.empty, piece.empty)
        self.without_tokens = _added(self.without_tokens, piece.without_tokens)
        self.with_control = _added(self.with_control, piece.with_control_tokens)
        self.notes += piece.notes
        for total, found in zip(self.control_tokens, piece.control_tokens, strict=True):
            total.update(found)

    def record(self, key: int) -> dict[str, Any]:
        notes = self.notes + Counter({EMPTY_TEXT: self.empty[key], CONTROL_TOKEN: self.with_control[key]})
        return {
            "lines": self.lines,
            "documents": self.documents[key],
            "tokens": self.tokens[key],
            "bytes": self.text_bytes[key],
            "without_tokens": self.without_tokens[key],
            "rejects": dict(self.rejects),
            "notes": dict(notes),
        }


def _added(totals: list[int], counts: Sequence[int]) -> list[int]:
    return [total + count for total, count in zip(totals, counts, strict=True)]


def _partial_path(prefix: Path) -> Path:
    return prefix.with_name(f".{prefix.name}.bin.partial")


def _open_partial(path: Path) -> int:
    """Create a partial file and lock it; one that a killed process left behind is removed."""
    if path.exists():
        descriptor = os.open(path, os.O_RDWR)
        is_free = take_lock(descriptor, path)
        os.close(descriptor)
        if not is_free:
            raise DataError(f"{path}: another process is writing this shard. Let it finish, or stop it first.")
        path.unlink()
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    take_lock(descriptor, path)
    return descriptor
