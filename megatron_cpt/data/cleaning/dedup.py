"""Remove exact and near-duplicate documents, over all corpora or within each; the result is deterministic.

Signatures (MinHash of word 5-grams) -> buckets on disk -> clusters -> the kept records, and a report. Of each cluster
the first document in the order of the inputs stays, or the longest. A cluster is a chain: each document is like another
of it, not always like the one that stays; how many are not is reported. Memory is bounded by `memory_bytes` plus about
40 bytes a document; the rest is in the work folder, from which a killed run resumes.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from megatron_cpt.data.cleaning.clusters import (
    bands_and_rows,
    estimated_similarities,
    find_clusters,
    joining_similarity,
)
from megatron_cpt.data.cleaning.signatures import MinHashOptions, document_text, read_signatures, write_signatures
from megatron_cpt.data.cleaning.task import CleaningTask
from megatron_cpt.data.cleaning.verification import similarities, write_sets
from megatron_cpt.data.reading.documents import Source
from megatron_cpt.data.reading.file_pool import map_files
from megatron_cpt.data.reading.record_files import (
    Reading,
    Tally,
    output_paths,
    read_records,
    record_writer,
    reject_writer,
)
from megatron_cpt.errors import DataError
from megatron_cpt.files import read_json_object, write_json

_EXAMPLES = 10
_EXAMPLE_CHARACTERS = 200


@dataclass(frozen=True, kw_only=True)
class DedupOptions:
    """How documents are compared and which of a cluster stays."""

    minhash: MinHashOptions = MinHashOptions()
    scope: Literal["all", "corpus"] = "all"
    """Duplicates are looked for over all corpora, or within each."""
    keep: Literal["first", "longest"] = "first"
    """Which document of a cluster stays: the first in the order of the inputs, or the longest (then the first)."""
    is_verified: bool = False
    """Join two documents by the exact similarity of their shingles, not by the estimate of their signatures."""
    similar_to: Literal["cluster", "kept"] = "cluster"
    """Required similarity of a removed document: to any document of its cluster, or to a kept one."""
    is_compressed: bool = False
    """Write .zst."""
    keeps_tables: bool = False
    """Write Parquet where Parquet or Arrow came in, with its schema; otherwise tables become JSON lines."""


def deduplicate(
    corpora: Mapping[str, Sequence[Source]],
    output: Path,
    reading: Reading,
    options: DedupOptions,
    *,
    work: Path | None = None,
    workers: int = 1,
    memory_bytes: int = 1 << 30,
    part: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """Write the documents that stay below `output/<corpus>/` and return the report, also in `output/report.json`.

    `part` (i, n) computes the signatures of the i-th of n parts of the sources, concurrently with other parts, and
    returns without a report; the call without a part then uses them. The same call again resumes after a kill, and
    returns the report of a finished task. Bad lines are skipped, counted per corpus and kept next to the output in
    `.rejects`.

    Raises: DataError for bad lines, clashing outputs, or output and work folders of other inputs or options.
    """
    sources = [source for group in corpora.values() for source in group]
    owners = [name for name, group in corpora.items() for _ in group]
    targets = [
        path
        for name, group in corpora.items()
        for path in output_paths(group, output / name, options.is_compressed, sources, options.keeps_tables)
    ]
    settings = {"reading": asdict(reading), **_settings(reading, options)}
    with CleaningTask("dedup", output, corpora, settings, work) as task:
        if done := task.begin(targets, is_part=part is not None):
            return done
        signatures = write_signatures(sources, reading, options.minhash, task.work, workers, part)
        if part is not None:
            return {}
        names = list(corpora)
        corpus_of = np.array([names.index(owner) for owner in owners])
        groups = corpus_of.tolist() if options.scope == "corpus" else [0] * len(owners)
        starts = np.cumsum([0, *(len(read_signatures(path, options.minhash)) for path in signatures)])

        def exact_similarities(pairs: np.ndarray) -> np.ndarray:
            sets = write_sets(np.unique(pairs), starts, sources, reading, options.minhash, task.work, workers)
            return similarities(pairs, sets, workers)

        roots, exact = find_clusters(
            signatures,
            groups,
            options.minhash,
            task.work,
            memory_bytes,
            workers,
            exact_similarities if options.is_verified else None,
        )
        kept_by, chained = _decide(roots, exact, signatures, starts, options)
        keep = kept_by == np.arange(len(roots))
        tallies = map_files(
            _write_kept,
            [
                (
                    source,
                    target,
                    keep[starts[number] : starts[number + 1]],
                    reading,
                    task.work / f"tally_{number:06d}.json",
                )
                for number, (source, target) in enumerate(zip(sources, targets, strict=True))
            ],
            [source.size for source in sources],
            workers,
            "writing",
        )
        counts = np.diff(starts)
        report = {
            "options": _settings(reading, options),
            **_report(roots, exact, keep, np.repeat(corpus_of, counts), names),
            "chained": chained,
            "examples": _examples(kept_by, exact, starts, sources, reading, options.minhash),
        }
        for name, row in report["corpora"].items():
            total = sum((tally for tally, owner in zip(tallies, owners, strict=True) if owner == name), Tally())
            row |= {key: value for key, value in total.record().items() if key != "documents"}
        return task.finish(report)


def report_table(report: Mapping[str, Any]) -> str:
    """Return a report as text: a line per corpus, then the clusters."""
    lines = [f"{'corpus':<20} {'documents':>12} {'exact':>10} {'near':>10} {'kept':>12} {'removed':>9}"]
    for name, row in report["corpora"].items():
        share = row["removed_share"]
        lines.append(
            f"{name:<20} {row['documents']:>12,} {row['exact']:>10,} {row['near']:>10,} {row['kept']:>12,} {share:>9.2%}"
        )
    lines.append(f"{report['clusters']:,} clusters, the largest with {report['largest_cluster']:,} documents")
    if report["chained"]:
        verdict = (
            "stay" if report["options"]["similar_to"] == "kept" else "go all the same (--similar-to kept keeps them)"
        )
        lines.append(
            f"{report['chained']:,} near-duplicates are like a document of their cluster, not like the one that stays; they {verdict}"
        )
    lines += [
        f"{name}: left out {count:,} lines: {kind}"
        for name, row in report["corpora"].items()
        for kind, count in row["rejects"].items()
    ]
    return "\n".join(lines) + "\n"


def _settings(reading: Reading, options: DedupOptions) -> dict[str, Any]:
    bands, rows = bands_and_rows(options.minhash.num_perm, options.minhash.threshold)
    return {**asdict(options), "key": reading.key, "bands": bands, "rows": rows}


def _decide(
    roots: np.ndarray, exact: np.ndarray, signatures: Sequence[Path], starts: np.ndarray, options: DedupOptions
) -> tuple[np.ndarray, int]:
    """Return the document that stays in place of each, and how many near-duplicates are unlike the one of their cluster."""

    def estimates(pairs: np.ndarray) -> np.ndarray:
        return estimated_similarities(pairs, signatures, starts, options.minhash)

    kept_by = _kept_by(roots, signatures, options)
    near = np.flatnonzero((kept_by != np.arange(len(roots))) & (exact != exact[kept_by]))
    limit = joining_similarity(options.minhash, options.is_verified)
    chained = near[estimates(np.stack([kept_by[near], near], axis=1)) < limit]
    if options.similar_to == "kept":
        kept_by = unchained(kept_by, chained, roots, exact, estimates, limit)
    return kept_by, len(chained)


def _kept_by(roots: np.ndarray, signatures: Sequence[Path], options: DedupOptions) -> np.ndarray:
    """Return the document of its cluster that stays in place of each document, int64 [documents]."""
    if options.keep == "first":
        return roots.copy()
    lengths = np.concatenate([read_signatures(path, options.minhash)["length"] for path in signatures]).astype(np.int64)
    order = np.lexsort((np.arange(len(roots)), -lengths, roots))
    is_first = np.append(True, np.diff(roots[order]) != 0) if len(roots) else np.zeros(0, dtype=bool)
    survivor = np.empty(len(roots), dtype=np.int64)
    survivor[roots[order[is_first]]] = order[is_first]
    return survivor[roots]


def unchained(
    kept_by: np.ndarray,
    chained: np.ndarray,
    roots: np.ndarray,
    exact: np.ndarray,
    similarity: Callable[[np.ndarray], np.ndarray],
    threshold: float,
) -> np.ndarray:
    """Return `kept_by` where documents unlike the one that stays have stayed, but for those like another that has.

    Of the `chained` of a cluster the first stays, those like it and its copies go, then the first that is left, and so on.
    """
    found = kept_by.copy()
    order = chained[np.argsort(roots[chained], kind="stable")]
    for rest in np.split(order, np.flatnonzero(np.diff(roots[order])) + 1):
        while len(rest):
            leader, rest = rest[0], rest[1:]
            found[leader] = leader
            pairs = np.stack([np.full(len(rest), leader), rest], axis=1)
            alike = (similarity(pairs) >= threshold) | (exact[rest] == exact[leader])
            found[rest[alike]] = leader
            rest = rest[~alike]
    return found


def _write_kept(source: Source, target: Path, keep: np.ndarray, reading: Reading, tally_path: Path) -> Tally:
    """Write what stays of a source and return its counts, which are kept in a file; a finished one is read."""
    if tally_path.exists():
        return Tally.of_record(read_json_object(tally_path, DataError))
    tally = Tally()
    with record_writer(target, source) as write, reject_writer(target) as reject:
        for number, record in enumerate(read_records(source, reading, tally, reject)):
            if number < len(keep) and keep[number]:
                write(record)
        if tally.documents != len(keep):
            raise DataError(
                f"{source.path}: has {tally.documents:,} documents and had {len(keep):,}. It changed meanwhile."
            )
    write_json(tally_path, tally.record())
    return tally


def _report(
    roots: np.ndarray, exact: np.ndarray, keep: np.ndarray, corpus_of: np.ndarray, names: Sequence[str]
) -> dict[str, Any]:
    ids = np.arange(len(roots))
    is_copy = exact != ids  # another document before it has the same text
    sizes = np.bincount(roots, minlength=len(roots))
    rows = {}
    for index, name in enumerate(names):
        mine = corpus_of == index
        removed = mine & ~keep
        rows[name] = {
            "documents": int(mine.sum()),
            "exact": int((removed & is_copy).sum()),
            "near": int((removed & ~is_copy).sum()),
            "kept": int((mine & keep).sum()),
            "removed_share": round(float(removed.sum() / max(mine.sum(), 1)), 6),
        }
    return {
        "documents": len(roots),
        "kept": int(keep.sum()),
        "clusters": int((sizes > 1).sum()),
        "largest_cluster": int(sizes.max(initial=0)),
        "corpora": rows,
    }


def _examples(
    kept_by: np.ndarray,
    exact: np.ndarray,
    starts: np.ndarray,
    sources: Sequence[Source],
    reading: Reading,
    options: MinHashOptions,
) -> list[dict[str, Any]]:
    """Return the kept document and one removed of the first clusters, near-duplicates before exact ones."""
    removed = np.flatnonzero(kept_by != np.arange(len(kept_by)))
    is_near = exact[removed] == removed
    chosen = [*removed[is_near][:_EXAMPLES].tolist(), *removed[~is_near][: max(_EXAMPLES - is_near.sum(), 0)].tolist()]
    pairs = [(int(kept_by[document]), document) for document in chosen]
    wanted = {document for pair in pairs for document in pair}
    found: dict[int, dict[str, Any]] = {}
    for number, source in enumerate(sources):
        here = {document for document in wanted if starts[number] <= document < starts[number + 1]}
        for row, record in enumerate(read_records(source, reading), int(starts[number])):
            if not here:
                break
            if row in here:
                here.remove(row)
                text = document_text(record, reading, options)[:_EXAMPLE_CHARACTERS]
                found[row] = {"file": os.fspath(source.path), "line": record.line, "text": text}
    return [{"kept": found[kept], "removed": found[gone]} for kept, gone in pairs]
