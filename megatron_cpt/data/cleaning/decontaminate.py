"""Remove training documents that share a passage of n words with an evaluation set.

Words are compared in lower case and Unicode's compatibility form, without punctuation (data/cleaning/shingles.py). The n-grams of
words (13 by default, as in GPT-3's appendix C) of every evaluation text are hashed; a document with `min_matches` of them or
more goes. An evaluation text shorter than n words is looked for as a whole if it has at least `min_words`, else it cannot be
told from chance and is only counted. In a script without spaces whose letters are words (Thai, Khmer) three count as one.
"""

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_cpt.data.cleaning.shingles import passage_words, shingle_hashes, words_at, words_of
from megatron_cpt.data.cleaning.task import CleaningTask
from megatron_cpt.data.reading.documents import Source
from megatron_cpt.data.reading.file_pool import map_files
from megatron_cpt.data.reading.record_files import (
    Reading,
    Tally,
    output_paths,
    read_records,
    record_writer,
    reject_writer,
    text_of,
)
from megatron_cpt.errors import DataError
from megatron_cpt.files import read_json_object, write_json

_EXAMPLES = 10


@dataclass(frozen=True, kw_only=True)
class DecontaminationOptions:
    """Definition of contamination."""

    ngram: int = 13
    """Words of a passage."""
    min_words: int = 8
    """Shortest evaluation text that is looked for as a whole."""
    min_matches: int = 1
    """Passages from which a document goes."""
    is_compressed: bool = False
    """Write .zst."""
    keeps_tables: bool = False
    """Write Parquet where Parquet or Arrow came in, with its schema; otherwise tables become JSON lines."""


@dataclass(frozen=True, kw_only=True)
class Passages:
    """The hashed passages of the evaluation sets, by their length in words."""

    names: tuple[str, ...]
    hashes: dict[int, np.ndarray]
    """Sorted hashes, uint64, per length."""
    owners: dict[int, np.ndarray]
    """Evaluation set of each hash (the first that has it), int32, per length."""
    too_short: dict[str, int]
    """Texts per evaluation set that are too short to be looked for."""


def read_passages(
    evaluations: Mapping[str, Sequence[Source]], reading: Reading, options: DecontaminationOptions
) -> Passages:
    """Return the passages of the evaluation sets. Raises: DataError for bad lines, or if nothing can be looked for."""
    found: dict[int, list[np.ndarray]] = {}
    owners: dict[int, list[np.ndarray]] = {}
    too_short = dict.fromkeys(evaluations, 0)
    for number, (name, sources) in enumerate(evaluations.items()):
        for source in sources:
            for record in read_records(source, reading):
                text = text_of(reading.value(record))
                words = words_of(text)
                length = min(len(words), passage_words(words, options.ngram))
                if length < passage_words(words, min(options.min_words, options.ngram)):
                    too_short[name] += 1
                    continue
                hashes = shingle_hashes(text, length)
                found.setdefault(length, []).append(hashes)
                owners.setdefault(length, []).append(np.full(len(hashes), number, dtype=np.int32))
    if not found:
        raise DataError(f"no evaluation text has {options.min_words} words. Nothing can be looked for.")
    unique = {length: np.unique(np.concatenate(hashes), return_index=True) for length, hashes in found.items()}
    return Passages(
        names=tuple(evaluations),
        hashes={length: hashes for length, (hashes, _) in unique.items()},
        owners={length: np.concatenate(owners[length])[index] for length, (_, index) in unique.items()},
        too_short=too_short,
    )


def matches(text: str, passages: Passages) -> list[tuple[int, int, int]]:
    """Return (evaluation set, first word, words) of each n-gram of a text that an evaluation set has."""
    found = []
    for length, known in passages.hashes.items():
        hashes = shingle_hashes(text, length, exactly=True)
        if not len(hashes):
            continue
        places = np.searchsorted(known, hashes)
        places[places == len(known)] = 0
        for start in np.flatnonzero(known[places] == hashes).tolist():
            found.append((int(passages.owners[length][places[start]]), start, length))
    return found


