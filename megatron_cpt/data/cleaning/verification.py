"""Exact Jaccard similarity of candidate duplicates: the shingle sets of their documents, read again and kept on disk.

A MinHash of 64 functions estimates a similarity of 0.85 with a standard error of 0.045, so among documents around the threshold
several of a hundred decisions are noise. Sets of 8 bytes a shingle need about the space of the candidates' text.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_cpt.data.cleaning.shingles import shingle_hashes
from megatron_cpt.data.cleaning.signatures import MinHashOptions, document_text
from megatron_cpt.data.reading.documents import Source
from megatron_cpt.data.reading.file_pool import map_files
from megatron_cpt.data.reading.record_files import Reading, read_records
from megatron_cpt.files import whole_file

_CHUNK = 1 << 16


class ShingleSets:
    """The sorted shingle sets of some documents, on disk."""

    def __init__(self, documents: np.ndarray, starts: np.ndarray, folder: Path):
        self.documents = documents
        """Numbers of the documents, ascending."""
        self.starts = starts
        """Number of each source's first document."""
        self.folder = folder
        self._open: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def path(self, source: int) -> Path:
        """Return the file of a source's sets."""
        return self.folder / f"sets_{source:06d}.bin"

    def rows(self, source: int) -> np.ndarray:
        """Return which documents of a source have a set, counted from its first."""
        first, last = np.searchsorted(self.documents, self.starts[source : source + 2])
        return self.documents[first:last] - self.starts[source]

    def of(self, document: int) -> np.ndarray:
        """Return a document's shingles, ascending uint64."""
        source = int(np.searchsorted(self.starts, document, side="right")) - 1
        if source not in self._open:
            data = np.memmap(self.path(source), "<u8", mode="r")
            bounds = data[1 : int(data[0]) + 2].astype(np.int64)
            self._open[source] = bounds, data[int(data[0]) + 2 :]
        bounds, hashes = self._open[source]
        row = int(np.searchsorted(self.rows(source), document - self.starts[source]))
        return np.asarray(hashes[bounds[row] : bounds[row + 1]])

    def similarity(self, one: int, other: int) -> float:
        """Return the exact Jaccard similarity of two documents."""
        left, right = self.of(one), self.of(other)
        both = len(np.intersect1d(left, right, assume_unique=True))
        return both / max(len(left) + len(right) - both, 1)


def write_sets(
    documents: np.ndarray,
    starts: np.ndarray,
    sources: Sequence[Source],
    reading: Reading,
    options: MinHashOptions,
    folder: Path,
    workers: int,
) -> ShingleSets:
    """Write the sets of documents that have none yet, a file per source, and return them."""
    sets = ShingleSets(documents, starts, folder)
    missing = [n for n in range(len(sources)) if len(sets.rows(n)) and not sets.path(n).exists()]
    map_files(
        _write_source,
        [(sources[n], reading, options, sets.rows(n), sets.path(n)) for n in missing],
        [sources[n].size for n in missing],
        workers,
        "shingles",
    )
    return sets


def similarities(pairs: np.ndarray, sets: ShingleSets, workers: int) -> np.ndarray:
    """Return the exact similarity of pairs of documents, float64 [pairs]."""
    chunks = [pairs[start : start + _CHUNK] for start in range(0, len(pairs), _CHUNK)]
    sizes = [chunk.nbytes for chunk in chunks]
    found = map_files(_similarities, [(chunk,) for chunk in chunks], sizes, workers, "verifying", shared=(sets,))
    return np.concatenate([np.empty(0), *found])


def _similarities(sets: ShingleSets, pairs: np.ndarray) -> np.ndarray:
    return np.array([sets.similarity(one, other) for one, other in pairs.tolist()])


def _write_source(source: Source, reading: Reading, options: MinHashOptions, rows: np.ndarray, path: Path) -> None:
    wanted, found = set(rows.tolist()), []
    for number, record in enumerate(read_records(source, reading)):
        if number in wanted:
            found.append(np.unique(shingle_hashes(document_text(record, reading, options), options.ngram)))
    bounds = np.cumsum([0, *map(len, found)])
    with whole_file(path, "wb") as file:
        np.array([len(found), *bounds], dtype="<u8").tofile(file)
        for hashes in found:
            hashes.astype("<u8").tofile(file)
