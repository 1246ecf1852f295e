"""Texts to evaluate on: named sets of whole documents, small enough to be held in memory."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_cpt.data.reading.documents import Source, list_sources
from megatron_cpt.data.reading.streams import Layout, parse_piece, pieces_of
from megatron_cpt.errors import DataError

MAX_BYTES = 1 << 30


@dataclass(frozen=True)
class TextSet:
    """Documents of one domain under a name such as a corpus's."""

    name: str
    documents: list[str]


def read_text_set(name: str, inputs: Sequence[str | Path], max_documents: int | None = None) -> TextSet:
    """Return the non-empty documents of files (any format that `tokenize` reads), folders or globs.

    Raises: DataError when a file is damaged, a line holds no document, nothing is found, or there is over 1 GiB.
    """
    documents: list[str] = []
    size = 0
    for source in list_sources(inputs):
        for text in _documents(source):
            if len(documents) == max_documents:
                return TextSet(name, documents)
            documents.append(text)
            size += len(text)
            if size > MAX_BYTES:
                raise DataError(f"{name}: over {MAX_BYTES:,} bytes of text. A sample is needed. Use --max-documents.")
    if not documents:
        raise DataError(f"{name}: no text in {', '.join(map(str, inputs))}. At least one document is needed.")
    return TextSet(name, documents)


def _documents(source: Source) -> Iterator[str]:
    layout = Layout()
    first_line = 1
    for piece in pieces_of(source, 0, layout):
        parsed = parse_piece(piece, layout)
        if piece.descriptor is not None:
            os.close(piece.descriptor)
        if parsed.problems:
            found = parsed.problems[0]
            raise DataError(
                f"{source.path}:{first_line + found.line}: {found.kind}. A document per line is needed. "
                "Run `megatron-cpt data validate` for the whole list."
            )
        first_line += parsed.num_lines
        yield from (text for text in parsed.texts[0] if text.strip())
