"""Whole records of document files, read and written in order: cleaning copies kept records byte for byte.

Lines of `.jsonl` and `.txt` pass unchanged; rows of Parquet and Arrow files become JSON lines. A bad line stops the
work with its file and line (`data validate` lists them all, `data repair` rewrites the file) unless it is to be skipped:
then it is counted and handed to the caller for a reject file. Lines = documents + blank lines + rejects, always.
"""

import base64
import contextlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from megatron_cpt.data.reading import records
from megatron_cpt.data.reading.byproducts import rejects_beside
from megatron_cpt.data.reading.documents import Source, plain_name
from megatron_cpt.data.reading.records import Problem, line_problem, object_of_line, value_problem
from megatron_cpt.data.reading.streams import MAX_DOCUMENT_BYTES, PIECE_BYTES, stream_blocks
from megatron_cpt.data.reading.tables import read_batches, table_writer
from megatron_cpt.errors import DataError
from megatron_cpt.files import whole_file

_BOM = b"\xef\xbb\xbf"


@dataclass(slots=True)
class Record:
    """One document with all its fields."""

    line: int
    """Line or row in its file, from 1."""
    raw: bytes
    """The line without its newline."""
    value: dict[str, Any]
    """Its fields; a line of a .txt file has `text`."""
    row: dict[str, Any] | None = None
    """The row of a table as read; `raw` is its JSON."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How records are read."""

    key: str = "text"
    """Field that holds the text, or a list of chat messages."""
    skip_bad_lines: bool = False

    def value(self, record: Record) -> Any:
        """Return a record's text or chat messages; a line of a .txt file has a text for any key."""
        return record.value[self.key] if self.key in record.value else record.value["text"]


@dataclass
class Tally:
    """Counts of the lines of some files."""

    lines: int = 0
    documents: int = 0
    blank_lines: int = 0
    rejects: Counter[str] = field(default_factory=Counter)
    """Skipped bad lines, by problem."""

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(
            self.lines + other.lines,
            self.documents + other.documents,
            self.blank_lines + other.blank_lines,
            self.rejects + other.rejects,
        )

    def record(self) -> dict[str, Any]:
        """Return the counts for a report."""
        rejects = dict(sorted(self.rejects.items()))
        return {"lines": self.lines, "documents": self.documents, "blank_lines": self.blank_lines, "rejects": rejects}

    @staticmethod
    def of_record(record: dict[str, Any]) -> "Tally":
        """Return what `record` was made of."""
        return Tally(record["lines"], record["documents"], record["blank_lines"], Counter(record["rejects"]))


def read_records(
    source: Source,
    reading: Reading,
    tally: Tally | None = None,
    reject: Callable[[dict[str, Any]], Any] | None = None,
) -> Iterator[Record]:
    """Yield the records of a source in order; blank lines hold none. Lines are counted in `tally`.

    `reject` is given the entry of a reject file for each bad line that is skipped.

    Raises: DataError naming file and line of the first bad line, unless bad lines are skipped.
    """
    tally = tally or Tally()
    rows = _table_rows(source) if source.format in ("parquet", "arrow") else _lines(source)
    for line, raw, problem, row in rows:
        tally.lines += 1
        if problem is None and not raw.strip():
            tally.blank_lines += 1
            continue
        value = problem or _value(raw, source.format, reading.key)
        if not isinstance(value, Problem):
            tally.documents += 1
            yield Record(line, raw, value, row)
            continue
        if not reading.skip_bad_lines:
            detail = f" ({value.detail})" if value.detail else ""
            raise DataError(
                f"{source.path}:{line}: {value.kind}{detail}. A document is needed. Repair the file with "
                "`megatron-cpt data repair`, or skip bad lines with --on-bad-line skip."
            )
        tally.rejects[value.kind] += 1
        if reject is not None:
            reject(value.record(str(source.path.absolute()), line))


def text_of(value: Any) -> str:
    """Return a field's text: itself, or the contents of chat messages, a line each."""
    if isinstance(value, str):
        return value
    return "\n".join(_content(message) for message in value)


def prompt_of(value: Any) -> str:
    """Return the part of a chat before the first answer, including roles; a text unchanged."""
    if isinstance(value, str):
        return value
    turns = []
    for message in value:
        role = _first(message, "role", "from")
        if role in ("assistant", "gpt"):
            break
        turns.append(f"{role}: {' '.join(_content(message).split())}")
    return "\n".join(turns)


def output_path(source: Source, output: Path, is_compressed: bool, keeps_tables: bool = False) -> Path:
    """Return where the kept records of a source go: the tree of the input, mirrored; `keeps_tables`: Parquet from tables."""
    if keeps_tables and source.format in ("parquet", "arrow"):
        return output / source.relative.parent / f"{plain_name(source.relative.name)}.parquet"
    suffix = ".txt" if source.format == "txt" else ".jsonl"
    name = plain_name(source.relative.name) + suffix + (".zst" if is_compressed else "")
    return output / source.relative.parent / name


