"""Slurm through sbatch, squeue and scancel (22.05 observed).

`squeue --jobs` with ids that it does not know prints the others with exit code 0; with a single unknown id it prints
`Invalid job id specified` with exit code 1. Any other failure contains no information about the jobs. `exit_code` is
the status returned by wait(2): 768 is exit code 3.
"""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from megatron_cpt.launch.scheduler.job import Dependency
from megatron_cpt.launch.scheduler.queue import (
    JobState,
    Scheduler,
    ask,
    checked_name,
    joined_state,
    unanswered,
    with_gone,
)

_STATES = {
    "PENDING": "queued",
    "CONFIGURING": "queued",
    "REQUEUED": "queued",
    "REQUEUE_HOLD": "held",
    "SPECIAL_EXIT": "held",
    "SUSPENDED": "held",
    "STOPPED": "held",
    "RUNNING": "running",
    "SIGNALING": "running",
    "STAGE_OUT": "running",
    "RESIZING": "running",
    "COMPLETING": "running",
    "COMPLETED": "finished",
    "CANCELLED": "cancelled",
    "REVOKED": "cancelled",
    "PREEMPTED": "cancelled",
}
"""All others (FAILED, TIMEOUT, NODE_FAIL, OUT_OF_MEMORY ...) are failures."""
_FIELDS = "JobID:24,ArrayJobID:24,ArrayTaskID:24,State:24,exit_code:16,Reason:64"


class Slurm(Scheduler):
    """Slurm."""

    name = "slurm"
    commands = ("sbatch", "squeue", "scancel", "scontrol")
    consequence = "The job would start at once."

    def submit_command(self, script: Path, dependencies: Sequence[Dependency]) -> list[str]:
        joined = ",".join(map(str, dependencies))
        wait = [f"--dependency={joined}", "--kill-on-invalid-dep=yes"] if joined else []
        return ["sbatch", "--parsable", *wait, str(script)]

    def job_name(self, wanted: str, unique: str) -> str:
        return checked_name(wanted, unique, 64)

    def printed_id(self, output: str) -> str | None:
        found = re.findall(r"^(\d+)(?:;\S+)?\s*$", output, re.M) or re.findall(r"Submitted batch job (\d+)", output)
        return found[-1] if found else None

    def named(self, name: str) -> list[str] | None:
        result = ask(["squeue", "--noheader", "--me", "--states=all", f"--name={name}", "--Format=ArrayJobID:24"])
        return list(dict.fromkeys(result.stdout.split())) if result.returncode == 0 else None

    def states(self, ids: Iterable[str]) -> dict[str, JobState]:
        ids = list(ids)
        if not ids:
            return {}
        jobs = ",".join(dict.fromkeys(job.partition("_")[0] for job in ids))
        result = ask(["squeue", "--noheader", "--array", "--states=all", f"--jobs={jobs}", f"--Format={_FIELDS}"])
        if result.returncode and "Invalid job id" in result.stderr:
            return with_gone({}, ids)
        if result.returncode:
            return unanswered(ids, result)
        tasks: dict[str, list[JobState]] = {}
        for line in result.stdout.splitlines():
            job, array, task, state, status, *reason = line.split(None, 5)
            for key in dict.fromkeys((job, array, f"{array}_{task}")):
                tasks.setdefault(key, []).append(_state(state, int(status), " ".join(reason).strip()))
        return with_gone({job: joined_state(states) for job, states in tasks.items()}, ids)

    def cancel(self, ids: Sequence[str]) -> None:
        if ids:
            ask(["scancel", *ids])


def _state(word: str, status: int, reason: str) -> JobState:
    state = _STATES.get(word, "failed")
    reason = "" if reason == "None" else reason
    ended = state in ("finished", "failed", "cancelled")
    code = 128 + status % 128 if status % 128 else status // 256
    return JobState(state, reason or (word if state == "failed" else ""), code if ended else None)
