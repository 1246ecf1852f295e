"""Remove training documents that share a passage of n words with an evaluation set.

The n-grams of words (13 by default, as in GPT-3's appendix C) of every evaluation text are hashed; a document with
`min_matches` of them or more goes. An evaluation text shorter than n words is looked for as a whole if it has at least
`min_words`, else it cannot be told from chance and is only counted.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_cpt.data.documents import Source
from megatron_cpt.data.record_files import Reading, output_paths, read_records, record_writer, text_of
from megatron_cpt.data.shingles import shingle_hashes, words_of
from megatron_cpt.errors import DataError
from megatron_cpt.files import write_json
from megatron_cpt.log import Progress

_EXAMPLES = 10


@dataclass(frozen=True, kw_only=True)
class DecontaminationOptions:
    """What counts as contaminated."""

    ngram: int = 13
    """Words of a passage."""
    min_words: int = 8
    """Shortest evaluation text that is looked for as a whole."""
    min_matches: int = 1
    """Passages from which a document goes."""
    is_compressed: bool = False
    """Write .zst."""


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
                text = text_of(record.value.get(reading.key, record.value.get("text", "")))
                length = min(len(words_of(text)), options.ngram)
                if length < min(options.min_words, options.ngram):
                    too_short[name] += 1
                    continue
                hashes = shingle_hashes(text, options.ngram)
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


def matches(text: str, passages: Passages) -> list[tuple[int, str]]:
    """Return (evaluation set, passage) of each n-gram of a text that an evaluation set has, in the text's order."""
    words = words_of(text)
    found = []
    for length, known in passages.hashes.items():
        if len(words) < length:
            continue
        hashes = shingle_hashes(text, length)
        places = np.searchsorted(known, hashes)
        places[places == len(known)] = 0
        for start in np.flatnonzero(known[places] == hashes):
            owner = int(passages.owners[length][places[start]])
            found.append((owner, " ".join(words[start : start + length])))
    return found


def decontaminate(
    corpora: Mapping[str, Sequence[Source]],
    passages: Passages,
    output: Path,
    reading: Reading,
    options: DecontaminationOptions,
) -> dict[str, Any]:
    """Write the clean documents below `output/<corpus>/`; return the report, also in `output/report.json`.

    Raises: DataError for bad lines or clashing outputs.
    """
    report: dict[str, Any] = {"options": asdict(options), "too_short": passages.too_short, "corpora": {}}
    removed_by = dict.fromkeys(passages.names, 0)
    examples: list[dict[str, Any]] = []
    sources = [source for group in corpora.values() for source in group]
    progress = Progress("decontaminating", sum(source.size for source in sources) / 1e6, "MB")
    for corpus, group in corpora.items():
        counts = {"documents": 0, "removed": 0}
        targets = output_paths(group, output / corpus, options.is_compressed)
        for source, target in zip(group, targets, strict=True):
            with record_writer(target) as write:
                for record in read_records(source, reading):
                    counts["documents"] += 1
                    text = text_of(record.value.get(reading.key, record.value.get("text", "")))
                    found = matches(text, passages)
                    if len(found) < options.min_matches:
                        write(record.raw)
                        continue
                    counts["removed"] += 1
                    for owner in {owner for owner, _ in found}:
                        removed_by[passages.names[owner]] += 1
                    if len(examples) < _EXAMPLES:
                        place = {"file": os.fspath(source.path), "line": record.line}
                        examples.append({**place, "evaluation": passages.names[found[0][0]], "passage": found[0][1]})
            progress.add(source.size / 1e6)
        report["corpora"][corpus] = {
            **counts,
            "removed_share": round(counts["removed"] / max(counts["documents"], 1), 6),
        }
    report |= {"removed_by_evaluation": removed_by, "examples": examples}
    write_json(output / "report.json", report)
    return report
