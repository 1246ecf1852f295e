"""Masked shards: a token pair with a parallel pair of one byte per token that marks learned tokens and starts of
pieces.

Next to `<prefix>.bin/.idx/.json` is `<prefix>.mask.bin/.idx` (uint8, the same sequence lengths and document index). Bit
0 (`LEARNED`): the token counts in the loss when it is the label. Bit 1 (`PIECE`): the token is the first of a piece (a
conversation, a document, a part of a split document, the filling of a pack); neither it nor what follows sees anything
before it, and no token predicts it. Bit 2 (`PROMPT`): the token is a prompt's, not learned; as a label it counts with
`data.prompt_loss_weight`. The manifest has `"mask": {"learned": N, "pieces": M, "prompt": P}`, the tokens with each
bit. Shards without `prompt` were made before prompts were marked: they train as before, with a weight of 0.

A packed shard has `"packed": {"seq_length": S, "method": "best-fit"}` too: every document is one pack of exactly S tokens,
and unused room is filled with the end-of-document id, mask 0, its first token `PIECE`.
"""

import contextlib
import glob
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from megatron_cpt.data.shards.checksums import COLUMNS, as_text, column_sums, placed, sampled_hash
from megatron_cpt.data.shards.indexed import (
    ShardIndex,
    bin_path,
    idx_path,
    manifest_path,
    read_index,
    read_tokens,
    write_index,
)
from megatron_cpt.errors import DataError
from megatron_cpt.files import take_lock, whole_file, write_json

LEARNED = 1
"""Bit of a token that counts in the loss when it is the label."""
PIECE = 2
"""Bit of the first token of a piece."""
PROMPT = 4
"""Bit of a token that is a prompt's and counts with the weight of prompts."""
MASK_SUFFIX = ".mask"


def mask_prefix(prefix: Path) -> Path:
    """Return the prefix of the pair that holds a shard's mask: `<prefix>.mask`."""
    return prefix.with_name(prefix.name + MASK_SUFFIX)


def is_mask(prefix: Path) -> bool:
    """Return whether a prefix is that of a mask, which is no shard of its own."""
    return prefix.name.endswith(MASK_SUFFIX)


def has_mask(prefix: Path) -> bool:
    """Return whether a shard has a mask (either file of the pair)."""
    mask = mask_prefix(prefix)
    return idx_path(mask).is_file() or bin_path(mask).is_file()


def read_mask(index: ShardIndex) -> np.ndarray:
    """Return the memory-mapped mask of a shard, uint8 [tokens].

    Raises: DataError when it is missing, damaged, or does not fit the tokens.
    """
    prefix = mask_prefix(index.prefix)
    found = read_index(prefix)
    if found.dtype != np.uint8:
        raise DataError(
            f"{idx_path(prefix)}: holds {found.dtype}. A mask has one byte (uint8) per token. Make it again."
        )
    if not (
        np.array_equal(found.sequence_lengths, index.sequence_lengths)
        and np.array_equal(found.document_indices, index.document_indices)
    ):
        raise DataError(
            f"{idx_path(prefix)}: has {found.num_tokens:,} tokens in {found.num_documents:,} documents, the shard "
            f"{index.num_tokens:,} in {index.num_documents:,}, or other lengths. Both must be alike. Make the shard again."
        )
    return read_tokens(found)


