"""Which files hold the documents: inputs named by path, folder or glob become a sorted list of sources.

A source is `.jsonl`/`.json`/`.ndjson` (an object per line), `.txt` (a document per line or per file), each plain or
`.gz`, `.zst`, `.xz`, `.bz2`, or `.parquet`, or `.arrow` (also those of a Hugging Face `save_to_disk` folder).
"""

import fnmatch
import glob
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from megatron_cpt.errors import DataError
from megatron_cpt.files import read_json

logger = logging.getLogger(__name__)

COMPRESSIONS = {".gz": "gz", ".zst": "zst", ".zstd": "zst", ".xz": "xz", ".bz2": "bz2"}
FORMATS = {
    ".jsonl": "jsonl",
    ".json": "jsonl",
    ".ndjson": "jsonl",
    ".txt": "txt",
    ".text": "txt",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
_OF_SAVE_TO_DISK = {"state.json", "dataset_info.json", "dataset_dict.json"}


@dataclass(frozen=True, kw_only=True)
class Source:
    """One file of documents."""

    path: Path
    relative: PurePosixPath
    """Path below the folder or glob that the user named; the output tree mirrors it."""
    format: str
    """jsonl, txt, parquet or arrow."""
    compression: str | None
    size: int
    mtime_ns: int

    @property
    def is_splittable(self) -> bool:
        """Whether byte ranges of the file can be read on their own."""
        return self.compression is None and self.format in ("jsonl", "txt")

    def identity(self) -> dict[str, Any]:
        """Return what tells that the file is unchanged: name, size and time of modification."""
        path = os.path.abspath(self.path)
        return {"path": path, "format": self.format, "size": self.size, "mtime_ns": self.mtime_ns}


def list_sources(
    inputs: Sequence[str | Path],
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    format: str | None = None,
) -> list[Source]:
    """Return the sources that `inputs` name, each input's sorted by path, in the order of the inputs.

    Patterns are matched against the path below the input and against the file name. In folders and globs files that
    hold no documents (README.md) are passed over; a file named outright must be readable. `format` overrides what
    the file names say.

    Raises: DataError when an input matches nothing or a format is unknown.
    """
    sources: dict[Path, Source] = {}
    for item in inputs:
        found = 0
        for path, relative, is_named in _matches(str(item)):
            if not _is_wanted(relative, include, exclude):
                continue
            source = _source(path, relative, format, is_named)
            if source is None:
                continue
            found += 1
            if path.absolute() in sources:
                logger.warning("%s: named by several inputs; its documents are taken once", path)
            sources.setdefault(path.absolute(), source)
        if not found:
            raise DataError(
                f"{item}: no document files found. Formats are {', '.join(sorted(FORMATS))}, the text ones plain or "
                f"{', '.join(sorted(COMPRESSIONS))}. Check the path and the --include and --exclude patterns."
            )
    return list(sources.values())


def file_format(name: str) -> tuple[str | None, str | None]:
    """Return a file name's format (None if it holds no documents) and compression (None if plain)."""
    path = PurePosixPath(name.lower())
    compression = COMPRESSIONS.get(path.suffix)
    if compression:
        path = path.with_suffix("")
    found = FORMATS.get(path.suffix)
    return (None if compression and found in ("parquet", "arrow") else found), compression


def plain_name(name: str) -> str:
    """Return a file name without compression and format suffixes: `a.b.jsonl.zst` is `a.b`."""
    for suffixes in (COMPRESSIONS, FORMATS):
        stem, suffix = os.path.splitext(name)
        if suffix.lower() in suffixes:
            name = stem
    return name


def _matches(item: str) -> Iterator[tuple[Path, PurePosixPath, bool]]:
    path = Path(item)
    if path.is_file():
        yield path, PurePosixPath(path.name), True
    elif path.is_dir():
        yield from _files_below(path, path)
    elif glob.has_magic(item):
        parts = path.parts
        magic = next(i for i, part in enumerate(parts) if glob.has_magic(part))
        root = Path(*parts[:magic]) if magic else Path()
        for name in sorted(glob.glob(item, recursive=True)):
            match = Path(name)
            if match.is_file():
                yield match, PurePosixPath(match.relative_to(root).as_posix()), False
    else:
        raise DataError(f"{item}: no such file or folder. Check the path; quote globs so that the shell leaves them.")


def _files_below(folder: Path, root: Path) -> Iterator[tuple[Path, PurePosixPath, bool]]:
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    names = {entry.name for entry in entries}
    if {"state.json", "dataset_info.json"} <= names:
        for name in _saved_shards(folder):
            yield folder / name, PurePosixPath((folder / name).relative_to(root).as_posix()), False
        return
    for entry in entries:
        if entry.is_dir():
            yield from _files_below(entry, root)
        elif entry.name not in _OF_SAVE_TO_DISK:
            yield entry, PurePosixPath(entry.relative_to(root).as_posix()), False


def _saved_shards(folder: Path) -> list[str]:
    """Return the files of a Hugging Face `save_to_disk` folder in their order; caches beside them are not data."""
    state = read_json(folder / "state.json", DataError)
    if state.get("_indices_data_files"):
        raise DataError(f"{folder}: is a view (indices) of other data. Save it with flatten_indices() first.")
    return [file["filename"] for file in state.get("_data_files", [])]


def _is_wanted(relative: PurePosixPath, include: Sequence[str], exclude: Sequence[str]) -> bool:
    def matches(patterns: Sequence[str]) -> bool:
        return any(fnmatch.fnmatch(str(relative), p) or fnmatch.fnmatch(relative.name, p) for p in patterns)

    return (not include or matches(include)) and not matches(exclude)


def _source(path: Path, relative: PurePosixPath, format: str | None, is_named: bool) -> Source | None:
    found, compression = file_format(path.name)
    found = format or found
    if found is None:
        if is_named:
            raise DataError(
                f"{path}: its name tells no format. Formats are {', '.join(sorted(FORMATS))}. "
                "Rename the file or set --format."
            )
        return None
    try:
        status = path.stat()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file.") from None
    return Source(
        path=path,
        relative=relative,
        format=found,
        compression=compression,
        size=status.st_size,
        mtime_ns=status.st_mtime_ns,
    )
