"""Pieces of sources: cut files into byte ranges, and streams (compressed, Parquet, Arrow) into blocks of whole lines.

A piece is the unit of work of one worker, about `piece_bytes` of text. A byte range owns the lines whose first byte
lies in it, so ranges need no look at the file beforehand. A compressed or columnar file cannot be entered in the
middle: one thread reads it ahead and hands out its blocks through anonymous memory files, so that every worker has a
share of one big file, and no copy of it touches the disk.
"""

import io
import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_cpt.data.reading.documents import Source
from megatron_cpt.data.reading.json_values import ValueSplitter
from megatron_cpt.data.reading.plain_reader import PlainReader
from megatron_cpt.data.reading.records import (
    DAMAGED,
    TOO_LONG,
    UNREADABLE,
    Parsed,
    Problem,
    parse_lines,
    parse_text_file,
    parse_values,
)
from megatron_cpt.data.reading.tables import columns_of_block, table_blocks
from megatron_cpt.errors import DataError

PIECE_BYTES = 8 << 20
MAX_DOCUMENT_BYTES = 256 << 20
_READ_BYTES = 1 << 20
_EDGE_BYTES = 1 << 14
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A part of one source that can be parsed on its own."""

    source: int
    """Number of the source within its list."""
    format: str
    path: str
    start: int
    end: int
    is_range: bool
    """Whether lines must be searched at the edges (byte ranges) or the bytes are whole lines already (blocks)."""
    is_start: bool = True
    is_end: bool = True
    problem: Problem | None = None
    """The error that ended or interrupted the stream after this block."""
    descriptor: int | None = None
    """Memory file behind `path`, to be closed when the piece is done."""
    disk_bytes: int = 0
    """Share of the source's size on disk, for progress."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How documents lie in their files."""

    keys: tuple[str, ...] = ("text",)
    """Fields of a JSON object, or columns of a table, that hold text."""
    txt_documents: str = "line"
    """Whether a .txt file holds a document per `line` or is one document (`file`)."""
    max_document_bytes: int = MAX_DOCUMENT_BYTES
    """A longer line is a problem instead of a document; it is never held in memory."""


def pieces_of(source: Source, number: int, layout: Layout, piece_bytes: int = PIECE_BYTES) -> Iterator[Piece]:
    """Yield the pieces of a source in order; `number` becomes their `source`."""
    if source.problem:
        damage = Problem(0, UNREADABLE, source.problem)
        yield _in_memory((b"", True, True, damage), source, number, "jsonl")
    elif source.is_splittable and not (source.format == "txt" and layout.txt_documents == "file"):
        for start in range(0, max(source.size, 1), piece_bytes):
            end = min(start + piece_bytes, source.size)
            yield Piece(
                source=number,
                format=source.format,
                path=str(source.path),
                start=start,
                end=end,
                is_range=True,
                is_start=start == 0,
                is_end=end == source.size,
                disk_bytes=end - start,
            )
    elif source.format == "txt" and layout.txt_documents == "file":
        yield from _whole_text(source, number, layout)
    elif source.format in ("parquet", "arrow"):
        for block in table_blocks(source, layout.keys, piece_bytes):
            yield _in_memory(block, source, number)
    else:
        yield from _stream_pieces(source, number, layout, piece_bytes)


def parse_piece(piece: Piece, layout: Layout) -> Parsed:
    """Return the documents of a piece. Lines are counted from the piece's first line.

    Raises: DataError when its file is gone or shorter than it was.
    """
    data, is_end, problem = piece_bytes(piece, layout.max_document_bytes)
    if piece.format == "txt-file":
        parsed = parse_text_file(data, layout.keys) if data or problem is None else Parsed(layout.keys)
    elif piece.format == "table":
        parsed = parse_values(columns_of_block(data, layout.keys), layout.keys)
    else:
        parsed = parse_lines(
            data, piece.format, layout.keys, layout.max_document_bytes, is_start=piece.is_start, is_end=is_end
        )
    if problem:
        parsed.problems.append(Problem(parsed.num_lines, problem.kind, problem.detail, problem.raw))
        parsed.num_lines += 1
    parsed.problems.sort(key=lambda found: found.line)
    return parsed


