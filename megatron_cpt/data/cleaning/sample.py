"""Subsets of documents: by field value, by score bucket, a random number of each; and held-out validation sets.

The selection depends only on a hash of the document (text and seed), not on the order of files, on workers or on other
documents. A random N are the N smallest hashes; a validation set is every hash below a fixed bound, so that a document
never changes sides when data is added, and copies of one document are on one side together.
"""

import contextlib
import hashlib
import heapq
import json
import logging
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from megatron_cpt.data.cleaning.task import CleaningTask
from megatron_cpt.data.reading.byproducts import remove_partials, write_record
from megatron_cpt.data.reading.documents import Source
from megatron_cpt.data.reading.file_pool import map_files
from megatron_cpt.data.reading.record_files import (
    Reading,
    Record,
    Tally,
    output_path,
    output_paths,
    read_records,
    record_writer,
    reject_writer,
    text_of,
)
from megatron_cpt.errors import DataError
from megatron_cpt.files import read_json_object
from megatron_cpt.log import Progress

logger = logging.getLogger(__name__)

_CONDITION = re.compile(r"(?P<field>[^=!<>^~]+)(?P<sign>=|!=|>=|<=|>|<|\^=|!\^=|~=|!~=)(?P<value>.*)")


@dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """Options of the selection."""

    number: int | None = None
    """Documents drawn at random, per score bucket where there are buckets; None: all that fit."""
    conditions: tuple[str, ...] = ()
    """All must be true; `parse_condition` defines their syntax."""
    score: str | None = None
    """Field whose value chooses the bucket."""
    edges: tuple[float, ...] = ()
    """Ascending bounds of the buckets: [edge 0, edge 1), [edge 1, edge 2), ...; outside of them nothing is drawn."""
    seed: int = 42
    """Another seed draws others."""
    is_compressed: bool = False
    """Write .zst."""
    keeps_tables: bool = False
    """Write Parquet where Parquet or Arrow came in, with its schema; otherwise tables become JSON lines."""


def condition_field(text: str) -> str:
    """Return the field that a condition of `parse_condition` is about; empty where it is no condition."""
    match = _CONDITION.fullmatch(text)
    return match["field"].strip() if match else ""


def parse_condition(text: str) -> Callable[[dict[str, Any]], bool]:
    """Return a test of a record from `lang=ja`, `lang!=ja`, `score>=3.5`, `id^=translation_` (starts with), `id!^=x`,
    `id~=^en-[0-9]+$` (a regular expression is found in it), `id!~=x`.

    A dotted field (`meta.lang`) is looked up in objects. A record without the field fails, except for the negations.
    Numbers are equal as numbers; true and false are written so.

    Raises: DataError saying what is accepted.
    """
    match = _CONDITION.fullmatch(text)
    if match is None:
        raise DataError(
            f"'{text}': not a condition. Write field=value, !=, >=, <=, >, <, ^= (starts with), !^=, "
            "~= (regular expression) or !~=."
        )
    field, sign, value = match["field"].strip(), match["sign"], match["value"].strip()
    if sign in ("=", "!="):
        return lambda record: _equals(_field(record, field), value) == (sign == "=")
    if sign in ("^=", "!^="):
        return lambda record: _text(_field(record, field)).startswith(value) == (sign == "^=")
    if sign in ("~=", "!~="):
        try:
            pattern = re.compile(value)
        except re.error as problem:
            raise DataError(f"'{text}': not a regular expression ({problem}). ~= searches for one.") from None
        return lambda record: (pattern.search(_text(_field(record, field))) is not None) == (sign == "~=")
    try:
        bound = float(value)
    except ValueError:
        raise DataError(f"'{text}': {value} is not a number. {sign} compares numbers.") from None
    compare: Callable[[float], bool] = {
        ">=": lambda number: number >= bound,
        "<=": lambda number: number <= bound,
        ">": lambda number: number > bound,
        "<": lambda number: number < bound,
    }[sign]
    return lambda record: (number := _number(_field(record, field))) is not None and compare(number)


