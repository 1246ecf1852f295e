"""Clusters of duplicates from signatures: exact hashes and LSH bands, spilled to disk, joined by union-find.

Each document puts (bucket hash, document) for its exact hash and for every band of its MinHash. A unit, a run of
documents, is written as one file with its entries in the order of partitions, so that units are spilled in parallel and
the number of partitions costs nothing; a partition, a range of bucket hashes, is gathered from all units and is small
enough to be sorted in memory. Members of a bucket are compared by their full signatures: those at or above the
threshold are joined. Every file is written atomically, so a killed run can resume.

Source of the banding: Leskovec, Rajaraman, Ullman, Mining of Massive Datasets, section 3.4.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from megatron_cpt.data.cleaning.signatures import MinHashOptions, read_signatures, signature_dtype
from megatron_cpt.data.reading.file_pool import map_files
from megatron_cpt.errors import DataError
from megatron_cpt.files import read_json, whole_file, write_json

_ENTRY = np.dtype([("bucket", "<u8"), ("document", "<u8")])
_RECALL = 0.9
_MAX_LEADERS = 64
_MIN_UNIT, _MAX_UNIT = 1 << 12, 1 << 20
"""Documents that are spilled together."""
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
    verify: Callable[[np.ndarray], np.ndarray] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return (root, exact root) of each document over all files, int64 [documents].

    A cluster's root is its first document; the exact root counts equal texts only. `groups` holds a number per file:
    documents of different groups are never joined. `verify` is given all pairs of near-duplicates, [pairs, 2], and returns
    their exact similarities, which then decide; candidates are looser by two standard errors of their signatures.
    """
    sizes = [len(read_signatures(path, options)) for path in signatures]
    starts = np.cumsum([0, *sizes])
    plan = _spill_plan(int(starts[-1]), options, folder, memory_bytes // max(workers, 1))
    units = _spill(plan, signatures, starts, groups, options, folder, workers)
    results = [folder / f"pairs_{number:05d}.npy" for number in range(1 << plan["bits"])]
    pairs = map_files(
        _write_pairs,
        [(number, result) for number, result in enumerate(results)],
        [sum(path.stat().st_size for path in units) >> plan["bits"]] * len(results),
        workers,
        "clusters",
        shared=(units, 1 << plan["bits"], signatures, starts, options, joining_similarity(options, verify is not None)),
    )
    total = int(starts[-1])
    exact = _union(total, (found[found[:, 2] == 1, :2] for found in map(np.load, pairs)))
    if verify is None:
        return _union(total, (found[:, :2] for found in map(np.load, pairs))), exact
    # Equal texts need no verification: every document is joined to its exact root, and pairs within one root are
    # dropped.
    same = np.stack([exact, np.arange(total)], axis=1)
    near = [found[found[:, 2] == 0, :2] for found in map(np.load, pairs)]
    candidates = np.unique(np.concatenate([np.empty((0, 2), dtype=np.int64), *near]), axis=0)
    candidates = candidates[exact[candidates[:, 0]] != exact[candidates[:, 1]]]
    return _union(total, [same, candidates[verify(candidates) >= options.threshold]]), exact


def joining_similarity(options: MinHashOptions, is_verified: bool) -> float:
    """Return the estimated similarity from which signatures make a pair."""
    error = np.sqrt(options.threshold * (1 - options.threshold) / options.num_perm)
    return max(options.threshold - 2 * float(error), 0.0) if is_verified else options.threshold


def estimated_similarities(
    pairs: np.ndarray, signatures: Sequence[Path], starts: np.ndarray, options: MinHashOptions
) -> np.ndarray:
    """Return the share of equal functions in the signatures of pairs of documents, float64 [pairs]."""
    files = [read_signatures(path, options) for path in signatures]
    found = [np.empty(0)]
    for begin in range(0, len(pairs), _GATHERED):
        part = pairs[begin : begin + _GATHERED]
        documents, places = np.unique(part, return_inverse=True)
        matrix = _gather(documents, files, starts, "minhash")[places.reshape(part.shape)]
        found.append((matrix[:, 0] == matrix[:, 1]).mean(axis=1))
    return np.concatenate(found)


def _spill_plan(total: int, options: MinHashOptions, folder: Path, memory_bytes: int) -> dict[str, int]:
    """Return how the entries are cut: `bits` of a bucket hash that choose its partition, `documents` of a unit.

    Kept in the work folder, since the number of workers can change when a run resumes.
    """
    path = folder / "spill.json"
    if path.exists():
        return dict(read_json(path, DataError))
    entries = _bands(options)[0] + 1
    # Sorting a unit or a partition takes about four times its size.
    needed = 4 * entries * _ENTRY.itemsize
    bits = max(0, int(np.ceil(np.log2(max(total * needed / memory_bytes, 1)))))
    plan = {"bits": bits, "documents": int(np.clip(memory_bytes // needed, _MIN_UNIT, _MAX_UNIT))}
    write_json(path, plan)
    return plan


def _bands(options: MinHashOptions) -> tuple[int, int]:
    if options.is_exact_only or options.is_prompt:
        return 0, 0
    return bands_and_rows(options.num_perm, options.threshold)


def _spill(
    plan: Mapping[str, int],
    signatures: Sequence[Path],
    starts: np.ndarray,
    groups: Sequence[int],
    options: MinHashOptions,
    folder: Path,
    workers: int,
) -> list[Path]:
    """Write the units that are missing; return all."""
    begins = range(0, int(starts[-1]), plan["documents"])
    units = [folder / f"unit_{number:06d}.bin" for number in range(len(begins))]
    missing = [(begin, path) for begin, path in zip(begins, units, strict=True) if not path.exists()]
    map_files(
        _write_unit,
        missing,
        [plan["documents"] * signature_dtype(options.num_perm).itemsize] * len(missing),
        workers,
        "buckets",
        shared=(plan, signatures, starts, groups, options),
    )
    return units


def _write_unit(
    plan: Mapping[str, int],
    signatures: Sequence[Path],
    starts: np.ndarray,
    groups: Sequence[int],
    options: MinHashOptions,
    begin: int,
    path: Path,
) -> None:
    """Write the entries of a run of documents: where each partition begins (int64 [partitions + 1]), then the entries."""
    end = min(begin + plan["documents"], int(starts[-1]))
    parts = []
    for number in range(int(np.searchsorted(starts, begin, side="right")) - 1, len(signatures)):
        if starts[number] >= end:
            break
        first, last = max(begin, int(starts[number])), min(end, int(starts[number + 1]))
        if first < last:
            file = read_signatures(signatures[number], options)[first - starts[number] : last - starts[number]]
            parts += _entries(file, np.arange(first, last, dtype=np.uint64), groups[number], options)
    entries = np.concatenate(parts)
    bits = plan["bits"]
    # Partitions are ranges of the highest bits, so equal buckets from all units meet in one partition. A shift of
    # uint64 by 64 bits is undefined, hence the case of a single partition.
    owner = entries["bucket"] >> np.uint64(64 - bits) if bits else np.zeros(len(entries), dtype=np.uint64)
    order = np.argsort(owner, kind="stable")
    bounds = np.searchsorted(owner[order], np.arange((1 << bits) + 1, dtype=np.uint64))
    with whole_file(path, "wb") as target:
        bounds.astype("<i8").tofile(target)
        entries[order].tofile(target)


def _entries(signatures: np.ndarray, documents: np.ndarray, group: int, options: MinHashOptions) -> list[np.ndarray]:
    """Return the entries of documents of one file: for the exact hash, then for each band."""
    bands, rows = _bands(options)
    # The group is part of every hash, so documents of different groups share no bucket. The lowest bit tells an
    # exact bucket (1) from a band's (0); _write_pairs reads it.
    salt = np.uint64(group)
    exact = _combine(signatures["exact"].astype(np.uint64), salt * np.uint64(2) + np.uint64(1))
    found = [_as_entries(exact | np.uint64(1), documents)]
    has_words = np.asarray(signatures["has_words"])
    minhash = signatures["minhash"][has_words]
    for band in range(bands):
        values = minhash[:, band * rows : (band + 1) * rows].astype(np.uint64)
        bucket = _combine(values, salt * np.uint64(1 << 20) + np.uint64(2 * band + 2))
        found.append(_as_entries(bucket & ~np.uint64(1), documents[has_words]))
    return found


def _as_entries(buckets: np.ndarray, documents: np.ndarray) -> np.ndarray:
    entries = np.empty(len(buckets), dtype=_ENTRY)
    entries["bucket"], entries["document"] = buckets, documents
    return entries


def _partition(units: Sequence[Path], number: int, partitions: int) -> np.ndarray:
    """Return the entries of one partition from all units."""
    found = [np.empty(0, dtype=_ENTRY)]
    for path in units:
        with path.open("rb") as file:
            # A unit is sorted by partition, so one contiguous read per unit is enough.
            file.seek(8 * number)
            begin, end = np.fromfile(file, dtype="<i8", count=2).tolist()
            file.seek(8 * (partitions + 1) + begin * _ENTRY.itemsize)
            found.append(np.fromfile(file, dtype=_ENTRY, count=end - begin))
    return np.concatenate(found)


def _combine(values: np.ndarray, salt: np.uint64) -> np.ndarray:
    """Return one hash per row of uint64 values."""
    # Mixing as in SplitMix64: wrapping multiplications, shifts to carry high bits down.
    with np.errstate(over="ignore"):
        found = np.full(len(values), salt, dtype=np.uint64)
        for column in range(values.shape[1]):
            found = (found ^ values[:, column]) * np.uint64(0x9E3779B97F4A7C15)
            found ^= found >> np.uint64(29)
            found *= np.uint64(0xBF58476D1CE4E5B9)
            found ^= found >> np.uint64(32)
    return found


def _write_pairs(
    units: Sequence[Path],
    partitions: int,
    signatures: Sequence[Path],
    starts: np.ndarray,
    options: MinHashOptions,
    threshold: float,
    number: int,
    result: Path,
) -> Path:
    """Write the joined pairs of one partition, int64 [pairs, 3] (leader, member, 1 if their texts are equal); return the file."""
    if result.exists():
        return result
    files = [read_signatures(name, options) for name in signatures]
    entries = _partition(units, number, partitions)
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
            pairs.append(_near_pairs(members, files, starts, threshold))
    found = np.unique(np.concatenate(pairs), axis=0)
    with whole_file(result, "wb") as file:
        np.save(file, found)
    return result


def _exact_pairs(members: np.ndarray, files: Sequence[np.ndarray], starts: np.ndarray) -> np.ndarray:
    # A bucket has 63 bits of the hash. The whole hash decides; a collision stays apart.
    exact = _gather(members, files, starts, "exact")
    same = (exact == exact[0]).all(axis=1)
    joined = members[same][1:]
    return np.stack([np.full(len(joined), members[0]), joined, np.ones(len(joined), dtype=np.int64)], axis=1)


def _near_pairs(members: np.ndarray, files: Sequence[np.ndarray], starts: np.ndarray, threshold: float) -> np.ndarray:
    """Join members to leaders: the first, then the first of those that are unlike it, and so on.

    A bucket of more than 64 groups holds boilerplate; the rest can still be compared in another band.
    """
    pairs = [np.empty((0, 3), dtype=np.int64)]
    # Leaders instead of all pairs: a bucket of n members costs at most 64 n comparisons.
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
            alike = (signatures == signature).mean(axis=1) >= threshold
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
            # Several pairs can hook the same root in one pass; only the smallest wins. The others stay in the list
            # and meet their new roots in the next pass.
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
