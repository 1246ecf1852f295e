"""Signatures of documents for deduplication: an exact hash, a MinHash and a length each, one file per source.

A source's signatures are written atomically, so a killed run resumes with the missing sources.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_cpt.data.cleaning.shingles import shingles_of_texts
from megatron_cpt.data.reading.documents import Source
from megatron_cpt.data.reading.file_pool import map_files
from megatron_cpt.data.reading.record_files import Reading, Record, prompt_of, read_records, text_of
from megatron_cpt.files import whole_file

_BATCH = 4096
_BATCH_CHARACTERS = 1 << 24


@dataclass(frozen=True, kw_only=True)
class MinHashOptions:
    """Definition of near-duplicates."""

    ngram: int = 5
    """Words per shingle."""
    num_perm: int = 64
    """Hash functions of a signature."""
    threshold: float = 0.85
    """Estimated Jaccard similarity of the shingle sets from which documents count as duplicates."""
    seed: int = 42
    is_exact_only: bool = False
    """Only documents with the same text, white space at the ends aside."""
    is_prompt: bool = False
    """Compare what comes before a chat's first answer, exactly."""


def signature_dtype(num_perm: int) -> np.dtype:
    """Return the layout of one document's signature."""
    return np.dtype([("exact", "<u8", 2), ("minhash", "<u4", num_perm), ("length", "<u4"), ("has_words", "?")])


def write_signatures(
    sources: list[Source],
    reading: Reading,
    options: MinHashOptions,
    folder: Path,
    workers: int,
    part: tuple[int, int] | None = None,
) -> list[Path]:
    """Write the signatures of every source that has none yet; return all files in the order of the sources.

    `part` (i, n): only of every n-th source from the i-th on, in the order of size.

    Raises: DataError for a bad line, and when a worker dies.
    """
    paths = [folder / f"signatures_{number:06d}.bin" for number in range(len(sources))]
    by_size = sorted(range(len(sources)), key=lambda index: (-sources[index].size, index))
    mine = sorted(by_size if part is None else by_size[part[0] :: part[1]])
    missing = [(sources[index], paths[index]) for index in mine if not paths[index].exists()]
    map_files(
        _write_source,
        [(source, reading, options, path) for source, path in missing],
        [source.size for source, _ in missing],
        workers,
        "signatures",
    )
    return paths


def document_text(record: Record, reading: Reading, options: MinHashOptions) -> str:
    """Return the part of a document that is compared."""
    found = reading.value(record)
    return prompt_of(found) if options.is_prompt else text_of(found)


def read_signatures(path: Path, options: MinHashOptions) -> np.ndarray:
    """Return the signatures of a source, memory-mapped, [documents]."""
    dtype = signature_dtype(options.num_perm)
    return np.memmap(path, dtype, mode="r") if path.stat().st_size else np.empty(0, dtype)


def _write_source(source: Source, reading: Reading, options: MinHashOptions, path: Path) -> None:
    texts = (document_text(record, reading, options) for record in read_records(source, reading))
    with whole_file(path, "wb") as file:
        for batch in _batches(texts):
            _signatures(batch, options).tofile(file)


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if len(batch) == _BATCH or characters > _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _signatures(texts: list[str], options: MinHashOptions) -> np.ndarray:
    from rensa import RMinHash  # compiled; only the workers need it

    rows = np.zeros(len(texts), dtype=signature_dtype(options.num_perm))
    if not texts:
        return rows
    stripped = [text.strip().encode() for text in texts]
    digests = b"".join(hashlib.blake2b(text, digest_size=16).digest() for text in stripped)
    rows["exact"] = np.frombuffer(digests, dtype="<u8").reshape(-1, 2)
    rows["length"] = [min(len(text), 2**32 - 1) for text in stripped]
    if options.is_exact_only or options.is_prompt:
        return rows
    shingles, offsets = shingles_of_texts(texts, options.ngram)
    rows["has_words"] = np.diff(offsets) > 0
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(
        shingles, offsets.astype(np.uint64), options.num_perm, options.seed
    )
    rows["minhash"] = np.array(matrix.to_rows(), dtype=np.uint32)
    return rows