def piece_bytes(piece: Piece, max_document_bytes: int) -> tuple[bytes, bool, Problem | None]:
    """Return the whole lines (or the Arrow stream) of a piece, whether the file ends there, and the problem after them.

    Raises: DataError when its file is gone or shorter than it was.
    """
    if not piece.is_range:
        return _read_at(piece.path, piece.start, piece.end - piece.start), piece.is_end, piece.problem
    data, is_end, is_too_long = read_range(piece, max_document_bytes)
    problem = Problem(0, TOO_LONG, f"over {max_document_bytes:,} bytes") if is_too_long else piece.problem
    return data, is_end, problem


def read_range(piece: Piece, max_document_bytes: int) -> tuple[bytes, bool, bool]:
    """Return the whole lines that start in a byte range, whether the file ends there, and whether one was too long.

    A line longer than the limit can only be the last of a range; it is left out. The edges are looked up first, so that
    the lines are read once, straight to their place.
    """
    with Path(piece.path).open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        if size < piece.end:
            raise _shorter(piece.path)
        start = _behind_newline(file, piece.start - 1, piece.end - 1) if piece.start else 0
        if start < 0:
            return b"", False, False
        limit = piece.end + max_document_bytes
        end = _behind_newline(file, piece.end - 1, limit) if piece.end else 0
        is_too_long = end < 0 and size > limit
        is_end = end < 0 or (end == piece.end and piece.is_end)
        if end < 0:
            end = piece.end if is_too_long else size
        file.seek(start)
        data = _read_exactly(file, end - start, piece.path)
    tail_start = data.rfind(b"\n", 0, max(len(data) - 1, 0)) + 1
    if is_too_long or len(data) - tail_start - data.endswith(b"\n") > max_document_bytes:
        return data[:tail_start], False, True
    return data, is_end, False


def _behind_newline(file: io.FileIO, start: int, end: int) -> int:
    """Return the position behind the first newline among the bytes `start` to `end`; -1 if there is none."""
    file.seek(start)
    size = _EDGE_BYTES
    while start < end and (data := file.read(min(size, end - start))):
        newline = data.find(b"\n")
        if newline >= 0:
            return start + newline + 1
        start, size = start + len(data), _READ_BYTES
    return -1


def stream_blocks(
    source: Source, piece_bytes: int, max_document_bytes: int
) -> Iterator[tuple[bytes, bool, Problem | None]]:
    """Yield (whole lines, whether the stream ends there, what is wrong after them) of a stream in order.

    The last block can lack its newline. A line over the limit is read past without being kept. Values of a JSON file
    that has no object per line come as lines.
    """
    if source.problem:
        yield b"", True, Problem(0, UNREADABLE, source.problem)
        return
    if source.format == "json":
        yield from _value_blocks(source, piece_bytes, max_document_bytes)
        return
    with PlainReader(source.path, source.compression, source.encoding) as stream:
        rest = b""
        while True:
            data, damage = stream.read_block(piece_bytes)
            if damage:
                whole, _, rest = (rest + data).rpartition(b"\n")
                yield (whole + b"\n" if whole else b""), True, Problem(0, DAMAGED, damage, rest or None)
                return
            if not data:
                yield rest, True, None
                return
            whole, newline, tail = data.rpartition(b"\n")
            if newline:
                yield rest + whole + newline, False, None
                rest = tail
            else:
                rest += data
            if len(rest) > max_document_bytes:
                rest = b""
                damage, rest, is_end = _skip_line(stream)
                yield b"", is_end, Problem(0, TOO_LONG, f"over {max_document_bytes:,} bytes")
                if damage:
                    yield b"", True, Problem(0, DAMAGED, damage, rest or None)
                if damage or is_end:
                    return