def output_paths(
    sources: Sequence[Source],
    output: Path,
    is_compressed: bool,
    inputs: Sequence[Source] = (),
    keeps_tables: bool = False,
) -> list[Path]:
    """Return each source's output; two sources never share one. `inputs` are all that is read, if more than `sources`.

    Raises: DataError when names of two sources clash, or an output is one of the inputs.
    """
    paths = [output_path(source, output, is_compressed, keeps_tables) for source in sources]
    read = {source.path.absolute() for source in inputs or sources}
    owners: dict[Path, Source] = {}
    for path, source in zip(paths, sources, strict=True):
        if path in owners:
            raise DataError(f"{path}: both {owners[path].path} and {source.path} go there. Give them separate outputs.")
        owners[path] = source
        if path.absolute() in read:
            raise DataError(f"{path}: is an input as well as an output. Choose another output folder.")
    return paths


@contextlib.contextmanager
def reject_writer(target: Path) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Yield a function that writes an entry of the reject file next to `target`; without entries there is no such
    file."""
    path = rejects_beside(target)
    with contextlib.ExitStack() as stack:
        file = None

        def write(entry: dict[str, Any]) -> None:
            nonlocal file
            file = file or stack.enter_context(whole_file(path))
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")

        yield write
        if file is None:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def record_writer(path: Path, source: Source) -> Iterator[Callable[[Record], object]]:
    """Yield a function that writes a record of `source`; the file appears when it is whole.

    A line each, zstd where the name ends in .zst; rows under the schema of `source` where it ends in .parquet.
    """
    with whole_file(path, "wb") as file:
        if path.suffix == ".parquet":
            with table_writer(file, source) as write:
                yield lambda record: write(record.row or {})
            return
        if path.suffix != ".zst":
            yield lambda record: file.write(record.raw + b"\n")
            return
        import zstandard  # compiled; only where .zst is written

        with zstandard.ZstdCompressor(level=3).stream_writer(file, closefd=False) as stream:
            yield lambda record: stream.write(record.raw + b"\n")


def json_line(row: dict[str, Any]) -> bytes:
    """Return a row of a table as a JSON line: bytes in base64, what JSON has no form for (dates, decimals) as text."""
    try:
        return orjson.dumps(row, default=_plain)
    except TypeError:
        return json.dumps(row, ensure_ascii=False, default=_plain).encode()


def _plain(value: Any) -> str:
    return base64.b64encode(value).decode() if isinstance(value, bytes) else str(value)


def _first(message: dict[str, Any], *keys: str) -> Any:
    """Return the first field that is there; a table has every column in every row, null where a record has none."""
    return next((message[key] for key in keys if message.get(key) is not None), "")


def _content(message: dict[str, Any]) -> str:
    found = _first(message, "content", "value")
    if isinstance(found, list):
        return "".join(part["text"] for part in found if isinstance(part, dict) and isinstance(part.get("text"), str))
    return found if isinstance(found, str) else str(found)


_Line = tuple[int, bytes, Problem | None, dict[str, Any] | None]


def _lines(source: Source) -> Iterator[_Line]:
    number = 0
    for block, _, problem in stream_blocks(source, PIECE_BYTES, MAX_DOCUMENT_BYTES):
        lines = (block if number else block.removeprefix(_BOM)).split(b"\n")
        if not lines[-1]:
            lines.pop()
        for raw in lines:
            number += 1
            if len(raw) > MAX_DOCUMENT_BYTES:
                yield number, b"", Problem(0, records.TOO_LONG, f"{len(raw):,} bytes"), None
            else:
                yield number, raw.removesuffix(b"\r"), None, None
        if problem is not None:
            number += 1
            yield number, b"", problem, None


def _value(raw: bytes, format: str, key: str) -> dict[str, Any] | Problem:
    """Return a line's fields, or what is wrong with it."""
    if format == "txt":
        try:
            return {"text": raw.decode("utf-8")}
        except UnicodeDecodeError as problem:
            return Problem(0, records.INVALID_UTF8, f"byte {problem.start}", raw)
    try:
        value = object_of_line(raw)
    except (ValueError, RecursionError):
        kind, detail = line_problem(raw)
        return Problem(0, kind, detail, raw)
    if not isinstance(value, dict):
        return Problem(0, records.NOT_AN_OBJECT, f"a {type(value).__name__}", raw)
    if key not in value:
        keys = ", ".join(map(repr, list(value)[:8]))
        return Problem(0, records.MISSING_KEY, f"no {key!r}; the keys are {keys}", raw)
    found = value[key]
    if isinstance(found, list) and all(isinstance(turn, dict) for turn in found):
        found = text_of(found)
    if kind_of_value := value_problem(found):
        what = f"{key!r} is neither a text nor chat messages but a {type(found).__name__}"
        return Problem(0, kind_of_value, what if kind_of_value == records.NOT_TEXT else repr(key), raw)
    return value


def _table_rows(source: Source) -> Iterator[_Line]:
    import pyarrow as pa  # heavy; only where tables are read

    number = 0
    if source.problem:
        yield 1, b"", Problem(0, records.UNREADABLE, source.problem), None
        return
    try:
        for batch in read_batches(source, None, PIECE_BYTES):
            for row in batch.to_pylist():
                number += 1
                yield number, json_line(row), None, row
    except (pa.ArrowException, OSError) as problem:
        yield number + 1, b"", Problem(0, records.DAMAGED, " ".join(str(problem).split())[:300]), None
