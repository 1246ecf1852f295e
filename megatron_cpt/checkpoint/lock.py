"""One writer per run: a lock file with owner and expiry, renewed by a thread while the owner lives.

The lock is a file that only one process can create (a hard link to a finished file). It states host, process, job and
when it was renewed. A lock that was not renewed for `expiry_seconds`, or whose process on this host is gone, is taken
over. Two clocks that differ by less than the expiry do no harm.
"""

import contextlib
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_cpt.errors import LaunchError
from megatron_cpt.files import write_json

logger = logging.getLogger(__name__)

LOCK_NAME = ".writer.lock"


@contextlib.contextmanager
def run_lock(run_path: Path, expiry_seconds: float = 600.0) -> Iterator[None]:
    """Hold the right to write into the run at `run_path` for the length of the block.

    Raises: LaunchError naming the owner when another live job holds it.
    """
    path = run_path / LOCK_NAME
    run_path.mkdir(parents=True, exist_ok=True)
    owner = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "job": os.environ.get("PBS_JOBID") or os.environ.get("SLURM_JOB_ID"),
        "token": uuid.uuid4().hex,
        "expiry_seconds": expiry_seconds,
    }
    _acquire(path, owner)
    stop = threading.Event()
    renewer = threading.Thread(target=_renew, args=(path, owner, stop), daemon=True, name="run-lock")
    renewer.start()
    try:
        yield
    finally:
        stop.set()
        renewer.join()
        if (_read(path) or {}).get("token") == owner["token"]:
            path.unlink(missing_ok=True)


def _acquire(path: Path, owner: dict[str, Any]) -> None:
    finished = path.with_name(f"{path.name}.{owner['token']}")
    write_json(finished, {**owner, "renewed": time.time()})
    try:
        for _ in range(3):
            try:
                os.link(finished, path)
                return
            except FileExistsError:
                _remove_if_abandoned(path)
    finally:
        finished.unlink(missing_ok=True)
    raise LaunchError(f"{path}: taken by another job just now. One job may write a run. Wait for that job.")


def _remove_if_abandoned(path: Path) -> None:
    held = _read(path)
    if held is None:
        return
    age = time.time() - held["renewed"]
    label = f"job {held['job']}" if held["job"] else f"process {held['pid']}"
    if age <= held["expiry_seconds"] and not _is_dead_here(held):
        raise LaunchError(
            f"{path}: {label} on {held['host']} writes this run, renewed {age:.0f} s ago. One job may write a run. "
            f"Wait for it or end it; a dead job's lock expires after {held['expiry_seconds']:.0f} s."
        )
    logger.warning("%s: taking over from %s on %s, last renewed %.0f s ago", path, label, held["host"], age)
    aside = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    with contextlib.suppress(FileNotFoundError):
        os.rename(path, aside)
        if (_read(aside) or {}).get("token") != held["token"]:  # somebody was faster and holds it already
            with contextlib.suppress(FileExistsError):
                os.link(aside, path)
        aside.unlink()


def _is_dead_here(held: dict[str, Any]) -> bool:
    if held["host"] != socket.gethostname():
        return False
    try:
        os.kill(held["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


def _renew(path: Path, owner: dict[str, Any], stop: threading.Event) -> None:
    while not stop.wait(owner["expiry_seconds"] / 4):
        if (_read(path) or {}).get("token") != owner["token"]:
            logger.error("%s: another job took this run's lock over. Two jobs write one run.", path)
            return
        write_json(path, {**owner, "renewed": time.time()})


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None
