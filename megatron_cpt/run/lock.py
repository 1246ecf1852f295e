"""A lock on a run directory with an owner and an expiry, so that no run is ever trained twice at once.

The lock is a small JSON file. Its owner renews it while it lives; a lock whose expiry has passed, or whose owner was a
process of this machine that is gone, is taken over. A `flock` on a neighbouring file serialises processes on one file
system.
"""

import contextlib
import fcntl
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_cpt.errors import LaunchError
from megatron_cpt.files import write_json

logger = logging.getLogger(__name__)

HELD = "MEGATRON_CPT_RUN_LOCK"
"""Environment variable with the lock that a job holds for its child processes."""


@contextlib.contextmanager
def run_lock(path: Path, owner: str, expiry_seconds: float = 90.0, wait_seconds: float = 0.0) -> Iterator[None]:
    """Hold the lock `path` in the name of `owner` while the block runs, renewing it every third of its expiry.

    `wait_seconds`: how long to wait until the holder, which can have died on another machine, releases the lock or the
    lock expires.

    Raises: LaunchError with the holder and the solution, if another process holds it.
    """
    claim = {"owner": owner, "host": socket.gethostname(), "pid": os.getpid(), "since": time.time()}
    deadline = time.monotonic() + wait_seconds
    while True:
        try:
            _take(path, claim, expiry_seconds)
            break
        except LaunchError as held:
            if time.monotonic() >= deadline:
                raise
            logger.info("waiting: %s", held)
            time.sleep(min(10.0, max(deadline - time.monotonic(), 0.1)))
    released = threading.Event()
    renewer = threading.Thread(target=_renew, args=(path, claim, expiry_seconds, released), daemon=True)
    renewer.start()
    os.environ[HELD] = os.path.abspath(path)
    try:
        yield
    finally:
        os.environ.pop(HELD, None)
        released.set()
        renewer.join()
        with _guard(path):
            if _read(path).get("since") == claim["since"]:
                path.unlink(missing_ok=True)


def is_held_for_us(path: Path) -> bool:
    """Return whether the job that started this process holds the lock `path`."""
    return os.environ.get(HELD) == os.path.abspath(path)


def _take(path: Path, claim: dict[str, Any], expiry_seconds: float) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with _guard(path):
        holder = _read(path)
        if holder and not _is_stale(holder):
            left = max(holder["expires"] - time.time(), 0)
            raise LaunchError(
                f"{path}: the run is held by {holder['owner']} (process {holder['pid']} on {holder['host']}, expires "
                f"in {left:.0f} s unless renewed). One job at a time may work on a run. Wait for it or stop it."
            )
        write_json(path, {**claim, "expires": time.time() + expiry_seconds})


def _renew(path: Path, claim: dict[str, Any], expiry_seconds: float, released: threading.Event) -> None:
    while not released.wait(expiry_seconds / 3):
        with contextlib.suppress(OSError):  # a full disk must not end the run; the next renewal may succeed
            write_json(path, {**claim, "expires": time.time() + expiry_seconds})


def _is_stale(holder: dict[str, Any]) -> bool:
    if holder["expires"] < time.time():
        return True
    return holder["host"] == socket.gethostname() and not _is_alive(holder["pid"])


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return {}


@contextlib.contextmanager
def _guard(path: Path) -> Iterator[None]:
    with path.with_suffix(".guard").open("w") as file:
        with contextlib.suppress(OSError):  # file systems without flock: the lock file alone must do
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
