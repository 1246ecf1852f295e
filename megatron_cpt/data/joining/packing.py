"""Packing: documents of any length into packs of exactly one training sequence, by best fit.

Within a window of documents, longest first, each goes to the pack with the least room that still takes it, or opens
another. The packs of a window are then shuffled (otherwise they would be sorted by size); the pieces of a pack are in
the order of the documents. A document longer than a pack is split, cut, left out or refused. O(n log s) searches for n
documents and packs of s tokens; memory is about 60 bytes per document, and a window's packs.

Source: Ding et al., Fewer Truncations Improve Language Modeling, arXiv:2404.10830, section 2.2 (best fit decreasing over
lengths; their segment tree is a sorted list of the rooms that occur here).
"""

import bisect
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_cpt.data.shards.indexed import (
    document_bounds,
    manifest_path,
    read_index,
    read_shard_manifest,
    read_tokens,
)
from megatron_cpt.data.shards.masked import LEARNED, PIECE, MaskedShardWriter, has_mask, read_mask
from megatron_cpt.data.tokenize.shard_writer import provenance_path
from megatron_cpt.errors import ConfigError, DataError
from megatron_cpt.files import file_hash, whole_file
from megatron_cpt.log import Progress

logger = logging.getLogger(__name__)

OVERFLOW = ("split", "truncate", "drop", "fail")
METHOD = "best-fit"
_PACKS_AT_ONCE = 512


@dataclass(frozen=True, kw_only=True)
class PackOptions:
    """How documents are packed."""

    seq_length: int
    """Tokens of a pack: training.seq_length."""
    overflow: str = "split"
    """Action for a longer document: split it into several pieces, truncate, drop, or fail."""
    max_packs: int | None = None
    """Packs to keep, chosen at random over the whole shard; None: all."""
    window: int = 1 << 18
    """Documents that are packed together."""
    seed: int = 42


@dataclass(frozen=True, kw_only=True)
class PackPlan:
    """Which part of which document goes to which pack."""

    pieces: np.ndarray
    """(document, first token, tokens) of each piece, int64 [pieces, 3], pack by pack."""
    starts: np.ndarray
    """First piece of each pack, then the number of pieces, int64 [packs + 1]."""
    split: int
    truncated: int
    dropped: int


def plan_packs(lengths: np.ndarray, options: PackOptions) -> PackPlan:
    """Return the packs of documents of these lengths. Raises: DataError when one is too long and that is to fail."""
    if options.overflow not in OVERFLOW:
        raise ConfigError(f"pack: overflow is {options.overflow!r}. Choose one of {', '.join(OVERFLOW)}.")
    if options.seq_length < 2 or options.window < 1 or (options.max_packs is not None and options.max_packs < 1):
        raise ConfigError(
            f"pack: {options}. A seq_length of at least 2, a window and max_packs of at least 1 are needed."
        )
    lengths = np.asarray(lengths, dtype=np.int64)
    too_long = lengths > options.seq_length
    num_long = int(np.count_nonzero(too_long))
    if num_long and options.overflow == "fail":
        first = int(np.argmax(too_long))
        raise DataError(
            f"document {first:,} has {lengths[first]:,} tokens, {num_long:,} documents more than {options.seq_length:,}. "
            "Each must fit into a pack. Choose a longer seq_length, or --overflow split, truncate or drop."
        )
    pieces, sizes = [np.empty((0, 3), np.int64)], [np.empty(0, np.int64)]
    for number, first in enumerate(range(0, len(lengths), options.window)):
        items = _items(lengths[first : first + options.window], options)
        packs = _best_fit(items[:, 2], options.seq_length)
        # A stream per window: a window's shuffle does not depend on how many packs the earlier ones made.
        order = np.random.default_rng([options.seed, number]).permutation(len(packs))
        # Best fit adds pieces by length; sorting restores the order of the documents.
        chosen = [sorted(packs[pack]) for pack in order]
        items[:, 0] += first
        pieces.append(items[[item for pack in chosen for item in pack]] if chosen else items[:0])
        sizes.append(np.array([len(pack) for pack in chosen], dtype=np.int64))
    plan = PackPlan(
        pieces=np.concatenate(pieces),
        starts=np.concatenate([[0], np.cumsum(np.concatenate(sizes))]).astype(np.int64),
        split=num_long if options.overflow == "split" else 0,
        truncated=num_long if options.overflow == "truncate" else 0,
        dropped=num_long if options.overflow == "drop" else 0,
    )
    return plan if options.max_packs is None else _chosen(plan, options.max_packs, options.seed)


