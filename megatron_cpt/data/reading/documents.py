"""Which files hold the documents: inputs named by path, folder or glob become a sorted list of sources.

A source is `.jsonl`/`.json`/`.ndjson` (an object per line, an array of objects, or objects over several lines; the first
bytes tell), `.txt` (a document per line or per file), each plain or `.gz`, `.zst`, `.xz`, `.bz2`, or `.parquet`, or `.arrow`
(also those of a Hugging Face `save_to_disk` folder).
"""

import codecs
import fnmatch
import glob
import logging
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from megatron_cpt.data.reading.byproducts import is_own
from megatron_cpt.data.reading.json_values import HEAD_BYTES, holds_values
from megatron_cpt.data.reading.plain_reader import PlainReader
from megatron_cpt.data.reading.splits import check_splits
from megatron_cpt.errors import DataError
from megatron_cpt.files import read_json_object

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
_SHOWN_NAMES = 5


@dataclass(frozen=True, kw_only=True)
class Source:
    """One file of documents."""

    path: Path
    relative: PurePosixPath
    """Path below the folder or glob that the user named; the output tree mirrors it."""
    format: str
    """jsonl (an object per line), json (an array, or objects over several lines), txt, parquet or arrow."""
    compression: str | None
    size: int
    mtime_ns: int
    encoding: str | None = None
    """Encoding of the text, where it is not UTF-8."""
    problem: str = ""
    """Why a file found in a folder cannot be read, where the policy is to count bad files."""

    @property
    def is_splittable(self) -> bool:
        """Whether byte ranges of the file can be read on their own."""
        return self.compression is None and self.encoding is None and self.format in ("jsonl", "txt")

    def identity(self) -> dict[str, Any]:
        """Return the file's identity, to detect changes: name, size and time of modification."""
        path = os.path.abspath(self.path)
        found = {"path": path, "format": self.format, "size": self.size, "mtime_ns": self.mtime_ns}
        return found | ({"encoding": self.encoding} if self.encoding else {})

    def check_unchanged(self) -> None:
        """Raise DataError when the file is not what it was when it was listed."""
        if self.problem:
            return
        status = self.path.stat()
        if (status.st_size, status.st_mtime_ns) != (self.size, self.mtime_ns):
            raise DataError(f"{self.path}: changed while it was read. Run the command again when it is at rest.")


def list_sources(
    inputs: Sequence[str | Path],
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    format: str | None = None,
    *,
    encoding: str | None = None,
    keep_bad_files: bool = False,
    mixes_splits: bool = True,
) -> list[Source]:
    """Return the sources that `inputs` name, each input's sorted by path, in the order of the inputs.

    Patterns are matched against the path below the input and against the file name. In folders and globs files that
    contain no documents (README.md, and files that megatron-cpt writes next to documents) are skipped, which is logged;
    a file named explicitly must be readable. Hidden files and folders are not looked at. A folder that a glob matches
    is read as a folder. `format` overrides what the file names say; `encoding` is that of text files, `auto` where
    their first bytes tell UTF-16 or UTF-32. `keep_bad_files`: a file in a folder that cannot be read (a dangling link)
    is a source with a `problem`. `mixes_splits`: the sources become one corpus, so training and held-out splits side by
    side are refused.

    Raises: DataError when an input matches nothing, cannot be read, a format is unknown, or an input holds several splits.
    """
    sources: dict[Path, Source] = {}
    for item in inputs:
        found: list[Source] = []
        passed_over = []
        for path, relative, is_named in _matches(str(item)):
            if not _is_wanted(relative, include, exclude):
                continue
            source = (
                None
                if not is_named and is_own(path)
                else _source(path, relative, format, is_named, encoding, keep_bad_files)
            )
            if source is None:
                passed_over.append(str(relative))
                continue
            found.append(source)
            if path.absolute() in sources:
                logger.warning("%s: named by several inputs; its documents are taken once", path)
            sources.setdefault(path.absolute(), source)
        if passed_over:
            shown = ", ".join(passed_over[:_SHOWN_NAMES]) + (", ..." if len(passed_over) > _SHOWN_NAMES else "")
            logger.info("%s: passed over %d files that hold no documents: %s", item, len(passed_over), shown)
        if not found:
            raise DataError(
                f"{item}: no document files found. Formats are {', '.join(sorted(FORMATS))}, the text ones plain or "
                f"{', '.join(sorted(COMPRESSIONS))}. Check the path and the --include and --exclude patterns."
            )
        if mixes_splits:
            check_splits(str(item), [source.relative for source in found])
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
    elif path.exists():
        raise DataError(f"{item}: is neither a file nor a folder. Documents are read from files.")
    elif glob.has_magic(item):
        yield from _globbed(item)
    else:
        raise DataError(f"{item}: no such file or folder. Check the path; quote globs so that the shell leaves them.")


def _globbed(pattern: str) -> Iterator[tuple[Path, PurePosixPath, bool]]:
    """Yield the files that a glob matches and those below the folders that it matches, each once."""
    parts = Path(pattern).parts
    magic = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    root = Path(*parts[:magic]) if magic else Path()
    read: set[Path] = set()
    saved: dict[Path, list[str] | None] = {}
    for match in sorted(set(_expand(root, parts[magic:])), key=str):
        if any(folder in read for folder in match.parents):
            continue
        if match.is_dir():
            read.add(match)
            found = [path for path, _, _ in _files_below(match, match)]
        else:
            folder = match.parent
            if folder not in saved:
                saved[folder] = _saved_shards(folder) if _is_saved(_names(folder)) else None
            shards = saved[folder]
            found = [match] if shards is None or match.name in shards else []
        for path in found:
            yield path, PurePosixPath(path.relative_to(root).as_posix()), False


