"""Fingerprints of a stage's inputs and outputs, recorded in the ledger, so that "done" means built from these inputs.

A fingerprint covers the command and, of every file below the paths, name, size and time of modification. It is taken from
the inputs before a stage starts and from the outputs after it: a stage is current while both still give the same.
"""

import glob
import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path


def fingerprint(paths: Iterable[str | Path], words: Sequence[str] = ()) -> str:
    """Return 32 hexadecimal digits of files, folders (every file below them), globs and token-file prefixes."""
    digest = hashlib.blake2b(repr(list(words)).encode(), digest_size=16)
    for path in sorted({file for item in paths for file in _files(str(item))}):
        try:
            status = path.stat()
        except OSError:  # removed meanwhile, or a link into nowhere: another state either way
            continue
        digest.update(f"{path}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _files(item: str) -> list[Path]:
    path = Path(item)
    if path.is_dir():
        return [file for file in path.rglob("*") if file.is_file() and ".partial" not in file.name]
    if path.is_file():
        return [path]
    if glob.has_magic(item):
        return [file for match in glob.glob(item, recursive=True) for file in _files(match)]
    return [file for suffix in (".bin", ".idx", ".json") if (file := Path(item + suffix)).is_file()]
