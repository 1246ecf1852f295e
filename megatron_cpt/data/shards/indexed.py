"""Token files: Megatron's `.bin/.idx` pair and its JSON manifest, read and written without torch.

`<prefix>.bin` holds every document's token ids one after the other. `<prefix>.idx` is

    9 bytes   MMIDIDX NUL NUL          8 bytes   version, 1
    1 byte    dtype code (8 uint16, 4 int32)
    8 bytes   number of sequences s    8 bytes   number of document boundaries d + 1
    s int32   tokens per sequence      s int64   byte offset of each sequence in .bin
    d+1 int64 first sequence of each document, and s

all little-endian. Documents have one sequence each here; files with several are read as well. Files equal what
megatron-core's IndexedDatasetBuilder writes for the same ids, byte for byte.

Source: NVIDIA/Megatron-LM, megatron/core/datasets/indexed_dataset.py, core_v0.19.
"""

import os
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_cpt.errors import DataError
from megatron_cpt.files import read_json_object, whole_file

PART = re.compile(r"(?P<base>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<rest>_.*_document)")
"""Name of a part of a shard that `tokenize --shard I/N` writes."""
MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
MAX_UINT16_VOCABULARY = 65500
_DTYPES = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    6: np.float64,
    7: np.float32,
    8: np.uint16,
}
_CHUNK_SEQUENCES = 1 << 20
_SOUND: dict[tuple[Any, ...], tuple[int, bool]] = {}
"""Tokens of the indexes that were checked in this process, and whether each document is one sequence, by path, place, size and
time."""
_CODES = {np.dtype(dtype): code for code, dtype in _DTYPES.items()}


@dataclass(frozen=True, kw_only=True)
class ShardIndex:
    """The index of one `.bin` file; the arrays are memory maps of the `.idx` file."""

    prefix: Path
    num_documents: int
    num_tokens: int
    dtype: np.dtype
    sequence_lengths: np.ndarray
    """Tokens of each sequence, int32 [sequences]."""
    document_indices: np.ndarray
    """First sequence of each document, then the number of sequences, int64 [documents + 1]."""
    sequence_pointers: np.ndarray
    """Byte offset of each sequence in the `.bin` file, int64 [sequences]."""
    has_one_sequence_each: bool
    """Whether every document is one sequence, as in all that is written here."""


def token_dtype(vocab_size: int) -> np.dtype:
    """Return the type of a token on disk: uint16 for vocabularies below 65,500, else int32."""
    return np.dtype(np.uint16 if vocab_size < MAX_UINT16_VOCABULARY else np.int32)


def bin_path(prefix: Path) -> Path:
    """Return `<prefix>.bin`; dots in the prefix's name stay."""
    return prefix.with_name(prefix.name + ".bin")


def idx_path(prefix: Path) -> Path:
    """Return `<prefix>.idx`."""
    return prefix.with_name(prefix.name + ".idx")


def manifest_path(prefix: Path) -> Path:
    """Return `<prefix>.json`."""
    return prefix.with_name(prefix.name + ".json")


def write_index(
    path: Path, dtype: np.dtype, sequence_lengths: np.ndarray, document_indices: np.ndarray | None = None
) -> None:
    """Write an `.idx` file, whole or not at all.

    `document_indices` ([documents + 1]) defaults to one sequence per document.
    """
    lengths = np.ascontiguousarray(sequence_lengths, dtype="<i4")
    pointers = np.zeros(len(lengths), dtype="<i8")
    if len(lengths):
        np.cumsum(lengths[:-1], dtype="<i8", out=pointers[1:])
        pointers *= dtype.itemsize
    if document_indices is None:
        document_indices = np.arange(len(lengths) + 1, dtype="<i8")
    with whole_file(path, "wb") as file:
        file.write(HEADER.pack(MAGIC, VERSION, _CODES[np.dtype(dtype)], len(lengths), len(document_indices)))
        for array in (lengths, pointers, document_indices.astype("<i8", copy=False)):
            file.write(memoryview(array).cast("B") if len(array) else b"")


def read_index(prefix: Path) -> ShardIndex:
    """Return the memory-mapped index of `<prefix>.idx`, after checking that `<prefix>.bin` has the size given there.

    Raises: DataError when either file is missing, damaged, truncated, or does not fit the other.
    """
    path = idx_path(prefix)
    dtype, num_sequences, num_boundaries = _read_header(path)
    offset = HEADER.size
    expected = offset + 12 * num_sequences + 8 * num_boundaries
    found = path.stat().st_size
    if found not in (expected, expected + num_sequences):
        raise _damaged(path, f"holds {found:,} bytes; its header promises {expected:,}")
    mapped = np.memmap(path, mode="r", dtype=np.uint8)
    lengths = mapped[offset : offset + 4 * num_sequences].view("<i4")
    pointers = mapped[offset + 4 * num_sequences : offset + 12 * num_sequences].view("<i8")
    documents = mapped[offset + 12 * num_sequences : expected].view("<i8")
    num_tokens, has_one_each = _checked(path, dtype.itemsize, lengths, pointers, documents)
    _check_bin_size(prefix, num_tokens * dtype.itemsize)
    return ShardIndex(
        prefix=prefix,
        num_documents=num_boundaries - 1,
        num_tokens=num_tokens,
        dtype=dtype,
        sequence_lengths=lengths,
        document_indices=documents,
        sequence_pointers=pointers,
        has_one_sequence_each=has_one_each,
    )


