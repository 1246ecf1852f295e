"""Languages of documents: counted per corpus, written as a column, and kept by.

A document's language is the prediction of py3langid (142 languages, its model is in the package) for its first 4,096
characters; below `min_score` it is `und`, undetermined (ISO 639-2). Text that is no language (numbers, tables) gets
`zxx` or a low score.

Source: Lui and Baldwin, langid.py (ACL 2012 demonstrations); github.com/adbar/py3langid.
"""

import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import orjson

from megatron_cpt.data.cleaning.task import CleaningTask
from megatron_cpt.data.reading.documents import Source
from megatron_cpt.data.reading.file_pool import map_files
from megatron_cpt.data.reading.record_files import (
    Reading,
    Record,
    Tally,
    output_paths,
    read_records,
    record_writer,
    reject_writer,
    text_of,
)
from megatron_cpt.errors import DataError
from megatron_cpt.files import read_json, write_json

UNDETERMINED = "und"
_CHARACTERS = 4096


@dataclass(frozen=True, kw_only=True)
class LanguageOptions:
    """Options of language identification and output."""

    column: str = "language"
    """Field for the language; the field `<column>_score` gets its probability."""
    keep: tuple[str, ...] = ()
    """Languages whose documents are written; none: all."""
    min_score: float = 0.5
    """Probability below which a language is undetermined, 0 to 1."""
    is_compressed: bool = False
    """Write .zst."""


def known_languages() -> list[str]:
    """Return the codes (ISO 639-1, some 639-3) that a document can get."""
    return sorted({*map(str, _identifier().labels), UNDETERMINED})


def language_of(text: str, min_score: float) -> tuple[str, float]:
    """Return a text's language and its probability, rounded to four digits."""
    start = text[:_CHARACTERS].encode("utf-8", "replace").decode()
    if not start.strip():
        return UNDETERMINED, 0.0
    language, score = _identifier().classify(start)
    return (str(language) if score >= min_score else UNDETERMINED), round(float(score), 4)


def label_languages(
    corpora: Mapping[str, Sequence[Source]], output: Path, reading: Reading, options: LanguageOptions, workers: int = 1
) -> dict[str, Any]:
    """Write the documents with their language below `output/<corpus>/`; return the report, also in `output/report.json`.

    The report counts documents and bytes of text per corpus and language. The same call again resumes after a kill, and
    returns the report of a finished task.

    Raises: DataError for bad lines, a language that does not exist, a record that has the column already, clashing outputs, or
    output and work folders of other inputs or options.
    """
    if unknown := sorted(set(options.keep) - set(known_languages())):
        raise DataError(f"--keep {' '.join(unknown)}: no such language. Known: {' '.join(known_languages())}.")
    sources = [source for group in corpora.values() for source in group]
    owners = [name for name, group in corpora.items() for _ in group]
    targets = _targets(corpora, output, options)
    settings = {"reading": asdict(reading), **asdict(options)}
    with CleaningTask("languages", output, corpora, settings) as task:
        if done := task.begin(targets):
            return done
        rows = map_files(
            _label_source,
            [
                (source, target, task.work / f"counts_{number:06d}.json")
                for number, (source, target) in enumerate(zip(sources, targets, strict=True))
            ],
            [source.size for source in sources],
            workers,
            "languages",
            shared=(reading, options),
        )
        report: dict[str, Any] = {"options": asdict(options), "corpora": {}}
        for name in corpora:
            mine = [row for row, owner in zip(rows, owners, strict=True) if owner == name]
            total = sum((Tally.of_record(row["tally"]) for row in mine), Tally())
            counts: dict[str, Counter[str]] = {key: Counter() for key in ("documents", "bytes")}
            for row in mine:
                for key, found in counts.items():
                    found.update(row[key])
            report["corpora"][name] = {
                **total.record(),
                "kept": sum(row["kept"] for row in mine),
                "languages": {
                    language: {"documents": number, "bytes": counts["bytes"][language]}
                    for language, number in sorted(counts["documents"].items(), key=lambda item: (-item[1], item[0]))
                },
            }
        return task.finish(report)


def _targets(corpora: Mapping[str, Sequence[Source]], output: Path, options: LanguageOptions) -> list[Path]:
    """Return each source's output; lines of text become records."""
    sources = [source for group in corpora.values() for source in group]
    owners: dict[Path, Source] = {}
    for name, group in corpora.items():
        for source, path in zip(group, output_paths(group, output / name, options.is_compressed, sources), strict=True):
            target = path
            if source.format == "txt":
                stem, _, rest = path.name.rpartition(".txt")
                target = path.with_name(f"{stem}.jsonl{rest}")
            if target in owners:
                raise DataError(
                    f"{source.path} and {owners[target].path}: would both become {target}. Rename one of them."
                )
            owners[target] = source
    return list(owners)


def language_table(report: Mapping[str, Any]) -> str:
    """Return a report as text: a line per corpus and language."""
    lines = [f"{'corpus':<20} {'language':<10} {'documents':>12} {'share':>8} {'bytes':>16}"]
    for name, row in report["corpora"].items():
        for language, found in row["languages"].items():
            share = found["documents"] / max(row["documents"], 1)
            lines.append(f"{name:<20} {language:<10} {found['documents']:>12,} {share:>8.2%} {found['bytes']:>16,}")
        lines.append(f"{name}: {row['kept']:,} of {row['documents']:,} documents written")
        lines += [f"{name}: left out {count:,} lines: {kind}" for kind, count in row["rejects"].items()]
    return "\n".join(lines) + "\n"


def _label_source(
    reading: Reading, options: LanguageOptions, source: Source, target: Path, counts_path: Path
) -> dict[str, Any]:
    """Write the labelled documents of a source and return its counts, which are kept in a file; a finished one is read."""
    if counts_path.exists():
        return read_json(counts_path, DataError)
    tally, kept = Tally(), 0
    documents, sizes = Counter[str](), Counter[str]()
    with record_writer(target, source) as write, reject_writer(target) as reject:
        for record in read_records(source, reading, tally, reject):
            text = text_of(reading.value(record))
            language, score = language_of(text, options.min_score)
            documents[language] += 1
            sizes[language] += len(text.encode("utf-8", "surrogatepass"))
            if not options.keep or language in options.keep:
                kept += 1
                write(replace(record, raw=_labelled(record, language, score, source, options.column)))
    counts = {"tally": tally.record(), "kept": kept, "documents": dict(documents), "bytes": dict(sizes)}
    write_json(counts_path, counts)
    return counts


def _labelled(record: Record, language: str, score: float, source: Source, column: str) -> bytes:
    """Return a record's line with the two fields behind its own, which stay byte for byte."""
    fields = {column: language, f"{column}_score": score}
    if taken := next((name for name in fields if name in record.value), None):
        raise DataError(f"{source.path}:{record.line}: has a field {taken!r} already. Name another with --column.")
    raw = orjson.dumps(record.value) if source.format == "txt" else record.raw.rstrip()
    return raw[:-1].rstrip() + b"," + orjson.dumps(fields)[1:]


@functools.cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier  # reads a model for a second; only where it is asked

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
