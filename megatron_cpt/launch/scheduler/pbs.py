"""PBS Professional through qsub, qstat, qselect and qdel (OpenPBS 23.06 observed).

Live jobs are asked for first, without `-x`: a server that keeps no history (`job_history_enable` false, OpenPBS's own
default) answers `qstat -x` about a running job with exit code 0 and no job at all. A job that is not live is then
looked up in the history. Exit code 153 (`Unknown Job Id`) and 35 (`Job has finished`) are answers; every other failure
(a stopped server returns 255 or `cannot connect`) contains no information about the jobs.
"""

import json
import re
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from megatron_cpt.launch.scheduler.job import Dependency
from megatron_cpt.launch.scheduler.queue import JobState, Scheduler, ask, checked_name, one_line, unanswered, with_gone

_LIVE = {
    "Q": "queued", "W": "queued", "T": "queued", "M": "queued", "H": "held", "S": "held", "U": "held",
    "R": "running", "E": "running", "B": "running",
}  # fmt: skip
_ANSWERS = re.compile(r"Unknown Job Id|Job has finished|Invalid job id", re.I)
_ID = r"\d+(?:\[\d*\])?\.[A-Za-z][\w.-]*"
_WALLTIME_KILL = -29
_DELETED = 271


class Pbs(Scheduler):
    """PBS Professional, OpenPBS."""

    name = "pbs"
    commands = ("qsub", "qstat", "qselect", "qdel")
    consequence = "The job would be deleted without a word."

    def submit_command(self, script: Path, dependencies: Sequence[Dependency]) -> list[str]:
        joined = ",".join(map(str, dependencies))
        return ["qsub", *(["-W", f"depend={joined}"] if joined else []), str(script)]

    def job_name(self, wanted: str, unique: str) -> str:
        return checked_name(wanted, unique, 64)

    def printed_id(self, output: str) -> str | None:
        found = re.findall(rf"^\s*({_ID})\s*$", output, re.M) or re.findall(rf"(?<![\w.])({_ID})", output)
        return found[-1] if found else None

    def named(self, name: str) -> list[str] | None:
        live = ask(["qselect", "-N", name])
        past = ask(["qselect", "-x", "-N", name]) if live.returncode == 0 else live
        if live.returncode:
            return None
        return list(dict.fromkeys([*past.stdout.split(), *live.stdout.split()]))

    def states(self, ids: Iterable[str]) -> dict[str, JobState]:
        ids = list(ids)
        if not ids:
            return {}
        live = ask(["qstat", "-f", "-F", "json", *ids])
        jobs = _jobs(live)
        if jobs is None:
            return unanswered(ids, live)
        found = _by_id(jobs, ids)
        rest = [job for job in ids if job not in found]
        if not rest:
            return found
        past = ask(["qstat", "-x", "-f", "-F", "json", *rest])
        jobs = _jobs(past)
        if jobs is None:
            return {**found, **unanswered(rest, past)}
        found |= _by_id(jobs, rest)
        silent = past.returncode == 0 and not jobs
        return with_gone(found, ids, "the server keeps no history of jobs" if silent else "")

    def cancel(self, ids: Sequence[str]) -> None:
        if ids:
            ask(["qdel", *ids])


def _jobs(result: subprocess.CompletedProcess[str]) -> dict[str, dict[str, Any]] | None:
    """Return the jobs in what qstat printed; None where it is no answer."""
    said = one_line(result.stderr)
    if result.returncode and not (result.returncode in (153, 35) or _ANSWERS.search(said)):
        return None
    start = result.stdout.find("{")  # a site's notice may stand before it
    if start < 0:
        return {} if result.returncode or not result.stdout.strip() else None
    try:
        return dict(json.loads(result.stdout[start:]).get("Jobs") or {})
    except (json.JSONDecodeError, AttributeError, ValueError):
        return None


def _by_id(jobs: dict[str, dict[str, Any]], ids: Iterable[str]) -> dict[str, JobState]:
    """Return the states under the requested ids: a server's own form can be longer (`12`, `12.pbs1`)."""
    states = {job.partition(".")[0]: _state(fields) for job, fields in jobs.items()}
    return {job: states[number] for job in ids if (number := job.partition(".")[0]) in states}


def _state(fields: dict[str, Any]) -> JobState:
    reason = str(fields.get("comment", ""))
    letter = str(fields.get("job_state", ""))
    if letter in _LIVE:
        return JobState(_LIVE[letter], reason)
    exit_code = fields.get("Exit_status")
    if exit_code is None:  # deleted before it ran: a parent failed, or qdel
        return JobState("cancelled", reason or "deleted before it ran")
    code = int(str(exit_code))
    if code == _WALLTIME_KILL:
        return JobState("failed", reason or "killed at its walltime", code)
    return JobState("finished" if code == 0 else "cancelled" if code == _DELETED else "failed", reason, code)
