"""A cleaning task and its output folder: begun once, gone on with after a kill, recognised when it is done.

While a task is under way its settings and inputs stand in `<work>/task.json`; `output/report.json` appears last and carries
the task's hash. So the same command again goes on or finds its work done, and another command never writes over it.
"""

import fcntl
import json
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_cpt.data.reading.byproducts import rejects_beside, remove_partials, write_record
from megatron_cpt.data.reading.documents import Source
from megatron_cpt.errors import DataError
from megatron_cpt.files import read_json, text_hash, write_json

logger = logging.getLogger(__name__)

REPORT = "report.json"
_locks: dict[Path, int] = {}


def work_folder(output: Path) -> Path:
    """Return the folder beside the output for what is spilled and counted on the way."""
    return output.with_name(f".{output.name}.work")


def begin_task(
    kind: str,
    output: Path,
    work: Path,
    corpora: Mapping[str, Sequence[Source]],
    settings: Mapping[str, Any],
    targets: Sequence[Path],
) -> dict[str, Any] | None:
    """Make output and work folder this task's own, or go on in them; return the report of a task that is done already.

    Raises: DataError when they hold other work, or a target exists.
    """
    task = task_hash(kind, corpora, settings)
    report = output / REPORT
    if report.exists():
        found = read_json(report, DataError)
        if not isinstance(found, dict) or found.get("task") != task:
            raise DataError(
                f"{report}: exists already, from other inputs or options. Remove the folder or choose another output."
            )
        if missing := next((target for target in targets if not target.exists()), None):
            raise DataError(
                f"{missing}: is gone, and {report} says that it was written. Remove the folder and run again."
            )
        shutil.rmtree(work, ignore_errors=True)
        return found
    path = work / "task.json"
    if not path.exists():
        if taken := next((target for target in targets if target.exists()), None):
            raise DataError(f"{taken}: exists already, from other work. Remove it or choose another output folder.")
        _lock(work)
        write_json(path, {"task": task, **settings, "sources": _identities(corpora)})
    elif read_json(path, DataError)["task"] != task:
        raise DataError(
            f"{work}: holds unfinished work on other inputs or with other options. Remove it, or choose another output."
        )
    else:
        _lock(work)
    remove_partials([report, *targets, *map(rejects_beside, targets)])
    return None


def finish_task(
    kind: str,
    output: Path,
    work: Path,
    corpora: Mapping[str, Sequence[Source]],
    settings: Mapping[str, Any],
    report: Mapping[str, Any],
) -> dict[str, Any]:
    """Write the report, which says that all is done, and remove the work folder; return the report."""
    task = task_hash(kind, corpora, settings)
    written = write_record(output / REPORT, f"{kind} report", {"task": task, **report})
    shutil.rmtree(work)
    release(work)
    return json.loads(json.dumps(written))


def release(work: Path) -> None:
    """Give up the lock of a work folder."""
    if (descriptor := _locks.pop(work, None)) is not None:
        os.close(descriptor)


def task_hash(kind: str, corpora: Mapping[str, Sequence[Source]], settings: Mapping[str, Any]) -> str:
    """Return what tells one task from another: verb, options, and name, size and time of every input."""
    return text_hash(json.dumps([kind, settings, _identities(corpora)], sort_keys=True, default=str))


def _lock(work: Path) -> None:
    """Hold the work folder until this process ends or the folder is removed."""
    work.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(work / "lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise DataError(f"{work}: another process is at this work. Let it finish, or stop it first.") from None
    except OSError as problem:  # a file system without locks
        logger.warning("%s: cannot be locked (%s); do not start the command twice", work, problem.strerror)
    _locks[work] = descriptor


def _identities(corpora: Mapping[str, Sequence[Source]]) -> dict[str, list[dict[str, Any]]]:
    return {name: [source.identity() for source in group] for name, group in corpora.items()}