def read_tokens(index: ShardIndex) -> np.ndarray:
    """Return the memory-mapped token ids of a shard, [tokens]."""
    if index.num_tokens == 0:
        return np.empty(0, dtype=index.dtype)
    return np.memmap(bin_path(index.prefix), mode="r", dtype=index.dtype)


def document_bounds(index: ShardIndex) -> np.ndarray:
    """Return where each document starts in the tokens, and their end, int64 [documents + 1]."""
    starts = np.zeros(len(index.sequence_lengths) + 1, dtype=np.int64)
    np.cumsum(index.sequence_lengths, dtype=np.int64, out=starts[1:])
    return starts[index.document_indices]


def read_shard_manifest(prefix: Path) -> dict[str, Any]:
    """Return the manifest of a shard: documents, tokens, bytes, tokenizer, sources, options.

    Raises: DataError when it is missing or not ours.
    """
    path = manifest_path(prefix)
    manifest = read_json_object(path, DataError)
    if not isinstance(manifest, dict) or not {"documents", "tokens", "tokenizer"} <= manifest.keys():
        raise DataError(f"{path}: is not a shard manifest. `megatron-cpt tokenize` writes one for each shard.")
    return manifest


def shard_options(manifest: dict[str, Any]) -> dict[str, Any]:
    """Return the options that a shard was tokenized with; those that an earlier release did not have, as it worked."""
    options = dict(manifest.get("options") or {})
    older = {} if options.get("adopted") else older_options(manifest["tokenizer"])
    return options | {name: value for name, value in older.items() if name not in options}


def older_options(tokenizer: dict[str, Any]) -> dict[str, Any]:
    """Return what release 0.1 did with control tokens and BOS, with a tokenizer of this identity."""
    return {"special_tokens": "text" if tokenizer.get("kind") == "sentencepiece" else "token", "bos_ids": []}


def _read_header(path: Path) -> tuple[np.dtype, int, int]:
    try:
        with path.open("rb") as file:
            header = file.read(HEADER.size)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file. A shard is a pair of .bin and .idx.") from None
    if len(header) < HEADER.size:
        raise _damaged(path, f"ends after {len(header)} bytes, within its header")
    magic, version, code, num_sequences, num_boundaries = HEADER.unpack(header)
    if magic != MAGIC:
        raise _damaged(path, f"starts with {magic!r}, not {MAGIC!r}")
    if version != VERSION:
        raise _damaged(path, f"has version {version}, not {VERSION}")
    if code not in _DTYPES:
        raise _damaged(path, f"has the unknown dtype code {code}")
    if num_boundaries < 1:
        raise _damaged(path, "has no document boundaries")
    return np.dtype(_DTYPES[code]), num_sequences, num_boundaries


def _checked(
    path: Path, token_bytes: int, lengths: np.ndarray, pointers: np.ndarray, documents: np.ndarray
) -> tuple[int, bool]:
    """Return the tokens of an index, and whether each document is one sequence.

    Its offsets have to follow from its lengths, and its documents to be in order.

    A checked index is not checked again in this process while its file is unchanged.

    Raises: DataError when it would give other documents' tokens.
    """
    status = path.stat()
    key = (os.fspath(path), status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
    if (known := _SOUND.get(key)) is not None:
        return known
    num_tokens = 0
    for start in range(0, len(lengths), _CHUNK_SEQUENCES):
        some = lengths[start : start + _CHUNK_SEQUENCES]
        ends = np.cumsum(some, dtype=np.int64)
        ends += num_tokens
        expected = (ends - some) * token_bytes
        if some.min() < 0:
            raise _damaged(path, f"sequence {start + int(np.argmax(some < 0)):,} has a negative length")
        if not np.array_equal(expected, pointers[start : start + _CHUNK_SEQUENCES]):
            wrong = int(np.argmax(expected != pointers[start : start + _CHUNK_SEQUENCES]))
            raise _damaged(
                path,
                f"the offset of sequence {start + wrong:,} is {int(pointers[start + wrong]):,}; the lengths before it make "
                f"{int(expected[wrong]):,}",
            )
        num_tokens = int(ends[-1])
    if documents[0] != 0 or documents[-1] != len(lengths):
        raise _damaged(path, f"its documents end at sequence {documents[-1]:,} of {len(lengths):,}")
    # a document has one sequence, or several or none, as Megatron-LM writes sentences and empty texts
    has_one_each = len(documents) == len(lengths) + 1
    for start in range(0, len(documents) - 1, _CHUNK_SEQUENCES):
        steps = np.diff(documents[start : start + _CHUNK_SEQUENCES + 1])
        if steps.min() < 0:
            place = start + int(np.argmin(steps))
            raise _damaged(path, f"document {place:,} starts at sequence {documents[place]:,} and ends before it")
        has_one_each = has_one_each and steps.max() == 1
    _SOUND[key] = num_tokens, bool(has_one_each)
    return _SOUND[key]


def _check_bin_size(prefix: Path, expected: int) -> None:
    path = bin_path(prefix)
    try:
        found = path.stat().st_size
    except FileNotFoundError:
        raise DataError(f"{path}: no such file. A shard is a pair of .bin and .idx.") from None
    if found != expected:
        raise DataError(
            f"{path}: holds {found:,} bytes; its index promises {expected:,}. "
            "The shard is incomplete or damaged. Tokenize it again."
        )


def _damaged(path: Path, found: str) -> DataError:
    return DataError(f"{path}: {found}. The index is damaged or no .idx file. Tokenize the shard again.")
