"""Token shards of a corpus: found under prefixes, folders and globs, counted from their index, checked to be complete.

A shard is complete when `.bin`, `.idx` and the manifest `.json` are there, the `.bin` has the size given by the index,
and the manifest counts the index's tokens. Counts come from the index, never from file sizes.
"""

import glob
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_cpt.data.shards.checksums import sampled_hash
from megatron_cpt.data.shards.form import read_shard_form
from megatron_cpt.data.shards.indexed import PART, bin_path, manifest_path, read_index, read_shard_manifest
from megatron_cpt.data.shards.masked import is_mask
from megatron_cpt.data.tokenizer.interface import describe
from megatron_cpt.errors import DataError

_READERS = 8
"""Threads that wait for blocks of shards: a network file system answers each in a millisecond or more."""
_SUFFIXES = (".bin", ".idx")


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A complete shard, with the properties that a blend needs."""

    prefix: str
    tokens: int
    documents: int
    tokenizer: dict[str, Any]
    """Identity of the tokenizer that made it: name, kind, hash, vocab_size, eod_id."""
    packed_seq_length: int | None = None
    """Tokens of each of its documents, where they are packs for training; None: documents of any length."""
    is_held_out: bool = False
    """Whether it is a validation set held out of a training shard in the same folder (`data prepare-chat`)."""


def find_shards(patterns: Sequence[str], data_dir: Path) -> tuple[list[str], list[str]]:
    """Return (sorted prefixes, problems) of prefixes, folders and globs relative to `data_dir`.

    A folder means every shard below it, including linked folders. A `.bin` without `.idx`, or the reverse, counts as a
    shard here, so that `read_shard` reports it by name. Hidden files and folders (unfinished ones) and masks
    (`<prefix>.mask`) are passed over.
    """
    found: set[str] = set()
    problems = []
    for pattern in patterns:
        path = data_dir / pattern
        prefixes = {_without_suffix(file) for file in _files(path)}
        if not prefixes and not _has_magic(pattern):
            problems.append(f"{path}: no such shard, and no folder of shards. Tokenize the corpus or correct the path.")
        elif not prefixes:
            problems.append(f"{path}: matches no .bin or .idx file. Tokenize the corpus or correct the pattern.")
        found |= prefixes
    whole = {f"{part['base']}{part['rest']}" for prefix in found if (part := PART.fullmatch(prefix))} & found
    problems += [
        f"{prefix}: is here and its parts are too, so that every document counts twice. Remove the parts, or name one of both."
        for prefix in sorted(whole)
    ]
    return sorted(found), problems


def read_shard(prefix: str) -> Shard:
    """Return a complete shard's counts and tokenizer.

    Raises: DataError naming what is missing, damaged or inconsistent.
    """
    index = read_index(Path(prefix))
    if not manifest_path(Path(prefix)).exists():
        raise DataError(
            f"{manifest_path(Path(prefix))}: no such file. A shard needs its manifest. Tokenize it to the end, or adopt "
            "another tool's shard with `megatron-cpt data adopt`."
        )
    manifest = read_shard_manifest(Path(prefix))
    if (manifest["tokens"], manifest["documents"]) != (index.num_tokens, index.num_documents):
        raise DataError(
            f"{prefix}: its manifest counts {manifest['tokens']:,} tokens in {manifest['documents']:,} documents, its "
            f"index {index.num_tokens:,} in {index.num_documents:,}. They must agree. Tokenize the shard again."
        )
    is_foreign = bool((manifest.get("options") or {}).get("adopted"))
    if manifest.get("dtype", index.dtype.name) != index.dtype.name or not (index.has_one_sequence_each or is_foreign):
        raise DataError(
            f"{prefix}.idx: its documents or its type of token ({index.dtype.name}) are not those that its manifest tells of "
            f"({manifest.get('dtype')}, one sequence per document). The index is damaged. Tokenize the shard again."
        )
    return Shard(
        prefix=prefix,
        tokens=index.num_tokens,
        documents=index.num_documents,
        tokenizer=manifest["tokenizer"] or {},
        packed_seq_length=read_shard_form(Path(prefix)).packed_seq_length,
        is_held_out=bool(manifest.get("is_held_out")),
    )


def read_shards(prefixes: Sequence[str]) -> tuple[list[Shard], list[str]]:
    """Return (complete shards, problems) in the given order."""
    shards, problems = [], []
    for prefix in prefixes:
        try:
            shards.append(read_shard(prefix))
        except DataError as problem:
            problems.append(f"incomplete shard {prefix}: {problem}")
        except OSError as problem:
            problems.append(f"shard {prefix} cannot be read: {problem.strerror}. Mend its permissions or its disk.")
    return shards, problems


def content_problems(prefixes: Sequence[str]) -> list[str]:
    """Return one line per shard whose `.bin` is not what was written, as far as a few of its blocks tell.

    `data audit` looks at all of it. A shard of an earlier release has no checksums, and is passed over.
    """
    with ThreadPoolExecutor(_READERS) as pool:
        return [problem for problem in pool.map(_content_problem, prefixes) if problem]


def _content_problem(prefix: str) -> str | None:
    expected = read_shard_manifest(Path(prefix)).get("checksums", {}).get("sampled")
    if expected is None or sampled_hash(bin_path(Path(prefix))) == expected:
        return None
    return (
        f"{prefix}.bin: holds other tokens than were written. Its disk or a copy damaged it. Copy or tokenize it again; "
        "`megatron-cpt data audit` tells more."
    )


def tokenizer_problems(shards: Sequence[Shard], expected: dict[str, Any] | None) -> list[str]:
    """Return one line per tokenizer that differs from `expected` (from the first shard's where that is None)."""
    groups: dict[tuple[Any, ...], list[Shard]] = {}
    for shard in shards:
        groups.setdefault(_identity_key(shard.tokenizer), []).append(shard)
    if expected is None:
        if len(groups) < 2:
            return []
        expected, whose = shards[0].tokenizer, f"that of {shards[0].prefix}"
    else:
        whose = "data.tokenizer"
    return [
        f"{len(group)} shards ({group[0].prefix}{', ...' if len(group) > 1 else ''}) were tokenized with "
        f"{describe(group[0].tokenizer)}, but {whose} is {describe(expected)}. Token ids of different tokenizers "
        "cannot be mixed. Tokenize them again."
        for key, group in groups.items()
        if key != _identity_key(expected)
    ]


def _files(path: Path) -> list[Path]:
    if _has_magic(str(path)):
        matches = [Path(match) for match in glob.glob(str(path), recursive=True)]
        matches += [Path(match) for suffix in _SUFFIXES for match in glob.glob(f"{path}{suffix}", recursive=True)]
        return [file for match in matches for file in (_below(match) if match.is_dir() else [match]) if _is_part(file)]
    if path.is_dir():
        return _below(path)
    if path.suffix in _SUFFIXES:
        path = path.with_suffix("")
    return [file for suffix in _SUFFIXES if (file := path.with_name(path.name + suffix)).is_file()]


def _below(folder: Path) -> list[Path]:
    """Return the files of shards below a folder, links followed, each folder once."""
    files, seen = [], set()
    for top, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(top)
        folders[:] = [] if real in seen else sorted(name for name in folders if not name.startswith("."))
        if real not in seen:
            files += [file for name in names if _is_part(file := Path(top, name))]
        seen.add(real)
    return files


def _is_part(file: Path) -> bool:
    is_shard = file.suffix in _SUFFIXES and not file.name.startswith(".") and not is_mask(file.with_suffix(""))
    return is_shard and file.is_file()


def _without_suffix(file: Path) -> str:
    return str(file.with_suffix(""))


def _has_magic(text: str) -> bool:
    return glob.has_magic(text)


def _identity_key(identity: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(identity.get(key) for key in ("hash", "vocab_size", "eod_id"))