def decontaminate(
    corpora: Mapping[str, Sequence[Source]],
    passages: Passages,
    output: Path,
    reading: Reading,
    options: DecontaminationOptions,
    workers: int = 1,
) -> dict[str, Any]:
    """Write the clean documents below `output/<corpus>/`; return the report, also in `output/report.json`.

    The same call again resumes after a kill, and returns the report of a finished task. Bad lines are skipped, counted
    per corpus and kept next to the output in `.rejects`.

    Raises: DataError for bad lines, clashing outputs, or output and work folders of other inputs or options.
    """
    sources = [source for group in corpora.values() for source in group]
    owners = [name for name, group in corpora.items() for _ in group]
    targets = [
        path
        for name, group in corpora.items()
        for path in output_paths(group, output / name, options.is_compressed, sources, options.keeps_tables)
    ]
    settings = {"reading": asdict(reading), **asdict(options), "passages": _passages_hash(passages)}
    with CleaningTask("decontamination", output, corpora, settings) as task:
        if done := task.begin(targets):
            return done
        counts = map_files(
            _clean_source,
            [
                (source, target, task.work / f"counts_{number:06d}.json")
                for number, (source, target) in enumerate(zip(sources, targets, strict=True))
            ],
            [source.size for source in sources],
            workers,
            "decontaminating",
            shared=(passages, reading, options),
        )
        report: dict[str, Any] = {"options": asdict(options), "too_short": passages.too_short, "corpora": {}}
        for name in corpora:
            mine = [row for row, owner in zip(counts, owners, strict=True) if owner == name]
            total = sum((Tally.of_record(row["tally"]) for row in mine), Tally())
            removed = sum(row["removed"] for row in mine)
            report["corpora"][name] = {
                **total.record(),
                "removed": removed,
                "removed_share": round(removed / max(total.documents, 1), 6),
            }
        removed_by = {
            name: sum(row["removed_by"][number] for row in counts) for number, name in enumerate(passages.names)
        }
        examples = [example for row in counts for example in row["examples"]][:_EXAMPLES]
        report |= {"removed_by_evaluation": removed_by, "examples": examples}
        return task.finish(report)


def _clean_source(
    passages: Passages,
    reading: Reading,
    options: DecontaminationOptions,
    source: Source,
    target: Path,
    counts_path: Path,
) -> dict[str, Any]:
    """Write the clean documents of a source and return its counts, which are kept in a file; a finished one is read."""
    if counts_path.exists():
        return read_json_object(counts_path, DataError)
    tally = Tally()
    removed = 0
    removed_by = [0] * len(passages.names)
    examples: list[dict[str, Any]] = []
    with record_writer(target, source) as write, reject_writer(target) as reject:
        for record in read_records(source, reading, tally, reject):
            text = text_of(reading.value(record))
            found = matches(text, passages)
            if len(found) < options.min_matches:
                write(record)
                continue
            removed += 1
            for owner in {owner for owner, _, _ in found}:
                removed_by[owner] += 1
            if len(examples) < _EXAMPLES:
                place = {"file": os.fspath(source.path), "line": record.line}
                owner, start, length = found[0]
                passage = " ".join(words_at(text, start, length))
                examples.append({**place, "evaluation": passages.names[owner], "passage": passage})
    counts = {"tally": tally.record(), "removed": removed, "removed_by": removed_by, "examples": examples}
    write_json(counts_path, counts)
    return counts


def _passages_hash(passages: Passages) -> str:
    """Return the identity of a collection of evaluation texts."""
    digest = hashlib.blake2b(repr((passages.names, passages.too_short)).encode(), digest_size=16)
    for length in sorted(passages.hashes):
        digest.update(passages.hashes[length].tobytes() + passages.owners[length].tobytes())
    return digest.hexdigest()
