"""Pieces of sources: cut files into byte ranges, and streams (compressed, Parquet, Arrow) into blocks of whole lines.

A piece is what one worker parses at a time, about `piece_bytes` of text. A byte range owns the lines whose first byte
lies in it, so ranges need no look at the file beforehand. A compressed or columnar file cannot be entered in the
middle: one thread reads it ahead and hands out its blocks through anonymous memory files, so that every worker has a
share of one big file, and no copy of it touches the disk.
"""

import bz2
import lzma
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from megatron_cpt.data.documents import Source
from megatron_cpt.data.records import DAMAGED, TOO_LONG, Parsed, Problem, parse_lines, parse_text_file, parse_values
from megatron_cpt.errors import DataError

PIECE_BYTES = 8 << 20
MAX_DOCUMENT_BYTES = 256 << 20
_READ_BYTES = 1 << 20
_COMPRESSED_READ_BYTES = 1 << 16
"""Little, because a megabyte may come out of a kilobyte."""


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
    """What ended or interrupted the stream after this block."""
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
    """Yield the pieces of a source in order; `number` is what their `source` says."""
    if source.is_splittable and not (source.format == "txt" and layout.txt_documents == "file"):
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
        for block in _table_blocks(source, layout, piece_bytes):
            yield _in_memory(block, source, number)
    else:
        yield from _stream_pieces(source, number, layout, piece_bytes)


def parse_piece(piece: Piece, layout: Layout) -> Parsed:
    """Return the documents of a piece. Lines are counted from the piece's first line.

    Raises: DataError when its file is gone or shorter than it was.
    """
    problem = piece.problem
    if piece.is_range:
        data, is_end, is_too_long = read_range(piece, layout.max_document_bytes)
        if is_too_long:
            problem = Problem(0, TOO_LONG, f"over {layout.max_document_bytes:,} bytes")
    else:
        data, is_end = _read_at(piece.path, piece.start, piece.end - piece.start), piece.is_end
    if piece.format == "txt-file":
        parsed = parse_text_file(data, layout.keys) if data or problem is None else Parsed(layout.keys)
    elif piece.format == "table":
        parsed = parse_values(_columns(data, layout.keys, piece.path), layout.keys)
    else:
        parsed = parse_lines(
            data, piece.format, layout.keys, layout.max_document_bytes, is_start=piece.is_start, is_end=is_end
        )
    if problem:
        parsed.problems.append(Problem(parsed.num_lines, problem.kind, problem.detail, problem.raw))
        parsed.num_lines += 1
    parsed.problems.sort(key=lambda found: found.line)
    return parsed


def read_range(piece: Piece, max_document_bytes: int) -> tuple[bytes, bool, bool]:
    """Return the whole lines that start in a byte range, whether the file ends there, and whether one was too long.

    A line longer than the limit can only be the last of a range; it is left out.
    """
    with Path(piece.path).open("rb", buffering=0) as file:
        lead = 1 if piece.start else 0
        file.seek(piece.start - lead)
        data = _read_exactly(file, piece.end - piece.start + lead, piece.path)
        if lead:
            first = data.find(b"\n", 0, len(data) - 1)
            if first < 0:
                return b"", False, False
            data = data[first + 1 :]
        if not data or data.endswith(b"\n"):
            return data, piece.is_end, False
        tail_start = data.rfind(b"\n") + 1
        parts, length = [data], len(data) - tail_start
        while more := file.read(_READ_BYTES):
            newline = more.find(b"\n")
            if newline >= 0:
                parts.append(more[: newline + 1])
                length += newline
                break
            length += len(more)
            if length > max_document_bytes:
                break
            parts.append(more)
        is_end = not more
        if length > max_document_bytes:
            return data[:tail_start], False, True
        return b"".join(parts), is_end, False


def open_decompressed(source: Source) -> "PlainReader":
    """Open a source for reading its plain bytes."""
    return PlainReader(source.path, source.compression)


