"""Records of jobs written before submission, because the answer of a scheduler that accepted a job can be lost.

One file per job in `<run>/jobs/intents/`, named by the job's unique name, with the job's future ledger record. It is
removed once the ledger contains the record, or once the scheduler has rejected the job.
"""

from pathlib import Path
from typing import Any

from megatron_cpt.files import read_json, write_json


def write_intent(jobs_dir: Path, name: str, fields: dict[str, Any]) -> None:
    """Note that a job of this unique name is about to be submitted."""
    write_json(_path(jobs_dir, name), fields)


def close_intent(jobs_dir: Path, name: str) -> None:
    """Forget an intent whose end is known."""
    _path(jobs_dir, name).unlink(missing_ok=True)


def open_intents(jobs_dir: Path) -> dict[str, tuple[float, dict[str, Any]]]:
    """Return job name -> (when it was written, fields) of the intents whose end is not known, oldest first."""
    paths = sorted((jobs_dir / "intents").glob("*.json"), key=lambda path: path.stat().st_mtime)
    return {path.stem: (path.stat().st_mtime, read_json(path)) for path in paths}


def _path(jobs_dir: Path, name: str) -> Path:
    return jobs_dir / "intents" / f"{name}.json"