def _value_blocks(
    source: Source, piece_bytes: int, max_document_bytes: int
) -> Iterator[tuple[bytes, bool, Problem | None]]:
    """Yield the values of a JSON file as `stream_blocks` does lines; a byte-order mark stays at the start."""
    splitter = ValueSplitter(max_document_bytes)
    with PlainReader(source.path, source.compression, source.encoding) as stream:
        data, damage = stream.read_block(max(piece_bytes, len(_BOM) + 1))
        block = [_BOM] if data.startswith(_BOM) else []
        data = data.removeprefix(_BOM)
        while True:
            is_end = not data or damage is not None
            found = splitter.feed(data)
            for value in itertools.chain(found, splitter.finish()) if is_end and not damage else found:
                if isinstance(value, Problem):
                    yield b"".join(block), False, value
                    block = []
                else:
                    block += [value, b"\n"]
            if is_end:
                yield b"".join(block), True, Problem(0, DAMAGED, damage) if damage else None
                return
            yield b"".join(block), False, None
            block = []
            data, damage = stream.read_block(piece_bytes)


def _whole_text(source: Source, number: int, layout: Layout) -> Iterator[Piece]:
    limit = layout.max_document_bytes
    if source.compression is None and source.size <= limit:
        yield Piece(
            source=number,
            format="txt-file",
            path=str(source.path),
            start=0,
            end=source.size,
            is_range=False,
            disk_bytes=source.size,
        )
        return
    if source.compression is None:
        data = b""
        problem: Problem | None = Problem(0, TOO_LONG, f"over {limit:,} bytes")
    else:
        with PlainReader(source.path, source.compression, source.encoding) as stream:
            data, damage = stream.read_block(limit + 1)
        problem = Problem(0, DAMAGED, damage) if damage else None
        if len(data) > limit:
            problem = Problem(0, TOO_LONG, f"over {limit:,} bytes")
    yield _in_memory((b"" if problem else data, True, True, problem), source, number, "txt-file")


def _stream_pieces(source: Source, number: int, layout: Layout, piece_bytes: int) -> Iterator[Piece]:
    is_start = True
    format = "jsonl" if source.format == "json" else source.format
    for data, is_end, problem in stream_blocks(source, piece_bytes, layout.max_document_bytes):
        yield _in_memory((data, is_start, is_end, problem), source, number, format)
        is_start = False


def _in_memory(
    block: tuple[bytes, bool, bool, Problem | None], source: Source, number: int, format: str = "table"
) -> Piece:
    data, is_start, is_end, problem = block
    descriptor = os.memfd_create("block of documents")
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
    return Piece(
        source=number,
        format=format,
        path=f"/proc/{os.getpid()}/fd/{descriptor}",
        start=0,
        end=len(data),
        is_range=False,
        is_start=is_start,
        is_end=is_end,
        problem=problem,
        descriptor=descriptor,
        disk_bytes=source.size if is_end else 0,
    )


def _skip_line(stream: PlainReader) -> tuple[str | None, bytes, bool]:
    """Read past the next newline; return (damage, what was read after it, whether the stream ended before)."""
    while True:
        data, damage = stream.read_block(_READ_BYTES)
        newline = data.find(b"\n")
        if newline >= 0:
            return damage, data[newline + 1 :], False
        if damage or not data:
            return damage, b"", not data


def _read_at(path: str, start: int, size: int) -> bytes:
    with Path(path).open("rb", buffering=0) as file:
        file.seek(start)
        return _read_exactly(file, size, path)


def _read_exactly(file: io.FileIO, size: int, path: str) -> bytes:
    data = file.read(size) or b""
    while len(data) < size:
        more = file.read(size - len(data))
        if not more:
            raise _shorter(path)
        data += more
    return data


def _shorter(path: str) -> DataError:
    return DataError(f"{path}: is shorter than when it was listed. Files must not change while they are read.")