def stream_blocks(
    source: Source, piece_bytes: int, max_document_bytes: int
) -> Iterator[tuple[bytes, bool, Problem | None]]:
    """Yield (whole lines, whether the stream ends there, what is wrong after them) of a stream in order.

    The last block may lack its newline. A line over the limit is read past without being kept.
    """
    with open_decompressed(source) as stream:
        rest = b""
        while True:
            data, damage = _read_block(stream, piece_bytes)
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


class _Reader(Protocol):
    def read(self, size: int, /) -> bytes | None: ...


class PlainReader:
    """Reads a plain or compressed file, all its members one after the other.

    Everything before a damage is handed out first; then, and where a member ends early (which the libraries' own
    readers may pass over or punish with the loss of what came before), `read` raises OSError.
    """

    def __init__(self, path: Path, compression: str | None):
        self._new_member = _MEMBERS[compression]
        self._padding = b"\x00" if compression in ("gz", "xz") else b""
        self._file = path.open("rb", buffering=0)
        self._member: Any = None
        self._pending = b""

    def __enter__(self) -> "PlainReader":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read(self, size: int) -> bytes:
        """Return some bytes, about `size` at most, or b"" at the end."""
        if self._new_member is None:
            return self._file.read(size) or b""
        while True:
            data = self._pending or self._file.read(_COMPRESSED_READ_BYTES) or b""
            self._pending = b""
            if self._member is None:
                data = data.lstrip(self._padding) if self._padding else data
                if not data and self._file.tell() == os.fstat(self._file.fileno()).st_size:
                    return b""
                self._member = self._new_member() if data else None
                if not data:
                    continue
            elif not data:
                raise EOFError("the file ends within a compressed member")
            plain = self._decompress(data)
            if plain:
                return plain

    def _decompress(self, data: bytes) -> bytes:
        try:
            plain = self._member.decompress(data)
        except Exception as problem:  # each library has its own error, zstandard's is known only once imported
            raise OSError(str(problem)) from None
        if self._member.eof:
            self._pending, self._member = self._member.unused_data, None
        return plain


def _new_zstd_member() -> Any:
    import zstandard  # compiled; only where a .zst file is read

    return zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()


_MEMBERS: dict[str | None, Callable[[], Any] | None] = {
    None: None,
    "gz": lambda: zlib.decompressobj(wbits=31),
    "xz": lzma.LZMADecompressor,
    "bz2": bz2.BZ2Decompressor,
    "zst": _new_zstd_member,
}


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
        data, problem = b"", Problem(0, TOO_LONG, f"over {limit:,} bytes")
    else:
        with open_decompressed(source) as stream:
            data, damage = _read_block(stream, limit + 1)
        problem = Problem(0, DAMAGED, damage) if damage else None
        if len(data) > limit:
            problem = Problem(0, TOO_LONG, f"over {limit:,} bytes")
    yield _in_memory((b"" if problem else data, True, True, problem), source, number, "txt-file")


def _stream_pieces(source: Source, number: int, layout: Layout, piece_bytes: int) -> Iterator[Piece]:
    is_start = True
    for data, is_end, problem in stream_blocks(source, piece_bytes, layout.max_document_bytes):
        yield _in_memory((data, is_start, is_end, problem), source, number, source.format)
        is_start = False


def _in_memory(
    block: tuple[bytes, bool, bool, Problem | None], source: Source, number: int, format: str = "table"
) -> Piece:
    data, is_start, is_end, problem = block
    descriptor = os.memfd_create(source.path.name[:200])
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


def _table_blocks(
    source: Source, layout: Layout, piece_bytes: int
) -> Iterator[tuple[bytes, bool, bool, Problem | None]]:
    """Yield Arrow IPC streams of about `piece_bytes` with the text columns of a Parquet or Arrow file."""
    import pyarrow as pa  # heavy; only where tables are read

    try:
        for batch in _batches(source, layout.keys, piece_bytes):
            rows = max(1, int(batch.num_rows * piece_bytes / max(batch.nbytes, 1)))
            for start in range(0, batch.num_rows, rows):
                sink = pa.BufferOutputStream()
                with pa.ipc.new_stream(sink, batch.schema) as writer:
                    writer.write_batch(batch.slice(start, rows))
                yield sink.getvalue().to_pybytes(), False, False, None
    except (pa.ArrowException, OSError) as problem:
        yield b"", False, True, Problem(0, DAMAGED, " ".join(str(problem).split())[:300])


