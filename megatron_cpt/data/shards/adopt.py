"""Adopt shards that another tool wrote: check them against a tokenizer and write the manifest that makes them complete.

What a shard's own files can show is checked: the index fits the `.bin`, no id lies outside of the vocabulary, and every
document ends with the end-of-document id (some tools leave it out, and documents then run into each other).
"""

import itertools
from pathlib import Path
from typing import Any

import numpy as np

from megatron_cpt.data.shards.indexed import document_bounds, manifest_path, read_index, read_tokens
from megatron_cpt.data.tokenizer.interface import Tokenizer
from megatron_cpt.errors import DataError
from megatron_cpt.files import write_json

_CHUNK_TOKENS = 1 << 24


def adopt(prefix: Path, tokenizer: Tokenizer, *, count_bytes: bool = False, needs_eod: bool = True) -> dict[str, Any]:
    """Write `<prefix>.json` for a shard that has none and return it.

    `bytes` (UTF-8 bytes of the text, for bits per byte) are counted by decoding every document, else None.

    Raises: DataError when there is a manifest already, or the shard cannot come from this tokenizer.
    """
    path = manifest_path(prefix)
    if path.exists():
        raise DataError(f"{path}: exists already. The shard needs no adoption.")
    index = read_index(prefix)
    tokens = read_tokens(index)
    _check_ids(prefix, tokens, tokenizer)
    bounds = document_bounds(index)
    without_eod = _without_eod(tokens, bounds, tokenizer.eod_id)
    if without_eod and needs_eod:
        raise DataError(
            f"{prefix}: {without_eod:,} of {index.num_documents:,} documents do not end with the end-of-document id "
            f"{tokenizer.eod_id}. Documents would run into each other. Tokenize again, or accept it with --without-eod."
        )
    manifest: dict[str, Any] = {
        "documents": index.num_documents,
        "tokens": index.num_tokens,
        "bytes": _text_bytes(tokens, bounds, tokenizer) if count_bytes else None,
        "dtype": index.dtype.name,
        "tokenizer": tokenizer.identity,
        "options": {"adopted": True, "append_eod": not without_eod},
        "sources": [],
    }
    write_json(path, manifest)
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


def _without_eod(tokens: np.ndarray, bounds: np.ndarray, eod_id: int) -> int:
    """Return how many documents do not end with `eod_id`; an empty one does not."""
    ends = bounds[1:][np.diff(bounds) > 0]
    return len(bounds) - 1 - len(ends) + int((np.asarray(tokens)[ends - 1] != eod_id).sum() if len(ends) else 0)


def _text_bytes(tokens: np.ndarray, bounds: np.ndarray, tokenizer: Tokenizer) -> int:
    total = 0
    for start, end in itertools.pairwise(bounds.tolist()):
        ids = tokens[start:end]
        if len(ids) and ids[-1] == tokenizer.eod_id:
            ids = ids[:-1]
        total += len(tokenizer.decode(ids.tolist()).encode("utf-8", "replace"))
    return total
