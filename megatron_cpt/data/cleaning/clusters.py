"""Clusters of duplicates from signatures: exact hashes and LSH bands, spilled to disk, joined by union-find.

Each document puts (bucket hash, document) for its exact hash and for every band of its MinHash into one of many partition
files; a partition is small enough to be sorted in memory. Members of a bucket are compared by their full signatures:
those at or above the threshold are joined. Every file is written whole, so a killed run goes on.

Source of the banding: Leskovec, Rajaraman, Ullman, Mining of Massive Datasets, section 3.4.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from megatron_cpt.data.cleaning.signatures import MinHashOptions, read_signatures
from megatron_cpt.data.reading.file_pool import map_files
from megatron_cpt.files import whole_file, write_text

_ENTRY = np.dtype([("bucket", "<u8"), ("document", "<u8")])
_RECALL = 0.9
_MAX_LEADERS = 64
_GATHERED = 1 << 18
"""Signatures of one bucket that are in memory at a time."""


def bands_and_rows(num_perm: int, threshold: float) -> tuple[int, int]:
    """Return (bands, rows): the longest bands that still find 9 of 10 pairs at the threshold.

    Pairs below the threshold that meet in a band are told apart by their full signatures, so recall decides.
    """
    for rows in range(num_perm, 1, -1):
        bands = num_perm // rows
        if 1 - (1 - threshold**rows) ** bands >= _RECALL:
            return bands, rows
    return num_perm, 1


def find_clusters(
    signatures: Sequence[Path],
    groups: Sequence[int],
    options: MinHashOptions,
    folder: Path,
    memory_bytes: int = 1 << 30,
    workers: int = 1,
) -> tuple[np.ndarray, np.ndarray]:
    """Return (root, exact root) of each document over all files, int64 [documents].

    A cluster's root is its first document; the exact root counts equal texts only. `groups` holds a number per file:
    documents of different groups are never joined.
    """
    sizes = [len(read_signatures(path, options)) for path in signatures]
    starts = np.cumsum([0, *sizes])
    partitions = _spill(signatures, starts, groups, options, folder, memory_bytes // max(workers, 1))
    pairs = map_files(
        _write_pairs,
        [(path,) for path in partitions],
        [path.stat().st_size if path.exists() else 0 for path in partitions],
        workers,
        "clusters",
        shared=(signatures, starts, options),
    )
    total = int(starts[-1])
    exact = _union(total, (found[found[:, 2] == 1, :2] for found in map(np.load, pairs)))
    return _union(total, (found[:, :2] for found in map(np.load, pairs))), exact


def _spill(
    signatures: Sequence[Path],
    starts: np.ndarray,
    groups: Sequence[int],
    options: MinHashOptions,
    folder: Path,
    memory_bytes: int,
) -> list[Path]:
    """Write bucket entries into partition files by the bucket's first bits; return the files."""
    is_near = not (options.is_exact_only or options.is_prompt)
    bands, rows = bands_and_rows(options.num_perm, options.threshold) if is_near else (0, 0)
    total_bytes = int(starts[-1]) * (bands + 1) * _ENTRY.itemsize
    # Sorting a partition takes about four times its size.
    bits = max(0, int(np.ceil(np.log2(max(4 * total_bytes / memory_bytes, 1)))))
    done = folder / "buckets_complete"
    if done.exists():
        bits = int(done.read_text())
    paths = [folder / f"buckets_{number:05d}.bin" for number in range(1 << bits)]
    if done.exists():
        return paths
    for path in paths:
        path.write_bytes(b"")
    for number, file in enumerate(read_signatures(path, options) for path in signatures):
        documents = np.arange(starts[number], starts[number + 1], dtype=np.uint64)
        for begin in range(0, len(file), 1 << 18):
            part = file[begin : begin + (1 << 18)]
            ids = documents[begin : begin + (1 << 18)]
            salt = np.uint64(groups[number])
            exact = _combine(part["exact"].astype(np.uint64), salt * np.uint64(2) + np.uint64(1))
            _append(paths, exact | np.uint64(1), ids, bits)
            has_words = np.asarray(part["has_words"])
            for band in range(bands):
                values = part["minhash"][has_words, band * rows : (band + 1) * rows].astype(np.uint64)
                bucket = _combine(values, salt * np.uint64(1 << 20) + np.uint64(2 * band + 2))
                _append(paths, bucket & ~np.uint64(1), ids[has_words], bits)
    write_text(done, f"{bits}\n")
    return paths


def _append(paths: Sequence[Path], buckets: np.ndarray, documents: np.ndarray, bits: int) -> None:
    entries = np.empty(len(buckets), dtype=_ENTRY)
    entries["bucket"], entries["document"] = buckets, documents
    owner = buckets >> np.uint64(64 - bits) if bits else np.zeros(len(buckets), dtype=np.uint64)
    for number, path in enumerate(paths):
        mine = entries[owner == number]
        if len(mine):
            with path.open("ab") as file:
                mine.tofile(file)