def _expand(folder: Path, parts: Sequence[str]) -> Iterator[Path]:
    """Yield what the parts of a glob match below a folder. Python's own `**` goes round in circles of links."""
    if not parts:
        yield folder
        return
    part, rest = parts[0], parts[1:]
    if not glob.has_magic(part):
        if os.path.lexists(folder / part):
            yield from _expand(folder / part, rest)
        return
    if part == "**":
        yield from _expand(folder, rest)
    for name in _names(folder, part.startswith(".")):
        entry = folder / name
        if part == "**":
            if os.path.isdir(entry) and not _is_loop(entry):
                yield from _expand(entry, parts)
            elif not rest:
                yield entry
        elif fnmatch.fnmatchcase(name, part):
            yield from _expand(entry, rest)


def _is_loop(folder: Path) -> bool:
    """Return whether a folder is a link to one that its path comes through already."""
    if not folder.is_symlink():
        return False
    real = folder.resolve()
    return any(parent.resolve() == real for parent in folder.absolute().parents)


def _files_below(folder: Path, root: Path) -> Iterator[tuple[Path, PurePosixPath, bool]]:
    """Yield the files below a folder, sorted; a link to a folder that holds it is not followed."""
    if _is_loop(folder):
        logger.warning("%s: is a link to a folder that holds it; it is not followed", folder)
        return
    names = _names(folder)
    if _is_saved(names):
        for name in _saved_shards(folder):
            yield folder / name, PurePosixPath((folder / name).relative_to(root).as_posix()), False
        return
    is_of_several = "dataset_dict.json" in names and any(_is_saved(_names(folder / n)) for n in names)
    for name in names:
        entry = folder / name
        if os.path.isdir(entry):
            yield from _files_below(entry, root)
        elif not (is_of_several and name == "dataset_dict.json"):
            yield entry, PurePosixPath(entry.relative_to(root).as_posix()), False


def _names(folder: Path, with_hidden: bool = False) -> list[str]:
    """Return the names in a folder, sorted, without hidden ones; none if it is not a folder."""
    try:
        return sorted(name for name in os.listdir(folder) if with_hidden or not name.startswith("."))
    except (NotADirectoryError, FileNotFoundError):
        return []
    except OSError as problem:
        raise DataError(f"{folder}: cannot be read ({problem.strerror}). Make it readable or exclude it.") from None


def _is_saved(names: Iterable[str]) -> bool:
    """Return whether a folder of these names was written by Hugging Face's `save_to_disk`."""
    return {"state.json", "dataset_info.json"} <= set(names)


def _saved_shards(folder: Path) -> list[str]:
    """Return the files of a Hugging Face `save_to_disk` folder in their order; caches in the folder are not data."""
    state = read_json_object(folder / "state.json", DataError)
    if state.get("_indices_data_files"):
        raise DataError(f"{folder}: is a view (indices) of other data. Save it with flatten_indices() first.")
    return [file["filename"] for file in state.get("_data_files", [])]


def _is_wanted(relative: PurePosixPath, include: Sequence[str], exclude: Sequence[str]) -> bool:
    def matches(patterns: Sequence[str]) -> bool:
        return any(fnmatch.fnmatch(str(relative), p) or fnmatch.fnmatch(relative.name, p) for p in patterns)

    return (not include or matches(include)) and not matches(exclude)


def _source(
    path: Path, relative: PurePosixPath, format: str | None, is_named: bool, encoding: str | None, keep_bad_files: bool
) -> Source | None:
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
        str(path.absolute()).encode()
    except UnicodeEncodeError:
        raise DataError(
            f"{str(path)!a}: its name is not UTF-8. Manifests could not name it. Rename the file."
        ) from None
    problem = _file_problem(path)
    if problem and (is_named or not keep_bad_files):
        raise DataError(f"{path}: {problem}")
    status = path.lstat() if problem else path.stat()
    source = Source(
        path=path,
        relative=relative,
        format=found,
        compression=compression,
        size=0 if problem else status.st_size,
        mtime_ns=status.st_mtime_ns,
        problem=problem,
    )
    if problem or found not in ("jsonl", "json", "txt"):
        return source
    source = replace(source, encoding=_encoding(path, compression) if encoding == "auto" else encoding)
    is_values = format is None and found == "jsonl" and holds_values(_head(source))
    return replace(source, format="json") if is_values else source


def _file_problem(path: Path) -> str:
    """Return the reason why a file cannot be read and the solution, or nothing."""
    try:
        status = path.stat()
    except FileNotFoundError:
        if path.is_symlink():
            return f"no such file: a link to {os.readlink(path)}, which does not exist. Mend or remove the link."
        return "no such file."
    except OSError as problem:
        return f"cannot be read ({problem.strerror}). Make it readable or exclude it."
    if not stat.S_ISREG(status.st_mode):
        return "is not a regular file. Documents are read from files. Exclude it."
    if not os.access(path, os.R_OK):
        return "cannot be read (permission denied). Make it readable or exclude it."
    return ""


def _head(source: Source) -> bytes:
    with PlainReader(source.path, source.compression, source.encoding) as stream:
        return stream.read_block(HEAD_BYTES)[0]


def _encoding(path: Path, compression: str | None) -> str | None:
    """Return the encoding of a byte-order mark, None for UTF-8."""
    with PlainReader(path, compression) as stream:
        head = stream.read_block(4)[0]
    marks = {codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32"}
    marks |= {codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
    return next((encoding for mark, encoding in marks.items() if head.startswith(mark)), None)
