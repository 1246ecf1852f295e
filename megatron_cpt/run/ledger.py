"""The ledger `<run>/jobs/ledger.jsonl`: every job of a run, one JSON record per event, only ever appended to.

The first record of a job describes it (stage, scheduler, command, submitted); later ones carry only what changed
(state, exit_code, ended). The state of a job is the combination of its records; the last one overrides earlier ones.
"""

import contextlib
import json
import logging
import os
import time
from pathlib import Path
from typing import Any

from megatron_cpt.files import naming

logger = logging.getLogger(__name__)

ACTIVE_STATES = ("submitted", "running")
"""States of a job that can still change files."""


def ledger_path(jobs_dir: Path) -> Path:
    """Return the ledger of a run's `jobs` folder."""
    return jobs_dir / "ledger.jsonl"


def append_record(jobs_dir: Path, job: str, **fields: Any) -> None:
    """Append one record about `job`, with the time; one write, so that concurrent writers never interleave."""
    jobs_dir.mkdir(parents=True, exist_ok=True)
    line = json.dumps({"job": job, "time": round(time.time(), 3), **fields}, ensure_ascii=False) + "\n"
    path = ledger_path(jobs_dir)
    if _ends_inside_a_line(path):
        line = "\n" + line
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        with naming(path):
            os.write(descriptor, line.encode())
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_jobs(jobs_dir: Path) -> dict[str, dict[str, Any]]:
    """Return job id -> its fields, in the order of submission; a line cut short by a crash is skipped with a warning."""
    jobs: dict[str, dict[str, Any]] = {}
    with contextlib.suppress(FileNotFoundError):
        lines = ledger_path(jobs_dir).read_bytes().split(b"\n")  # a byte that is no text costs its own line only
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
                job = record["job"]
                if not isinstance(job, str):
                    raise TypeError("a job's id is text")
            except (ValueError, KeyError, TypeError, RecursionError):
                logger.warning("%s:%d: not a ledger record; skipped.", ledger_path(jobs_dir), number)
                continue
            fields = jobs.setdefault(job, {"submitted": record.get("time")})
            fields.update(record)
    return jobs


def _ends_inside_a_line(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1) != b"\n"
    except OSError:  # missing or empty
        return False