class MaskedShardWriter:
    """Writes a masked shard document by document; the pair, its mask and last the manifest appear when it is finished.

    A context: an exception inside of it, or leaving it unfinished, leaves what stood there before. A lock prevents two
    processes from writing one shard; leftovers of a killed process are removed.

    `marks_prompts` is False where it is not known which tokens are a prompt's.

    Raises: DataError when another process is writing the shard.
    """

    def __init__(self, prefix: Path, dtype: np.dtype, *, marks_prompts: bool = True):
        self.prefix, self.dtype, self.marks_prompts = prefix, np.dtype(dtype), marks_prompts
        self.learned = self.pieces = self.prompt = self.tokens = self.documents = 0
        self._sums = np.zeros(COLUMNS, dtype=f"<u{self.dtype.itemsize}")
        self._mask_sums = np.zeros(COLUMNS, dtype="<u1")
        self._lengths: list[np.ndarray] = []
        self._is_finished = False
        self._files = contextlib.ExitStack()

    def __enter__(self) -> "MaskedShardWriter":
        with contextlib.ExitStack() as files:
            files.enter_context(_lock(self.prefix))
            for path in self.prefix.parent.glob(f".{glob.escape(self.prefix.name)}.*.partial"):
                path.unlink(missing_ok=True)
            pair = files.enter_context(contextlib.ExitStack())
            self._mask = pair.enter_context(whole_file(bin_path(mask_prefix(self.prefix)), "wb"))
            self._ids = pair.enter_context(whole_file(bin_path(self.prefix), "wb"))
            self._files, self._pair = files.pop_all(), pair
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None and not self._is_finished:
            kind, value = RuntimeError, RuntimeError(f"{self.prefix}: not finished")
        self._files.__exit__(kind, value, traceback)

    def add(self, ids: np.ndarray, mask: np.ndarray, lengths: np.ndarray) -> None:
        """Append documents: `ids` and `mask` are [tokens], `lengths` [documents] adds up to their length."""
        if not len(ids) == len(mask) == int(np.sum(lengths, dtype=np.int64)):
            raise ValueError(
                f"{len(ids)} ids, {len(mask)} mask bytes and {np.sum(lengths)} tokens in the lengths differ"
            )
        mask = np.ascontiguousarray(mask, dtype=np.uint8)
        if len(ids):
            ids = np.ascontiguousarray(ids, dtype=self.dtype)
            self._ids.write(memoryview(ids).cast("B"))
            self._mask.write(memoryview(mask))
            self._sums += placed(column_sums(ids), self.tokens)
            self._mask_sums += placed(column_sums(mask), self.tokens)
        self._lengths.append(np.asarray(lengths, dtype=np.int32))
        self.learned += int(np.count_nonzero(mask & LEARNED))
        self.pieces += int(np.count_nonzero(mask & PIECE))
        self.prompt += int(np.count_nonzero(mask & PROMPT))
        self.tokens += len(ids)
        self.documents += len(lengths)

    def finish(self, manifest: dict[str, Any]) -> dict[str, Any]:
        """Make the shard whole; return its manifest: `manifest` with the counts that are known here."""
        manifest_path(self.prefix).unlink(missing_ok=True)
        self._pair.close()
        self._is_finished = True
        lengths = np.concatenate([np.empty(0, np.int32), *self._lengths])
        write_index(idx_path(mask_prefix(self.prefix)), np.dtype(np.uint8), lengths)
        write_index(idx_path(self.prefix), self.dtype, lengths)
        whole = manifest | {
            "format": 1,
            "documents": self.documents,
            "tokens": self.tokens,
            "dtype": self.dtype.name,
            "mask": {"learned": self.learned, "pieces": self.pieces}
            | ({"prompt": self.prompt} if self.marks_prompts else {}),
            "checksums": {
                "columns": as_text(self._sums),
                "sampled": sampled_hash(bin_path(self.prefix)),
                "mask": as_text(self._mask_sums),
            },
        }
        write_json(manifest_path(self.prefix), whole)
        return whole


@contextlib.contextmanager
def _lock(prefix: Path) -> Iterator[None]:
    """Hold `.<name>.lock`, which is removed afterwards."""
    path = prefix.with_name(f".{prefix.name}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        if not take_lock(descriptor, path):
            os.close(descriptor)
            raise DataError(f"{prefix}: another process is writing this shard. Let it finish, or stop it first.")
        if path.exists() and path.stat().st_ino == os.fstat(descriptor).st_ino:
            break
        os.close(descriptor)  # removed by its owner between opening and locking
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def write_masked_shard(
    prefix: Path,
    documents: Iterable[tuple[Any, Any]],
    dtype: np.dtype,
    tokenizer: dict[str, Any],
    *,
    packed_seq_length: int | None = None,
) -> dict[str, Any]:
    """Write (ids, mask) of each document as a masked shard; return its manifest.

    `tokenizer` is its identity (name, kind, hash, vocab_size, eod_id). With `packed_seq_length` the documents are packs
    of that many tokens, filled already.
    """
    with MaskedShardWriter(prefix, dtype) as writer:
        for ids, mask in documents:
            if packed_seq_length not in (None, len(ids)):
                raise ValueError(f"a pack has {len(ids)} tokens, not {packed_seq_length}")
            writer.add(np.asarray(ids), np.asarray(mask), np.array([len(ids)]))
        manifest: dict[str, Any] = {"tokenizer": tokenizer, "key": "chat"}
        if packed_seq_length is not None:
            manifest["packed"] = {"seq_length": packed_seq_length, "method": "best-fit"}
        return writer.finish(manifest)
