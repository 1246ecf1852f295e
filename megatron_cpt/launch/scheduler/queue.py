"""What a scheduler is asked through its own commands: submit, the states of jobs, cancel.

States are `queued`, `held`, `running`, `finished`, `failed`, `cancelled` and `unknown`; `reason` is the scheduler's own word
for why. Facts that shape this module: Slurm takes a dependency on an unknown id and runs at once, and leaves a job
whose parent failed pending for ever without `--kill-on-invalid-dep`; PBS takes both and deletes the job later without a
word. So parents are looked up before submission.
"""

import json
import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_cpt.errors import LaunchError
from megatron_cpt.launch.scheduler.job import Dependency

TIMEOUT_SECONDS = 60
ALIVE = ("queued", "held", "running")
"""States of a job that may still run."""
_COMMANDS = {
    "pbs": {"submit": "qsub", "state": "qstat", "cancel": "qdel"},
    "slurm": {"submit": "sbatch", "state": "scontrol", "cancel": "scancel"},
}
_SLURM_STATES = {
    "PENDING": "queued",
    "CONFIGURING": "queued",
    "REQUEUED": "queued",
    "REQUEUE_HOLD": "held",
    "SUSPENDED": "held",
    "RUNNING": "running",
    "COMPLETING": "running",
    "COMPLETED": "finished",
    "CANCELLED": "cancelled",
    "PREEMPTED": "cancelled",
}
_PBS_STATES = {
    "Q": "queued", "W": "queued", "T": "queued", "H": "held", "S": "held", "U": "held",
    "R": "running", "E": "running", "B": "running",
}  # fmt: skip


@dataclass(frozen=True)
class JobState:
    """What the scheduler says of one job."""

    state: str
    reason: str = ""
    exit_code: int | None = None


def check_commands(scheduler: str) -> None:
    """Raise LaunchError unless the scheduler's commands are on PATH."""
    missing = [name for name in _COMMANDS[scheduler].values() if shutil.which(name) is None]
    if missing:
        raise LaunchError(
            f"launch.scheduler: {scheduler}, but {', '.join(missing)} is not on PATH. A login node of the site is needed. "
            "Log in there, or use launch.scheduler=local, or --dry-run."
        )


def submit_command(scheduler: str, script: Path, dependencies: Sequence[Dependency]) -> list[str]:
    """Return the command that submits a job script after other jobs."""
    joined = ",".join(map(str, dependencies))
    if scheduler == "pbs":
        return ["qsub", *(["-W", f"depend={joined}"] if joined else []), str(script)]
    wait = [f"--dependency={joined}", "--kill-on-invalid-dep=yes"] if joined else []
    return ["sbatch", "--parsable", *wait, str(script)]


def submit(scheduler: str, script: Path, dependencies: Sequence[Dependency]) -> str:
    """Submit a job script; return the job's id.

    Raises: LaunchError with the scheduler's own message.
    """
    command = submit_command(scheduler, script, dependencies)
    result = _run(command)
    if result.returncode:
        raise LaunchError(
            f"{' '.join(command)}: exit code {result.returncode}: {_one_line(result.stderr or result.stdout)}. "
            "The scheduler refused the job. Mend the site file or the options and submit again."
        )
    job = result.stdout.strip().splitlines()[-1].split(";")[0].strip() if result.stdout.strip() else ""
    if not re.fullmatch(r"\d+\S*", job):
        raise LaunchError(f"{command[0]}: printed {result.stdout!r}. A job id is needed. Look at the queue by hand.")
    return job


def job_states(scheduler: str, ids: Iterable[str]) -> dict[str, JobState]:
    """Return the state of every id; `unknown` for those that the scheduler does not know (any more)."""
    read = _pbs_state if scheduler == "pbs" else _slurm_state
    return {job: read(job) for job in ids}


def cancel(scheduler: str, ids: Sequence[str]) -> None:
    """Cancel jobs; one that has ended already is no error."""
    if ids:
        _run([_COMMANDS[scheduler]["cancel"], *ids])


def check_dependencies(scheduler: str, dependencies: Sequence[Dependency]) -> None:
    """Raise LaunchError for a parent that is unknown, or that can no longer satisfy its dependency."""
    for dependency in dependencies:
        for job, state in job_states(scheduler, dependency.ids).items():
            if state.state == "unknown":
                raise LaunchError(
                    f"--depend {dependency}: {scheduler} knows no job {job}. {_CONSEQUENCE[scheduler]} "
                    "Name a job that is queued, running or finished."
                )
            hopeless = {"afterok": ("failed", "cancelled"), "afternotok": ("finished",)}.get(dependency.kind, ())
            if state.state in hopeless:
                raise LaunchError(
                    f"--depend {dependency}: job {job} has {state.state} already, so this job could never start. "
                    "Repair that job first, or depend on another one."
                )


_CONSEQUENCE = {
    "pbs": "The job would be deleted without a word.",
    "slurm": "The job would start at once.",
}


def _slurm_state(job: str) -> JobState:
    result = _run(["scontrol", "-o", "show", "job", job])
    if result.returncode:
        return JobState("unknown")
    states = [_slurm_task_state(line) for line in result.stdout.splitlines() if "JobState=" in line]
    return _joined(states)


def _slurm_task_state(line: str) -> JobState:
    fields = dict(re.findall(r"(\w+)=(\S*)", line))
    state = _SLURM_STATES.get(fields.get("JobState", ""), "failed")  # FAILED, TIMEOUT, NODE_FAIL, OUT_OF_MEMORY ...
    code, _, number = fields.get("ExitCode", "0:0").partition(":")
    exit_code = 128 + int(number) if number not in ("", "0") else int(code)
    reason = fields.get("Reason", "None")
    if state == "failed" and reason == "None":
        reason = fields["JobState"]
    ended = state in ("finished", "failed", "cancelled")
    return JobState(state, "" if reason == "None" else reason, exit_code if ended else None)


def _pbs_state(job: str) -> JobState:
    result = _run(["qstat", "-x", "-f", "-F", "json", job])
    if result.returncode:
        return JobState("unknown")
    try:
        jobs = json.loads(result.stdout)["Jobs"]
    except (json.JSONDecodeError, KeyError):
        return JobState("unknown", "qstat's answer is not JSON")
    return _joined([_pbs_job_state(fields) for fields in jobs.values()])


def _pbs_job_state(fields: dict[str, object]) -> JobState:
    reason = str(fields.get("comment", ""))
    letter = str(fields.get("job_state", ""))
    if letter in _PBS_STATES:
        return JobState(_PBS_STATES[letter], reason)
    exit_code = fields.get("Exit_status")
    if exit_code is None:  # deleted before it ran: a parent failed, or qdel
        return JobState("cancelled", reason or "deleted before it ran")
    code = int(str(exit_code))
    return JobState("finished" if code == 0 else "cancelled" if code == 271 else "failed", reason, code)


def _joined(states: list[JobState]) -> JobState:
    """Return the state of an array from its tasks': alive while one is, failed when one did."""
    for name in ("running", "queued", "held", "failed", "cancelled"):
        for state in states:
            if state.state == name:
                return state
    return states[0] if states else JobState("unknown")


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False)
    except FileNotFoundError:
        raise LaunchError(
            f"{command[0]}: not on PATH. The scheduler's commands are needed. Use a login node."
        ) from None
    except subprocess.TimeoutExpired:
        raise LaunchError(
            f"{command[0]}: no answer within {TIMEOUT_SECONDS} s. The scheduler is busy. Try later."
        ) from None


def _one_line(text: str) -> str:
    return " ".join(text.split())