def _combine(values: np.ndarray, salt: np.uint64) -> np.ndarray:
    """Return one hash per row of uint64 values."""
    with np.errstate(over="ignore"):
        found = np.full(len(values), salt, dtype=np.uint64)
        for column in range(values.shape[1]):
            found = (found ^ values[:, column]) * np.uint64(0x9E3779B97F4A7C15)
            found ^= found >> np.uint64(29)
            found *= np.uint64(0xBF58476D1CE4E5B9)
            found ^= found >> np.uint64(32)
    return found


def _write_pairs(signatures: Sequence[Path], starts: np.ndarray, options: MinHashOptions, path: Path) -> Path:
    """Write the joined pairs of one partition, int64 [pairs, 3] (leader, member, 1 if their texts are equal); return the file."""
    result = path.with_suffix(".npy")
    if result.exists():
        return result
    files = [read_signatures(name, options) for name in signatures]
    entries = np.fromfile(path, dtype=_ENTRY)
    entries = entries[np.lexsort((entries["document"], entries["bucket"]))]
    bucket = entries["bucket"]
    edges = np.flatnonzero(np.diff(bucket)) + 1
    begins, ends = np.append(0, edges), np.append(edges, len(bucket))
    several = ends - begins > 1
    pairs = [np.empty((0, 3), dtype=np.int64)]
    for begin, end in zip(begins[several].tolist(), ends[several].tolist(), strict=True):
        members = entries["document"][begin:end].astype(np.int64)
        if bucket[begin] & np.uint64(1):
            pairs.append(_exact_pairs(members, files, starts))
        else:
            pairs.append(_near_pairs(members, files, starts, options))
    found = np.unique(np.concatenate(pairs), axis=0)
    with whole_file(result, "wb") as file:
        np.save(file, found)
    path.unlink()
    return result


def _exact_pairs(members: np.ndarray, files: Sequence[np.ndarray], starts: np.ndarray) -> np.ndarray:
    exact = _gather(members, files, starts, "exact")
    same = (exact == exact[0]).all(axis=1)
    joined = members[same][1:]
    return np.stack([np.full(len(joined), members[0]), joined, np.ones(len(joined), dtype=np.int64)], axis=1)


def _near_pairs(
    members: np.ndarray, files: Sequence[np.ndarray], starts: np.ndarray, options: MinHashOptions
) -> np.ndarray:
    """Join members to leaders: the first, then the first of those that are unlike it, and so on.

    A bucket of more than 64 groups holds boilerplate; what is left then can still meet in another band.
    """
    pairs = [np.empty((0, 3), dtype=np.int64)]
    leaders: list[tuple[int, np.ndarray]] = []
    for begin in range(0, len(members), _GATHERED):
        rest = members[begin : begin + _GATHERED]
        signatures = _gather(rest, files, starts, "minhash")
        number = 0
        while len(rest) and number < _MAX_LEADERS:
            if number == len(leaders):
                leaders.append((int(rest[0]), signatures[0].copy()))
                rest, signatures = rest[1:], signatures[1:]
            leader, signature = leaders[number]
            alike = (signatures == signature).mean(axis=1) >= options.threshold
            joined = rest[alike]
            pairs.append(np.stack([np.full(len(joined), leader), joined, np.zeros(len(joined), np.int64)], axis=1))
            rest, signatures = rest[~alike], signatures[~alike]
            number += 1
    return np.concatenate(pairs)


def _gather(members: np.ndarray, files: Sequence[np.ndarray], starts: np.ndarray, field: str) -> np.ndarray:
    """Return a field of the members' signatures; members are in ascending order."""
    owners = np.searchsorted(starts, members, side="right") - 1
    return np.concatenate(
        [files[owner][field][members[owners == owner] - starts[owner]] for owner in dict.fromkeys(owners.tolist())]
    )


def _union(num_documents: int, pairs: Iterable[np.ndarray]) -> np.ndarray:
    """Return the smallest document of each document's component; `pairs` are int64 [pairs, 2], in any number of arrays."""
    roots = np.arange(num_documents, dtype=np.int64)
    for edges in pairs:
        left, right = edges[:, 0], edges[:, 1]
        while len(left):
            left, right = _roots_of(roots, left), _roots_of(roots, right)
            unequal = left != right
            left, right = np.minimum(left, right)[unequal], np.maximum(left, right)[unequal]
            np.minimum.at(roots, right, left)  # roots hook onto smaller ones only, so there is no circle
    return _roots_of(roots, roots)


def _roots_of(roots: np.ndarray, documents: np.ndarray) -> np.ndarray:
    """Return the end of each document's chain, and shorten the chains to it."""
    ends = roots[documents]
    while True:
        further = roots[ends]
        if np.array_equal(further, ends):
            break
        ends = roots[further]
    roots[documents] = ends
    return ends
