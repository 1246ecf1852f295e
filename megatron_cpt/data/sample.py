"""Subsets of documents: by field value, by score bucket, a random number of each; and held-out validation sets.

What is drawn depends on a hash of the document (text and seed) and nothing else: not on the order of files, on workers or on
what else is there. A random N are the N smallest hashes; a validation set is every hash below a fixed bound, so that a
document never changes sides when data is added, and copies of one document are on one side together.
"""

import contextlib
import hashlib
import heapq
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from megatron_cpt.data.documents import Source
from megatron_cpt.data.record_files import Reading, Record, output_paths, read_records, record_writer, text_of
from megatron_cpt.errors import DataError
from megatron_cpt.files import read_json, write_json
from megatron_cpt.log import Progress

_CONDITION = re.compile(r"(?P<field>[^=!<>^~]+)(?P<sign>=|!=|>=|<=|>|<|\^=|!\^=|~=|!~=)(?P<value>.*)")


@dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """What is drawn."""

    number: int | None = None
    """Documents drawn at random, per score bucket where there are buckets; None: all that fit."""
    conditions: tuple[Callable[[dict[str, Any]], bool], ...] = ()
    """All must hold."""
    score: str | None = None
    """Field whose value chooses the bucket."""
    edges: tuple[float, ...] = ()
    """Ascending bounds of the buckets: [edge 0, edge 1), [edge 1, edge 2), ...; outside of them nothing is drawn."""
    seed: int = 42
    """Another seed draws others."""
    is_compressed: bool = False
    """Write .zst."""


def parse_condition(text: str) -> Callable[[dict[str, Any]], bool]:
    """Return a test of a record from `lang=ja`, `lang!=ja`, `score>=3.5`, `id^=translation_` (starts with), `id!^=x`,
    `id~=^en-[0-9]+$` (a regular expression is found in it), `id!~=x`.

    A dotted field (`meta.lang`) is looked up in objects. A record without the field fails, except for the negations.

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
        return lambda record: (_text(_field(record, field)) == value) == (sign == "=")
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


def sample(
    sources: Sequence[Source], output: Path, reading: Reading, options: SampleOptions
) -> dict[str, dict[str, int]]:
    """Write the drawn documents, in their order, below `output` (and a folder per bucket); return counts per bucket.

    Raises: DataError for bad lines, clashing outputs, or fewer documents than asked for.
    """
    names = _bucket_names(options)
    counts = {name: {"found": 0, "drawn": 0} for name in names}
    bounds = None if options.number is None else _bounds(sources, reading, options, names)
    targets = {name: output_paths(sources, output / name, options.is_compressed) for name in names}
    progress = Progress("sampling", sum(source.size for source in sources) / 1e6, "MB")
    for number, source in enumerate(sources):
        with contextlib.ExitStack() as files:
            writers = {name: files.enter_context(record_writer(targets[name][number])) for name in names}
            for name, record, draw in _drawable(source, reading, options):
                counts[name]["found"] += 1
                if bounds is None or bounds[name].takes(draw):
                    writers[name](record.raw)
                    counts[name]["drawn"] += 1
        progress.add(source.size / 1e6)
    return counts


def split_validation(
    corpora: Mapping[str, Sequence[Source]],
    output: Path,
    reading: Reading,
    *,
    name: str,
    fraction: Fraction,
    is_compressed: bool = False,
) -> dict[str, dict[str, int]]:
    """Write each corpus's documents below `output/<corpus>/train/` and `output/<corpus>/<name>/`; return the counts.

    `output/<name>.json` records name and fraction; the next call on more data must state the same.

    Raises: DataError when the set of this name was made with another fraction, for bad lines and clashing outputs.
    """
    record_path = output / f"{name}.json"
    stated = {"name": name, "fraction": str(fraction)}
    if record_path.exists() and read_json(record_path, DataError) != stated:
        raise DataError(
            f"{record_path}: the set {name} was made with the fraction {read_json(record_path)['fraction']}, not "
            f"{fraction}. Documents would change sides. Use that fraction, or another name."
        )
    write_json(record_path, stated)
    bound = int(fraction * (1 << 128))
    counts = {}
    for corpus, sources in corpora.items():
        row = counts[corpus] = {"train": 0, name: 0}
        sides = {side: output_paths(sources, output / corpus / side, is_compressed) for side in row}
        for number, source in enumerate(sources):
            with record_writer(sides["train"][number]) as train, record_writer(sides[name][number]) as held_out:
                for record in read_records(source, reading):
                    is_held_out = _draw(record, reading, name) < bound
                    (held_out if is_held_out else train)(record.raw)
                    row[name if is_held_out else "train"] += 1
    return counts


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


def _drawable(source: Source, reading: Reading, options: SampleOptions) -> Iterator[tuple[str, Record, int]]:
    """Yield (bucket, record, draw) of each record that the conditions let through and a bucket takes."""
    for record in read_records(source, reading):
        if all(holds(record.value) for holds in options.conditions):
            name = _bucket(record.value, options)
            if name is not None:
                yield name, record, _draw(record, reading, options.seed)


def _draw(record: Record, reading: Reading, salt: object) -> int:
    """Return the document's number in [0, 2^128)."""
    value = record.value.get(reading.key, record.value.get("text", ""))
    digest = hashlib.blake2b(
        text_of(value).encode("utf-8", "surrogatepass"), digest_size=16, key=str(salt).encode()[:64]
    )
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
    pairs = zip(options.edges[:-1], options.edges[1:], strict=True)
    return [f"{options.score}_{low:g}_{high:g}" for low, high in pairs]


def _bucket(record: dict[str, Any], options: SampleOptions) -> str | None:
    if options.score is None:
        return ""
    number = _number(_field(record, options.score))
    if number is None:
        return None
    for low, high in zip(options.edges[:-1], options.edges[1:], strict=True):
        if low <= number < high:
            return f"{options.score}_{low:g}_{high:g}"
    return None


def field_text(record: dict[str, Any], name: str) -> str:
    """Return a record's field as text, that of a dotted name in its objects; empty where there is none."""
    return _text(_field(record, name))


def _field(record: dict[str, Any], name: str) -> Any:
    value: Any = record
    for part in [name] if name in record else name.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _text(value: Any) -> str:
    return "" if value is None else value if isinstance(value, str) else str(value)


def _number(value: Any) -> float | None:
    try:
        return None if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return None
