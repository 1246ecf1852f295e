"""Whole records of document files, read and written in order: what cleaning keeps goes through byte for byte.

Lines of `.jsonl` and `.txt` pass unchanged; rows of Parquet and Arrow files become JSON lines. A bad line stops the
work with its file and line (`data validate` lists them all, `data repair` rewrites the file) unless it is to be skipped.
"""

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from megatron_cpt.data.documents import Source, plain_name
from megatron_cpt.data.records import DAMAGED, line_problem, object_of_line
from megatron_cpt.data.streams import MAX_DOCUMENT_BYTES, PIECE_BYTES, stream_blocks
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


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How records are read."""

    key: str = "text"
    """Field that holds the text, or a list of chat messages."""
    skip_bad_lines: bool = False


def read_records(source: Source, reading: Reading, skipped: Callable[[int], None] | None = None) -> Iterator[Record]:
    """Yield the records of a source in order; blank lines hold none. `skipped` is told the line of each bad one.

    Raises: DataError naming file and line of the first bad line, unless bad lines are skipped.
    """
    rows = _table_rows(source) if source.format in ("parquet", "arrow") else _lines(source)
    for line, raw in rows:
        try:
            yield Record(line, raw, _value(raw, source.format, reading.key))
        except ValueError as problem:
            if not reading.skip_bad_lines:
                raise DataError(
                    f"{source.path}:{line}: {problem}. A document is needed. Repair the file with "
                    "`megatron-cpt data repair`, or skip bad lines with --skip-bad-lines."
                ) from None
            if skipped is not None:
                skipped(line)


def text_of(value: Any) -> str:
    """Return a field's text: itself, or the contents of chat messages, a line each."""
    if isinstance(value, str):
        return value
    return "\n".join(str(message.get("content", message.get("value", ""))) for message in value)


def prompt_of(value: Any) -> str:
    """Return what comes before the first answer of a chat, roles included; a text as it is."""
    if isinstance(value, str):
        return value
    turns = []
    for message in value:
        role = message.get("role", message.get("from", ""))
        if role in ("assistant", "gpt"):
            break
        turns.append(f"{role}: {' '.join(str(message.get('content', message.get('value', ''))).split())}")
    return "\n".join(turns)


def output_path(source: Source, output: Path, is_compressed: bool) -> Path:
    """Return where the kept records of a source go: the tree of the input, mirrored."""
    suffix = ".txt" if source.format == "txt" else ".jsonl"
    name = plain_name(source.relative.name) + suffix + (".zst" if is_compressed else "")
    return output / source.relative.parent / name


def output_paths(sources: Sequence[Source], output: Path, is_compressed: bool) -> list[Path]:
    """Return each source's output; two sources never share one.

    Raises: DataError when names of two sources clash, or an output is one of the inputs.
    """
    paths = [output_path(source, output, is_compressed) for source in sources]
    owners: dict[Path, Source] = {}
    for path, source in zip(paths, sources, strict=True):
        if path in owners:
            raise DataError(f"{path}: both {owners[path].path} and {source.path} go there. Give them separate outputs.")
        owners[path] = source
        if path.absolute() in {other.path.absolute() for other in sources}:
            raise DataError(f"{path}: is an input as well as an output. Choose another output folder.")
    return paths


@contextlib.contextmanager
def record_writer(path: Path) -> Iterator[Callable[[bytes], object]]:
    """Yield a function that writes one line; the file (zstd where it ends in .zst) appears when it is whole."""
    with whole_file(path, "wb") as file:
        if path.suffix != ".zst":
            yield lambda raw: file.write(raw + b"\n")
            return
        import zstandard  # compiled; only where .zst is written

        with zstandard.ZstdCompressor(level=3).stream_writer(file, closefd=False) as stream:
            yield lambda raw: stream.write(raw + b"\n")


def _lines(source: Source) -> Iterator[tuple[int, bytes]]:
    number = 0
    for block, _, problem in stream_blocks(source, PIECE_BYTES, MAX_DOCUMENT_BYTES):
        lines = block.split(b"\n")
        if lines and not lines[-1]:
            lines.pop()
        for raw in lines:
            number += 1
            raw = raw.removeprefix(_BOM) if number == 1 else raw
            if raw.strip():
                yield number, raw.removesuffix(b"\r")
        if problem is not None:
            what = "is damaged or ends early" if problem.kind == DAMAGED else problem.kind
            raise DataError(f"{source.path}:{number + 1}: {what} ({problem.detail}). Restore the file.")


def _value(raw: bytes, format: str, key: str) -> dict[str, Any]:
    """Return a line's fields. Raises: ValueError saying what is wrong."""
    if format == "txt":
        try:
            return {"text": raw.decode("utf-8")}
        except UnicodeDecodeError as problem:
            raise ValueError(f"invalid UTF-8 at byte {problem.start}") from None
    try:
        value = object_of_line(raw)
    except (ValueError, RecursionError):
        kind, detail = line_problem(raw)
        raise ValueError(f"{kind} ({detail})") from None
    if not isinstance(value, dict):
        raise ValueError(f"not an object but a {type(value).__name__}")
    if key not in value:
        raise ValueError(f"no key '{key}'; the keys are {', '.join(map(repr, list(value)[:8]))}")
    found = value[key]
    if not isinstance(found, str) and not (isinstance(found, list) and all(isinstance(turn, dict) for turn in found)):
        raise ValueError(f"'{key}' is neither a text nor chat messages but a {type(found).__name__}")
    return value


def _table_rows(source: Source) -> Iterator[tuple[int, bytes]]:
    import pyarrow as pa  # heavy; only where tables are read
    import pyarrow.parquet as pq

    number = 0
    try:
        for batch in _table_batches(source, pa, pq):
            for row in batch.to_pylist():
                number += 1
                yield number, _json_line(row)
    except (pa.ArrowException, OSError) as problem:
        found = " ".join(str(problem).split())[:300]
        raise DataError(f"{source.path}: is damaged ({found}). Restore the file.") from None


def _table_batches(source: Source, pa: Any, pq: Any) -> Iterator[Any]:
    if source.format == "parquet":
        with pq.ParquetFile(source.path) as file:
            yield from file.iter_batches(batch_size=1024)
        return
    with pa.memory_map(str(source.path)) as mapped:
        try:
            yield from pa.ipc.open_stream(mapped)
        except pa.ArrowInvalid:
            mapped.seek(0)
            file = pa.ipc.open_file(mapped)
            yield from (file.get_batch(index) for index in range(file.num_record_batches))


def _json_line(row: dict[str, Any]) -> bytes:
    try:
        return orjson.dumps(row)
    except TypeError:
        return json.dumps(row, ensure_ascii=False, default=str).encode()
