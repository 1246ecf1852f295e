"""Adopt shards that another tool wrote: check them against a tokenizer and write the manifest that makes them complete.

The checks that are possible with a shard's own files are made: the index fits the `.bin`, no id lies outside of the
vocabulary, and every document that has tokens ends with the end-of-document id (some tools leave it out, and documents
then run into each other).
"""

import itertools
from pathlib import Path
from typing import Any

import numpy as np

from megatron_cpt.data.reading.records import EMPTY_TEXT
from megatron_cpt.data.shards.checksums import as_text, file_sums, sampled_hash
from megatron_cpt.data.shards.indexed import (
    bin_path,
    document_bounds,
    manifest_path,
    read_index,
    read_shard_manifest,
    read_tokens,
)
from megatron_cpt.data.tokenizer.interface import Tokenizer, check_same_tokenizer
from megatron_cpt.errors import DataError
from megatron_cpt.files import write_json

_CHUNK_TOKENS = 1 << 24


def adopt(prefix: Path, tokenizer: Tokenizer, *, count_bytes: bool = False, needs_eod: bool = True) -> dict[str, Any]:
    """Write `<prefix>.json` for a shard that has none and return it.

    `bytes` (UTF-8 bytes of the text, for bits per byte) are counted by decoding every document, else None. Documents without
    any token, as Megatron-LM writes empty texts, are counted and train nothing.

    Raises: DataError when there is a manifest already, or the shard cannot come from this tokenizer.
    """
    path = manifest_path(prefix)
    if path.exists():
        raise DataError(f"{path}: exists already. The shard needs no adoption.")
    index = read_index(prefix)
    tokens = read_tokens(index)
    _check_ids(prefix, tokens, tokenizer)
    bounds = document_bounds(index)
    without_eod, empty = _without_eod(tokens, bounds, tokenizer.eod_id)
    if without_eod and needs_eod:
        raise DataError(
            f"{prefix}: {without_eod:,} of {index.num_documents:,} documents do not end with the end-of-document id "
            f"{tokenizer.eod_id}. Documents would run into each other. Tokenize again, or accept it with --without-eod."
        )
    bos = _common_start(tokens, bounds, tokenizer)
    manifest: dict[str, Any] = {
        "documents": index.num_documents,
        "tokens": index.num_tokens,
        "bytes": _text_bytes(tokens, bounds, tokenizer, bos) if count_bytes else None,
        "notes": {EMPTY_TEXT: empty} if empty else {},
        "dtype": index.dtype.name,
        "tokenizer": tokenizer.identity,
        "options": {"adopted": True, "append_eod": not without_eod, "bos_ids": bos},
        "checksums": {"columns": as_text(file_sums(tokens)), "sampled": sampled_hash(bin_path(prefix))},
        "sources": [],
    }
    write_json(path, manifest)
    return manifest


def check_adopted(prefix: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the manifest that a shard has already.

    Raises: DataError when it does not fit the shard, or another tokenizer made it.
    """
    manifest = read_shard_manifest(prefix)
    check_same_tokenizer(prefix, manifest["tokenizer"], tokenizer.identity)
    index = read_index(prefix)
    if (manifest["documents"], manifest["tokens"]) != (index.num_documents, index.num_tokens):
        raise DataError(
            f"{prefix}: its manifest counts {manifest['tokens']:,} tokens in {manifest['documents']:,} documents, its index "
            f"{index.num_tokens:,} in {index.num_documents:,}. Remove the manifest to adopt the shard as it is now."
        )
    return manifest


def _check_ids(prefix: Path, tokens: np.ndarray, tokenizer: Tokenizer) -> None:
    for start in range(0, len(tokens), _CHUNK_TOKENS):
        chunk = tokens[start : start + _CHUNK_TOKENS]
        low, high = int(chunk.min()), int(chunk.max())
        if low < 0 or high >= tokenizer.vocab_size:
            raise DataError(
                f"{prefix}: holds the id {low if low < 0 else high}; {tokenizer.identity['name']} has "
                f"{tokenizer.vocab_size:,} tokens. The shard comes from another tokenizer."
            )


def _without_eod(tokens: np.ndarray, bounds: np.ndarray, eod_id: int) -> tuple[int, int]:
    """Return how many documents have tokens and do not end with `eod_id`, and how many have none."""
    ends = bounds[1:][np.diff(bounds) > 0]
    without = int((np.asarray(tokens)[ends - 1] != eod_id).sum()) if len(ends) else 0
    return without, len(bounds) - 1 - len(ends)


def _common_start(tokens: np.ndarray, bounds: np.ndarray, tokenizer: Tokenizer) -> list[int]:
    """Return the BOS ids if every document that has tokens begins with them."""
    bos = tokenizer.prefix_ids()
    starts = bounds[:-1][np.diff(bounds) >= len(bos)]
    has_bos = len(starts) == np.count_nonzero(np.diff(bounds)) and all(
        bool((np.asarray(tokens)[starts + place] == id).all()) for place, id in enumerate(bos)
    )
    return bos if has_bos else []


def _text_bytes(tokens: np.ndarray, bounds: np.ndarray, tokenizer: Tokenizer, bos: list[int]) -> int:
    total = 0
    for start, end in itertools.pairwise(bounds.tolist()):
        ids = tokens[start + len(bos) : end]
        if len(ids) and ids[-1] == tokenizer.eod_id:
            ids = ids[:-1]
        total += len(tokenizer.decode(ids.tolist()).encode("utf-8", "replace"))
    return total