def sample(sources: Sequence[Source], output: Path, reading: Reading, options: SampleOptions) -> dict[str, Any]:
    """Write the drawn documents, in their order, below `output` (and a folder per bucket).

    Return the report, also in `output/report.json`: lines and documents read, documents that the conditions leave,
    those that no bucket takes, and found and drawn per bucket. The same call again resumes after a kill, and returns
    the report of a finished task.

    Raises: DataError for bad lines, clashing outputs, fewer documents than asked for, or an output of other inputs or options.
    """
    names = _bucket_names(options)
    targets = {
        name: output_paths(sources, output / name, options.is_compressed, keeps_tables=options.keeps_tables)
        for name in names
    }
    settings = {"reading": asdict(reading), **asdict(options)}
    with CleaningTask("sample", output, {"": sources}, settings) as task:
        if done := task.begin([path for group in targets.values() for path in group]):
            return done
        bounds = None if options.number is None else _bounds(sources, reading, options, names)
        counts = {name: {"found": 0, "drawn": 0} for name in names}
        tally, passed = Tally(), Counter[str]()
        progress = Progress("sampling", sum(source.size for source in sources) / 1e6, "MB")
        for number, source in enumerate(sources):
            with contextlib.ExitStack() as files:
                writers = {name: files.enter_context(record_writer(targets[name][number], source)) for name in names}
                reject = files.enter_context(
                    reject_writer(output_path(source, output, options.is_compressed, options.keeps_tables))
                )
                for name, record, draw in _drawable(source, reading, options, tally, reject, passed):
                    counts[name]["found"] += 1
                    if bounds is None or bounds[name].takes(draw):
                        writers[name](record)
                        counts[name]["drawn"] += 1
            progress.add(source.size / 1e6)
        report = {**tally.record(), "fit": passed["fit"], "in_no_bucket": passed["in_no_bucket"], "buckets": counts}
        return task.finish(report)


def split_validation(
    corpora: Mapping[str, Sequence[Source]],
    output: Path,
    reading: Reading,
    *,
    name: str,
    fraction: Fraction,
    is_compressed: bool = False,
    keeps_tables: bool = False,
    workers: int = 1,
) -> dict[str, dict[str, Any]]:
    """Write each corpus's documents below `output/<corpus>/train/` and `output/<corpus>/<name>/`; return the counts.

    `output/<name>.json` records name, fraction, counts and inputs; the next call on the same data keeps the files, one
    on more data must state the same fraction, and writes the files again.

    Raises: DataError when the set of this name was made with another fraction, for bad lines and clashing outputs.
    """
    record_path = output / f"{name}.json"
    sources = [source for group in corpora.values() for source in group]
    sides = {
        corpus: {
            side: output_paths(group, output / corpus / side, is_compressed, sources, keeps_tables)
            for side in ("train", name)
        }
        for corpus, group in corpora.items()
    }
    stated = {"name": name, "fraction": str(fraction)}
    known: dict[str, Any] = {}
    if record_path.exists():
        known = read_json_object(record_path, DataError)
        if {key: known.get(key) for key in stated} != stated:
            raise DataError(
                f"{record_path}: the set {name} was made with the fraction {known.get('fraction')}, not {fraction}. "
                "Documents would change sides. Use that fraction, or another name."
            )
    made_of = {
        corpus: {
            "sources": [source.identity() for source in group],
            "reading": vars(reading),
            "compressed": is_compressed,
        }
        for corpus, group in corpora.items()
    }
    written = [path for paths in sides.values() for group in paths.values() for path in group]
    if all((known.get("made_of") or {}).get(corpus) == made_of[corpus] for corpus in corpora):
        if all(path.exists() for path in written):
            logger.info("%s: kept, split already of the same documents", output)
            return {corpus: known["corpora"][corpus] for corpus in corpora}
    for corpus, paths in sides.items():
        taken = next((path for group in paths.values() for path in group if path.exists()), None)
        if taken and corpus not in known.get("corpora", {}):
            raise DataError(f"{taken}: exists already, from other work. Remove it or choose another output folder.")
    claimed = dict.fromkeys(corpora, None) | known.get("corpora", {})
    write_record(record_path, "validation set", {**stated, "corpora": claimed})
    remove_partials(path for paths in sides.values() for group in paths.values() for path in group)
    bound = int(fraction * (1 << 128))
    jobs = [
        (source, sides[corpus]["train"][number], sides[corpus][name][number])
        for corpus, group in corpora.items()
        for number, source in enumerate(group)
    ]
    done = iter(
        map_files(
            _split_source, jobs, [source.size for source in sources], workers, "splitting", (reading, name, bound)
        )
    )
    rows = {}
    for corpus, group in corpora.items():
        found = [next(done) for _ in group]
        total = sum((tally for tally, _ in found), Tally())
        held_out = sum(number for _, number in found)
        rows[corpus] = {**total.record(), "train": total.documents - held_out, name: held_out}
    kept = {corpus: made for corpus, made in (known.get("made_of") or {}).items() if corpus not in made_of}
    write_record(record_path, "validation set", {**stated, "corpora": claimed | rows, "made_of": kept | made_of})
    return rows


