"""A lock on a run directory with an owner, an expiry and a fence, so that no run is ever trained twice at once.

The lock is a small JSON file that its owner rewrites every third of its expiry. Its age is measured by the file
system's own clock, as the difference between the time stamps of the lock and of a new file in the same folder, so that
different clocks of two machines do no harm. A lock that is older than its expiry, or whose owner was a process of this
machine that is gone, is taken over. A `flock` on a neighbouring file serialises processes on one file system.

An owner that was stopped for longer than the expiry can find its lock taken when it wakes. Each lock has a token.
Whoever renews looks first whether the token is still its own, and ends the run when it is not; saves look (`fence`)
before they count.
"""

import contextlib
import fcntl
import json
import logging
import os
import signal
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_cpt.errors import LaunchError
from megatron_cpt.files import write_json

logger = logging.getLogger(__name__)

HELD = "MEGATRON_CPT_RUN_LOCK"
"""Environment variable with the lock that a job holds for its child processes: `TOKEN@PATH`."""
EXPIRY_SECONDS = 90.0


@contextlib.contextmanager
def run_lock(
    path: Path, owner: str, expiry_seconds: float = EXPIRY_SECONDS, wait_seconds: float = 0.0
) -> Iterator[None]:
    """Hold the lock `path` in the name of `owner` while the block runs, renewing it every third of its expiry.

    `wait_seconds`: how long to wait until the holder, which can have died on another machine, releases the lock or the
    lock expires. When the lock is lost the process gets SIGTERM, which a job passes on to its ranks; their save is
    refused by the fence.

    Raises: LaunchError with the holder and the solution, if another process holds it.
    """
    claim = {
        "owner": owner, "host": socket.gethostname(), "pid": os.getpid(), "process": _identity(os.getpid()),
        "token": uuid.uuid4().hex, "expiry_seconds": expiry_seconds, "since": round(time.time(), 3),
    }  # fmt: skip
    deadline = time.monotonic() + wait_seconds
    while True:
        try:
            _take(path, claim)
            break
        except LaunchError as held:
            if time.monotonic() >= deadline:
                raise
            logger.info("waiting: %s", held)
            time.sleep(min(10.0, max(deadline - time.monotonic(), 0.1)))
    released = threading.Event()
    renewer = threading.Thread(target=_renew, args=(path, claim, released), daemon=True)
    renewer.start()
    os.environ[HELD] = f"{claim['token']}@{os.path.abspath(path)}"
    try:
        yield
    finally:
        os.environ.pop(HELD, None)
        released.set()
        renewer.join()
        with _guard(path):
            # Another job can have taken an expired lock over. Its lock is not ours to remove.
            if _read(path).get("token") == claim["token"]:
                path.unlink(missing_ok=True)


def is_held_for_us(path: Path) -> bool:
    """Return whether the job that started this process holds the lock `path`."""
    return os.environ.get(HELD, "").partition("@")[2] == os.path.abspath(path)


@contextlib.contextmanager
def fence() -> Iterator[None]:
    """Let the block run only while the lock that this process works under is still its own; nobody takes it meanwhile.

    Without a lock (`HELD` is not set) there is no fence.

    Raises: LaunchError when another job has taken it over.
    """
    token, _, held = os.environ.get(HELD, "").partition("@")
    if not held:
        yield
        return
    path = Path(held)
    with _guard(path):
        found = _read(path)
        if found.get("token") != token:
            raise LaunchError(_lost(path, found))
        yield


def _take(path: Path, claim: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with _guard(path):
        age = _age_seconds(path)
        if age is not None:
            holder = _read(path)
            left = _number(holder.get("expiry_seconds")) - age
            if left > 0 and not _is_gone(holder):
                raise LaunchError(
                    f"{path}: the run is held by {holder.get('owner', 'somebody (the file is damaged)')} (process "
                    f"{holder.get('pid', '?')} on {holder.get('host', '?')}, expires in {left:.0f} s unless renewed). "
                    "One job at a time may work on a run. Wait for it or stop it."
                )
        write_json(path, claim)


def _renew(path: Path, claim: dict[str, Any], released: threading.Event) -> None:
    expiry, renewed = claim["expiry_seconds"], time.monotonic()
    # A third of the expiry: when one renewal fails, the next one still comes in time.
    while not released.wait(expiry / 3):
        try:
            with _guard(path):
                found = _read(path)
                if found.get("token") == claim["token"]:
                    write_json(path, claim)
                    renewed = time.monotonic()
                    continue
        except OSError as problem:  # a full disk must not end the run; the next renewal may succeed
            if time.monotonic() - renewed < expiry:
                continue
            found = {"owner": f"nobody can say whom: it could not be renewed for {expiry:.0f} s ({problem})"}
        logger.error("%s", _lost(path, found))
        os.kill(os.getpid(), signal.SIGTERM)
        return


def _lost(path: Path, found: dict[str, Any]) -> str:
    return (
        f"{path}: the lock was lost, it is now held by {found.get('owner', 'nobody')} (process {found.get('pid', '?')} on "
        f"{found.get('host', '?')}). This job was stopped for longer than the lock lives, or the file was removed. It ends "
        "without saving; the other job continues the run."
    )


def _age_seconds(path: Path) -> float | None:
    """Return the age of a lock by the clock of its file system, None where there is none."""
    try:
        written = path.stat().st_mtime
    except FileNotFoundError:
        return None
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".now", dir=path.parent)
    try:
        # Written and flushed like the lock itself, so that both time stamps come from the file system and not from
        # this machine's clock.
        os.write(descriptor, b"now")
        os.fsync(descriptor)
        os.close(descriptor)
        return os.stat(name).st_mtime - written
    finally:
        os.unlink(name)


def _is_gone(holder: dict[str, Any]) -> bool:
    """Return whether the holder is known to be dead: a process of this very system (boot and container) that has ended."""
    system, _, process = str(holder.get("process", "")).rpartition(" ")
    own = _identity(os.getpid())
    pid = holder.get("pid")
    if not process or not isinstance(pid, int) or own.rpartition(" ")[0] != system:
        return False
    return _identity(pid).rpartition(" ")[2] != process


def _identity(pid: int) -> str:
    """Return `BOOT NAMESPACE START` of a process, START empty when there is none: a number comes again, this does not."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""
    try:
        # Field 22 is the start time. Field 2, the program's name, can contain spaces and parentheses, so fields are
        # counted from the last parenthesis (proc(5)).
        start = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        start = ""
    return f"{boot} {namespace} {start}"


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) and 0 < value < 1e6 else EXPIRY_SECONDS


def _read(path: Path) -> dict[str, Any]:
    """Return the lock's content, or nothing if it is unreadable: then only its age is used."""
    try:
        value = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


@contextlib.contextmanager
def _guard(path: Path) -> Iterator[None]:
    with path.with_suffix(".guard").open("w") as file:
        with contextlib.suppress(OSError):  # file systems without flock: the lock file alone must do
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
