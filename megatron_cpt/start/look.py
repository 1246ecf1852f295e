"""A look at a corpus: how many tokens it has, estimated from pieces of a few files.

Of at most eight files, spread over the corpus by size, the first 256 KiB of text are tokenized. The fraction of a file
that was read is known by bytes for plain files and by rows for tables. For a compressed file it is estimated from the
compression of the piece, to within some 20 %.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_cpt.data.reading.documents import Source, list_sources
from megatron_cpt.data.reading.record_files import Reading, read_records, text_of
from megatron_cpt.data.tokenizer.interface import Tokenizer
from megatron_cpt.errors import DataError

MOST_FILES = 8
PIECE_BYTES = 256 << 10


@dataclass(frozen=True, kw_only=True)
class CorpusLook:
    """Facts found by sampling a corpus."""

    name: str
    patterns: tuple[str, ...]
    num_files: int
    num_bytes: int
    """Bytes of the files on disk."""
    documents: int
    """Estimated."""
    tokens: int
    """Estimated, an end-of-document token for each document included."""
    bytes_per_token: float
    """Bytes of text, UTF-8."""


def look_at(name: str, patterns: Sequence[str], tokenizer: Tokenizer) -> CorpusLook:
    """Return what a corpus of documents holds.

    Raises: DataError when a pattern matches nothing, a file holds no document, or the sample has no text.
    """
    sources = list_sources(patterns)
    part_bytes, tokens, text_bytes, documents = 0.0, 0, 0, 0
    for source in _spread(sources):
        seen = _sample(source, tokenizer)
        part_bytes += seen[0]
        tokens += seen[1]
        text_bytes += seen[2]
        documents += seen[3]
    if not tokens or not part_bytes:
        raise DataError(
            f"{name}: no text in {sources[0].path}. Records with their text under the key `text` are needed. Check the path, or "
            "rename the field that holds it."
        )
    total = sum(source.size for source in sources)
    return CorpusLook(
        name=name,
        patterns=tuple(patterns),
        num_files=len(sources),
        num_bytes=total,
        documents=round(documents / part_bytes * total),
        tokens=round(tokens / part_bytes * total),
        bytes_per_token=text_bytes / tokens,
    )


def _spread(sources: Sequence[Source]) -> list[Source]:
    """Return at most `MOST_FILES` of the files that hold something, those at even distances in the order of their size."""
    ordered = sorted((source for source in sources if source.size), key=lambda source: (source.size, str(source.path)))
    if len(ordered) <= MOST_FILES:
        return ordered
    return [ordered[(2 * index + 1) * len(ordered) // (2 * MOST_FILES)] for index in range(MOST_FILES)]


def _sample(source: Source, tokenizer: Tokenizer) -> tuple[float, int, int, int]:
    """Return how many bytes of a file were read, and the tokens, bytes of text and documents in them."""
    reading = Reading(skip_bad_lines=True)
    texts: list[str] = []
    raw: list[bytes] = []
    text_bytes, is_whole = 0, True
    for record in read_records(source, reading):
        if text_bytes >= PIECE_BYTES:
            is_whole = False
            break
        texts.append(text_of(reading.value(record)))
        raw.append(record.raw)
        text_bytes += len(texts[-1].encode())
    tokens = sum(map(len, tokenizer.encode_batch(texts))) + len(texts)
    return (float(source.size) if is_whole else _bytes_read(source, raw)), tokens, text_bytes, len(texts)


def _bytes_read(source: Source, raw: Sequence[bytes]) -> float:
    if source.format in ("parquet", "arrow"):
        return source.size * len(raw) / max(_num_rows(source), len(raw))
    content = b"\n".join(raw) + b"\n"
    read = len(content) if source.compression is None else len(zlib.compress(content, 6))
    return float(min(read, source.size))


def _num_rows(source: Source) -> int:
    if source.format == "parquet":
        import pyarrow.parquet  # heavy; only for tables

        return int(pyarrow.parquet.ParquetFile(source.path).metadata.num_rows)
    import pyarrow  # heavy; only for tables

    with pyarrow.memory_map(str(source.path)) as file:
        try:
            reader = pyarrow.ipc.open_file(file)
            return sum(reader.get_batch(index).num_rows for index in range(reader.num_record_batches))
        except pyarrow.ArrowInvalid:
            return sum(batch.num_rows for batch in pyarrow.ipc.open_stream(file))
