"""Atomic file writes: a temporary file in the same folder, fsync, rename."""

import contextlib
import fcntl
import glob
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from megatron_cpt.errors import CptError, storage_error

logger = logging.getLogger(__name__)

_LEFTOVER_SECONDS = 86400


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give an OSError of the block that names no file (a write, an fsync) the name of this one."""
    try:
        yield
    except OSError as problem:
        if problem.filename is None:
            problem.filename = os.fspath(path)
        raise


@contextlib.contextmanager
def whole_file(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Yield a temporary file in `path`'s folder; on success flush it to disk and rename it to `path`.

    An exception inside the block removes the temporary file and leaves `path` as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    encoding = None if "b" in mode else "utf-8"
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
    try:
        with naming(path):
            os.fchmod(descriptor, 0o666 & ~_umask())
            with os.fdopen(descriptor, mode, encoding=encoding) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):  # the first problem is the one to tell
            os.unlink(name)
        raise
    sync_dir(path.parent)


@contextlib.contextmanager
def whole_dir(path: Path) -> Iterator[Path]:
    """Yield a temporary folder next to `path`; on success rename it to `path`, which must not exist.

    An exception inside the block removes the temporary folder. A killed process leaves a folder `.<name>.*.partial`,
    which is never read as a result and is removed after a day.
    """
    if path.exists():
        raise CptError(f"{path}: exists already. A result is never overwritten. Remove it or choose another name.")
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
    try:
        with naming(path):
            os.chmod(temporary, 0o777 & ~_umask())
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file():
                    with file.open("rb") as opened, naming(file):
                        os.fsync(opened.fileno())
            os.rename(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_dir(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path`, whole or not at all."""
    with whole_file(path) as file:
        file.write(text)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON to `path`, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path, error: type[CptError] = CptError) -> Any:
    """Return the JSON value in `path`.

    Raises: `error` naming the file when it is missing, cannot be read or is not JSON.
    """
    try:
        with naming(path):
            return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise error(f"{path}: no such file.") from None
    except OSError as problem:
        raise error(str(storage_error(problem))) from None
    except RecursionError:
        raise error(f"{path}: not valid JSON (lists or dictionaries thousands deep).") from None
    except ValueError as problem:  # also of text that is not UTF-8, and of numbers with thousands of digits
        raise error(f"{path}: not valid JSON ({problem}).") from None


def read_json_object(path: Path, error: type[CptError] = CptError) -> dict[str, Any]:
    """Return the JSON object (a dictionary) in `path`.

    Raises: `error` naming the file when it is missing, cannot be read, or holds anything else.
    """
    value = read_json(path, error)
    if not isinstance(value, dict):
        raise error(f"{path}: holds {type(value).__name__ if value is not None else 'null'}. A JSON object is needed.")
    return value


def file_hash(path: Path, chunk_bytes: int = 1 << 22) -> str:
    """Return the BLAKE2b-128 hash of a file's bytes as 32 hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file, naming(path):
        while chunk := file.read(chunk_bytes):
            digest.update(chunk)
    return digest.hexdigest()


def text_hash(text: str) -> str:
    """Return the BLAKE2b-128 hash of a text's UTF-8 bytes as 32 hexadecimal digits."""
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def sync_dir(path: Path) -> None:
    """Flush a folder's entries to disk, so that a rename in it survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with naming(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def take_lock(descriptor: int, path: Path, is_shared: bool = False) -> bool:
    """Lock an open file or folder until its descriptor is closed; return False where another process holds the lock.

    A shared lock leaves room for others that are shared.

    The kernel drops the lock with the process, however it ends. A file system without locks counts as free, with a warning.
    """
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if is_shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as problem:
        logger.warning("%s: cannot be locked (%s); do not start the command twice", path, problem.strerror)
    return True


def _remove_leftovers(path: Path) -> None:
    """Remove the temporary folders of `path` that nothing has been written into for a day."""
    for folder in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
        with contextlib.suppress(OSError):  # another process removes it too, or finishes it
            if time.time() - max(file.stat().st_mtime for file in (folder, *folder.rglob("*"))) > _LEFTOVER_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