def _split_source(
    reading: Reading, name: str, bound: int, source: Source, train_path: Path, held_out_path: Path
) -> tuple[Tally, int]:
    """Write both sides of a source; return its counts and how many documents are held out."""
    tally, number = Tally(), 0
    with (
        record_writer(train_path, source) as train,
        record_writer(held_out_path, source) as held_out,
        reject_writer(train_path) as reject,
    ):
        for record in read_records(source, reading, tally, reject):
            is_held_out = _draw(record, reading, name) < bound
            (held_out if is_held_out else train)(record)
            number += is_held_out
    return tally, number


@dataclass
class _Bound:
    """The largest of the N smallest draws, and how many documents with just that draw are among the N."""

    draw: int
    ties: int

    def takes(self, draw: int) -> bool:
        if draw == self.draw and self.ties:
            self.ties -= 1
            return True
        return draw < self.draw


def _bounds(
    sources: Sequence[Source], reading: Reading, options: SampleOptions, names: Sequence[str]
) -> dict[str, _Bound]:
    number = options.number or 0
    smallest: dict[str, list[int]] = {name: [] for name in names}
    for source in sources:
        for name, _, draw in _drawable(source, reading, options):
            _push(smallest[name], draw, number)
    for name, heap in smallest.items():
        if len(heap) < number:
            where = f" in {name}" if name else ""
            raise DataError(f"only {len(heap):,} documents fit{where}; {number:,} are wanted. Ask for fewer.")
    return {name: _Bound(-heap[0], heap.count(heap[0])) if heap else _Bound(0, 0) for name, heap in smallest.items()}


def _drawable(
    source: Source,
    reading: Reading,
    options: SampleOptions,
    tally: Tally | None = None,
    reject: Callable[[dict[str, Any]], Any] | None = None,
    passed: Counter[str] | None = None,
) -> Iterator[tuple[str, Record, int]]:
    """Yield (bucket, record, draw) of each record that the conditions let through and a bucket takes."""
    passed = Counter() if passed is None else passed
    conditions = [parse_condition(text) for text in options.conditions]
    for record in read_records(source, reading, tally, reject):
        if all(holds(record.value) for holds in conditions):
            passed["fit"] += 1
            name = _bucket(record.value, options)
            if name is None:
                passed["in_no_bucket"] += 1
            else:
                yield name, record, _draw(record, reading, options.seed)


def _draw(record: Record, reading: Reading, salt: object) -> int:
    """Return the document's number in [0, 2^128)."""
    text = text_of(reading.value(record)).encode("utf-8", "surrogatepass")
    digest = hashlib.blake2b(text, digest_size=16, key=str(salt).encode()[:64])
    return int.from_bytes(digest.digest(), "big")


def _push(heap: list[int], draw: int, size: int) -> None:
    """Keep the `size` smallest numbers, negated, in a heap with the largest of them on top."""
    if len(heap) < size:
        heapq.heappush(heap, -draw)
    elif size and -heap[0] > draw:
        heapq.heapreplace(heap, -draw)


def _bucket_names(options: SampleOptions) -> list[str]:
    if options.score is None:
        return [""]
    if len(options.edges) < 2 or list(options.edges) != sorted(set(options.edges)):
        raise DataError(f"bucket bounds are {options.edges}. At least two, ascending, are needed.")
    if not all(map(math.isfinite, options.edges)):
        raise DataError(f"bucket bounds are {options.edges}. Finite numbers are needed.")
    pairs = zip(options.edges[:-1], options.edges[1:], strict=True)
    return [_bucket_name(options, low, high) for low, high in pairs]


def _bucket_name(options: SampleOptions, low: float, high: float) -> str:
    """Return a bucket's folder; bounds in full, so that no two are alike."""
    bounds = (f"{value:.0f}" if value.is_integer() else repr(value) for value in (float(low), float(high)))
    return "_".join([(options.score or "").replace("/", "_"), *bounds])


def _bucket(record: dict[str, Any], options: SampleOptions) -> str | None:
    if options.score is None:
        return ""
    number = _number(_field(record, options.score))
    if number is None:
        return None
    for low, high in zip(options.edges[:-1], options.edges[1:], strict=True):
        if low <= number < high:
            return _bucket_name(options, low, high)
    return None


def field_text(record: dict[str, Any], name: str) -> str:
    """Return a record's field as text, that of a dotted name in its objects; empty where there is none."""
    return _text(_field(record, name))


def _equals(found: Any, value: str) -> bool:
    if isinstance(found, (int, float)) and not isinstance(found, bool):
        return _number(value) == found
    return _text(found) == value


def _field(record: dict[str, Any], name: str) -> Any:
    value: Any = record
    for part in [name] if name in record else name.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _text(value: Any) -> str:
    """Return a value in the syntax of a condition: text unchanged, anything else as in JSON."""
    return (
        "" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    )


def _number(value: Any) -> float | None:
    try:
        return None if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return None