def pack_shard(prefix: Path, output_prefix: Path, options: PackOptions) -> tuple[dict[str, Any], bool]:
    """Pack a tokenized shard, masked or not; return the manifest, and whether it was there already.

    Without a mask every token is learned. A packed shard of the same shard and options is kept.

    Raises: DataError when it cannot be packed, or the output was made otherwise.
    """
    if output_prefix.absolute() == prefix.absolute():
        raise DataError(f"{output_prefix}: is the shard to pack. Choose another output.")
    index, manifest = read_index(prefix), read_shard_manifest(prefix)
    if "packed" in manifest:
        raise DataError(f"{prefix}: is packed already. Pack the shard that it was made of.")
    of = {"name": prefix.name, "manifest_hash": file_hash(manifest_path(prefix))}
    if manifest_path(output_prefix).exists():
        return _kept(output_prefix, of | vars(options)), True
    bounds, tokens = document_bounds(index), read_tokens(index)
    mask = read_mask(index) if has_mask(prefix) else None
    plan = plan_packs(np.diff(bounds), options)
    if options.max_packs is not None and len(plan.starts) - 1 < options.max_packs:
        logger.warning(
            "%s: makes %s packs, fewer than the %s to keep; a stage of so many samples repeats some",
            *(prefix, f"{len(plan.starts) - 1:,}", f"{options.max_packs:,}"),
        )
    progress = Progress("pack", len(plan.starts) - 1, "packs")
    eod_id = manifest["tokenizer"]["eod_id"]
    marks_prompts = mask is None or "prompt" in manifest.get("mask", {})
    with MaskedShardWriter(output_prefix, index.dtype, marks_prompts=marks_prompts) as writer:
        for packs in _filled(plan, bounds, tokens, mask, eod_id, options.seq_length):
            writer.add(*packs, np.full(len(packs[0]) // options.seq_length, options.seq_length))
            progress.add(len(packs[0]) // options.seq_length)
        _write_provenance(prefix, output_prefix, plan, options.seq_length)
        real = int(plan.pieces[:, 2].sum())
        return writer.finish(
            _packed_manifest(manifest, plan, options, of, real, index.num_tokens, writer.tokens)
        ), False


def _items(lengths: np.ndarray, options: PackOptions) -> np.ndarray:
    """Return (document, first token, tokens) of the pieces of a window's documents, in order."""
    size = options.seq_length
    documents = np.arange(len(lengths), dtype=np.int64)
    if options.overflow == "split":
        counts = -(-lengths // size)
        document = np.repeat(documents, counts)
        part = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
        start = part * size
        return np.stack([document, start, np.minimum(lengths[document] - start, size)], axis=1)
    kept = lengths > 0
    if options.overflow == "drop":
        kept &= lengths <= size
    return np.stack([documents[kept], np.zeros(kept.sum(), np.int64), np.minimum(lengths[kept], size)], axis=1)


def _best_fit(lengths: np.ndarray, size: int) -> list[list[int]]:
    """Return the items of each pack, given items of 1 to `size` tokens."""
    packs: list[list[int]] = []
    rooms: list[int] = []
    packs_with: dict[int, list[int]] = {}
    # `rooms` holds each amount of free room that occurs, ascending and once, so the list has at most `size`
    # elements however many packs are open.
    sizes = lengths.tolist()
    # Stable: equal lengths keep their order, so the same shard and options give the same packs.
    for item in np.argsort(-lengths, kind="stable").tolist():
        length = sizes[item]
        at = bisect.bisect_left(rooms, length)
        if at == len(rooms):
            pack, room = len(packs), size
            packs.append([item])
        else:
            room = rooms[at]
            pack = packs_with[room].pop()
            packs[pack].append(item)
            if not packs_with[room]:
                del rooms[at]
        room -= length
        if room:
            waiting = packs_with.setdefault(room, [])
            if not waiting:
                bisect.insort(rooms, room)
            waiting.append(pack)
    return packs


def _chosen(plan: PackPlan, number: int, seed: int) -> PackPlan:
    total = len(plan.starts) - 1
    if number >= total:
        return plan
    # A stream of its own: window numbers stay below 2^32.
    kept = np.sort(np.random.default_rng([seed, 1 << 32]).choice(total, number, replace=False))
    sizes = np.diff(plan.starts)
    is_kept = np.zeros(total, dtype=bool)
    is_kept[kept] = True
    return PackPlan(
        pieces=plan.pieces[np.repeat(is_kept, sizes)],
        starts=np.concatenate([[0], np.cumsum(sizes[kept])]).astype(np.int64),
        split=plan.split,
        truncated=plan.truncated,
        dropped=plan.dropped,
    )


def _filled(
    plan: PackPlan, bounds: np.ndarray, tokens: np.ndarray, mask: np.ndarray | None, eod_id: int, size: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield ids and mask of some packs at a time, each [packs * size]."""
    for first in range(0, len(plan.starts) - 1, _PACKS_AT_ONCE):
        starts = plan.starts[first : first + _PACKS_AT_ONCE + 1].tolist()
        ids = np.full((len(starts) - 1) * size, eod_id, dtype=tokens.dtype)
        flags = np.zeros(len(ids), dtype=np.uint8)
        for pack in range(len(starts) - 1):
            position = pack * size
            for document, start, length in plan.pieces[starts[pack] : starts[pack + 1]].tolist():
                begin = bounds[document] + start
                ids[position : position + length] = tokens[begin : begin + length]
                flags[position : position + length] = LEARNED if mask is None else mask[begin : begin + length]
                flags[position] |= PIECE
                position += length
            # The filling is a piece of its own: no document attends to it, and none of it is learned.
            if position < (pack + 1) * size:
                flags[position] = PIECE
        yield ids, flags


def _write_provenance(prefix: Path, output_prefix: Path, plan: PackPlan, size: int) -> None:
    """Write (source, line) of each piece, -1 for filling; the k-th row is the k-th token with the bit `PIECE`."""
    if not provenance_path(prefix).exists():
        return
    origin = np.load(provenance_path(prefix))
    used = np.add.reduceat(plan.pieces[:, 2], plan.starts[:-1]) if len(plan.pieces) else np.empty(0, np.int64)
    ends = plan.starts[1:][used < size]
    rows = np.insert(origin[plan.pieces[:, 0]], ends, -1, axis=0)
    with whole_file(provenance_path(output_prefix), "wb") as file:
        np.save(file, rows)


def _packed_manifest(
    manifest: dict[str, Any],
    plan: PackPlan,
    options: PackOptions,
    of: dict[str, Any],
    real: int,
    num_tokens: int,
    written: int,
) -> dict[str, Any]:
    packed = {
        "seq_length": options.seq_length,
        "method": METHOD,
        "fill": real / max(written, 1),
        "real_tokens": real,
        "lost_tokens": num_tokens - real,
        "split_documents": plan.split,
        "truncated_documents": plan.truncated,
        "dropped_documents": plan.dropped,
        "of": of | vars(options),
    }
    # where tokens are left out their share of the text's bytes is left out as well, which is an estimate
    num_bytes = manifest.get("bytes")
    if num_bytes is not None and real < num_tokens:
        num_bytes = round(num_bytes * real / num_tokens)
    return manifest | {"packed": packed, "bytes": num_bytes}


def _kept(output_prefix: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    manifest = read_shard_manifest(output_prefix)
    found = manifest.get("packed", {}).get("of", {})
    if changed := [name for name in wanted if found.get(name) != wanted[name]]:
        raise DataError(
            f"{output_prefix}: was packed with {changed[0]}={found.get(changed[0])!r}, not {wanted[changed[0]]!r}. "
            "Remove the old shard or choose another output."
        )
    read_mask(read_index(output_prefix))
    return manifest