def _batches(source: Source, keys: Sequence[str], piece_bytes: int) -> Iterator[Any]:
    import pyarrow as pa  # heavy; only where tables are read

    if source.format == "parquet":
        import pyarrow.parquet as pq

        with pq.ParquetFile(source.path, memory_map=False, pre_buffer=False) as file:
            _check_columns(source, file.schema_arrow.names, keys)
            rows = _rows_per_batch(file.metadata, keys, piece_bytes)
            yield from file.iter_batches(batch_size=rows, columns=list(keys), use_threads=False)
        return
    with pa.memory_map(str(source.path)) as mapped:
        try:
            reader: Any = pa.ipc.open_stream(mapped)
        except pa.ArrowInvalid:
            mapped.seek(0)
            file = pa.ipc.open_file(mapped)
            reader = (file.get_batch(i) for i in range(file.num_record_batches))
            _check_columns(source, file.schema.names, keys)
        else:
            _check_columns(source, reader.schema.names, keys)
        for batch in reader:
            yield batch.select(list(keys))


def _rows_per_batch(metadata: Any, keys: Sequence[str], piece_bytes: int) -> int:
    """Return how many rows hold about `piece_bytes` of text, so that a file of long documents stays within memory."""
    text_bytes = 0
    for group in range(metadata.num_row_groups):
        for column in range(metadata.num_columns):
            chunk = metadata.row_group(group).column(column)
            if chunk.path_in_schema in keys:
                text_bytes += chunk.total_uncompressed_size
    return min(max(int(piece_bytes * metadata.num_rows / max(text_bytes, 1)), 1), 65536)


def _check_columns(source: Source, names: Sequence[str], keys: Sequence[str]) -> None:
    for key in keys:
        if key not in names:
            raise DataError(
                f"{source.path}: has no column {key!r}; its columns are {', '.join(names)}. "
                "Name the column that holds the text with --json-keys."
            )


def _columns(data: bytes, keys: Sequence[str], path: str) -> list[list[Any]]:
    import pyarrow as pa  # heavy; only where tables are read

    if not data:
        return [[] for _ in keys]
    table = pa.ipc.open_stream(pa.py_buffer(data)).read_all()
    return [table.column(key).to_pylist() for key in keys]


def _read_block(stream: PlainReader, size: int) -> tuple[bytes, str | None]:
    """Return up to `size` plain bytes and, when the stream is damaged after them, how."""
    parts, length = [], 0
    try:
        while length < size and (data := stream.read(min(_READ_BYTES, size - length))):
            parts.append(data)
            length += len(data)
    except (EOFError, OSError) as problem:
        return b"".join(parts), str(problem)
    return b"".join(parts), None


def _skip_line(stream: PlainReader) -> tuple[str | None, bytes, bool]:
    """Read past the next newline; return (damage, what was read after it, whether the stream ended before)."""
    while True:
        data, damage = _read_block(stream, _READ_BYTES)
        newline = data.find(b"\n")
        if newline >= 0:
            return damage, data[newline + 1 :], False
        if damage or not data:
            return damage, b"", not data


def _read_at(path: str, start: int, size: int) -> bytes:
    with Path(path).open("rb", buffering=0) as file:
        file.seek(start)
        return _read_exactly(file, size, path)


def _read_exactly(file: _Reader, size: int, path: str) -> bytes:
    data = file.read(size)
    while len(data) < size:
        more = file.read(size - len(data))
        if not more:
            raise DataError(f"{path}: is shorter than when it was listed. Files must not change while they are read.")
        data += more
    return data
