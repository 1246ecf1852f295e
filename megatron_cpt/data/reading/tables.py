"""Parquet and Arrow files as blocks of texts: record batches travel as small Arrow IPC streams."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any

from megatron_cpt.data.reading.documents import Source
from megatron_cpt.data.reading.records import DAMAGED, Problem
from megatron_cpt.errors import DataError

_ROWS_WRITTEN = 4096


def table_blocks(
    source: Source, keys: Sequence[str], piece_bytes: int
) -> Iterator[tuple[bytes, bool, bool, Problem | None]]:
    """Yield (block, is start, is end, damage):  Arrow IPC streams of about `piece_bytes` with the text columns of a Parquet or Arrow file."""
    import pyarrow as pa  # heavy; only where tables are read

    try:
        for batch in read_batches(source, keys, piece_bytes):
            rows = max(1, int(batch.num_rows * piece_bytes / max(batch.nbytes, 1)))
            for start in range(0, batch.num_rows, rows):
                sink = pa.BufferOutputStream()
                with pa.ipc.new_stream(sink, batch.schema) as writer:
                    writer.write_batch(batch.slice(start, rows))
                yield sink.getvalue().to_pybytes(), False, False, None
    except (pa.ArrowException, OSError) as problem:
        yield b"", False, True, Problem(0, DAMAGED, " ".join(str(problem).split())[:300])


def read_batches(source: Source, keys: Sequence[str] | None, piece_bytes: int) -> Iterator[Any]:
    """Yield the record batches of a Parquet or Arrow file, of about `piece_bytes` where the file allows it.

    `keys` are the columns to read; None or none: all.

    Raises: DataError when a column is missing.
    """
    import pyarrow as pa  # heavy; only where tables are read

    if source.format == "parquet":
        import pyarrow.parquet as pq

        with pq.ParquetFile(source.path, memory_map=False, pre_buffer=False) as file:
            _check_columns(source, file.schema_arrow.names, keys)
            rows = _rows_per_batch(file.metadata, keys, piece_bytes)
            yield from file.iter_batches(batch_size=rows, columns=list(keys) if keys else None, use_threads=False)
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
            yield batch.select(list(keys)) if keys else batch


@contextlib.contextmanager
def table_writer(file: IO[bytes], source: Source) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Yield a function that writes a row to a Parquet file with the schema of a table; it has no rows where none is written."""
    import pyarrow.parquet as pq  # heavy; only where tables are written

    rows: list[dict[str, Any]] = []
    schema = _schema(source)
    with pq.ParquetWriter(file, schema, compression="zstd") as writer:

        def flush() -> None:
            writer.write_table(_table(rows, schema))
            rows.clear()

        def write(row: dict[str, Any]) -> None:
            rows.append(row)
            if len(rows) == _ROWS_WRITTEN:
                flush()

        yield write
        if rows:
            flush()


def _table(rows: Sequence[dict[str, Any]], schema: Any) -> Any:
    import pyarrow as pa  # heavy; only where tables are written

    return pa.Table.from_pylist(list(rows), schema=schema)


def _schema(source: Source) -> Any:
    """Return the schema of a Parquet or Arrow file; an empty one where it cannot be read, which its rows then tell."""
    import pyarrow as pa  # heavy; only where tables are read
    import pyarrow.parquet as pq

    try:
        if source.problem:
            return pa.schema([])
        if source.format == "parquet":
            return pq.read_schema(source.path)
        with pa.memory_map(str(source.path)) as mapped:
            try:
                return pa.ipc.open_stream(mapped).schema
            except pa.ArrowInvalid:
                mapped.seek(0)
                return pa.ipc.open_file(mapped).schema
    except (pa.ArrowException, OSError):
        return pa.schema([])


def _rows_per_batch(metadata: Any, keys: Sequence[str] | None, piece_bytes: int) -> int:
    """Return how many rows hold about `piece_bytes` of text, so that a file of long documents stays within memory."""
    text_bytes = 0
    for group in range(metadata.num_row_groups):
        for column in range(metadata.num_columns):
            chunk = metadata.row_group(group).column(column)
            if not keys or chunk.path_in_schema in keys:
                text_bytes += chunk.total_uncompressed_size
    return min(max(int(piece_bytes * metadata.num_rows / max(text_bytes, 1)), 1), 65536)


def _check_columns(source: Source, names: Sequence[str], keys: Sequence[str] | None) -> None:
    for key in keys or ():
        if key not in names:
            raise DataError(
                f"{source.path}: has no column {key!r}; its columns are {', '.join(names)}. "
                "Name the column that holds the text with --json-keys."
            )


def columns_of_block(data: bytes, keys: Sequence[str]) -> list[list[Any]]:
    """Return the texts of a block, one list per key."""
    import pyarrow as pa  # heavy; only where tables are read

    if not data:
        return [[] for _ in keys]
    table = pa.ipc.open_stream(pa.py_buffer(data)).read_all()
    return [table.column(key).to_pylist() for key in keys]


def rows_of_block(data: bytes) -> list[dict[str, Any]]:
    """Return the rows of a block with all their columns."""
    import pyarrow as pa  # heavy; only where tables are read

    return pa.ipc.open_stream(pa.py_buffer(data)).read_all().to_pylist() if data else []
