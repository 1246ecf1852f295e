"""The state of a run's jobs from the ledger, the scheduler and the job itself: one function, one table.

| ledger | scheduler | state |
|---|---|---|
| submitted | queued, held, running | the scheduler's |
| submitted, running | finished, failed, cancelled | the scheduler's, written down |
| submitted, running | gone | `lost`, written down |
| submitted, running | no answer | `unknown`, never written down |
| running | queued, held | `requeued`: it was preempted and waits again |
| finished, stopped (exit code 0) | anything that ended, gone, no answer | the ledger's: the job itself wrote it last |
| finished, stopped, failed | queued, held, running | the scheduler's: Slurm queued it again, or it is ending |
| failed | anything else | failed, with the exit code of the ledger |
| cancelled, lost | queued, held, running | the scheduler's |
| cancelled, lost | anything else | the ledger's |

The job itself writes `running` and how it ended. So PBS's -29 for a job that saved at its walltime and ended well counts less
than the `stopped` that the job wrote.
"""

from collections.abc import Mapping
from typing import Any

from megatron_cpt.errors import LaunchError
from megatron_cpt.launch.scheduler import local
from megatron_cpt.launch.scheduler.choice import scheduler_of
from megatron_cpt.launch.scheduler.queue import ALIVE, JobState
from megatron_cpt.run.directory import RunDir
from megatron_cpt.run.ledger import ACTIVE_STATES, append_record, read_jobs

ENDED = ("finished", "failed", "cancelled")


def joined(ledger: str, seen: JobState) -> tuple[str, bool]:
    """Return a job's state from the ledger's and the scheduler's, and whether it is news for the ledger."""
    if seen.state in ALIVE:
        return ("requeued" if ledger == "running" and seen.state != "running" else seen.state), False
    if ledger not in ACTIVE_STATES:
        return ledger, False
    if seen.state == "unknown":
        return "unknown", False
    return ("lost" if seen.state == "gone" else seen.state), True


def job_states(run: RunDir) -> dict[str, JobState]:
    """Return the state of every job of a run's ledger; each scheduler is asked once.

    An end that the ledger did not know is added to it.
    """
    records = {job: record for job, record in read_jobs(run.jobs).items() if "/" not in job}
    states = {}
    seen = _seen(records)
    for job, record in records.items():
        ledger = str(record.get("state", "unknown"))
        state, is_news = joined(ledger, seen[job])
        if is_news:
            latest = read_jobs(run.jobs)[job]  # it may have ended while the scheduler was asked
            ledger = str(latest.get("state", "unknown"))
            state, is_news = joined(ledger, seen[job])
        if is_news:
            append_record(run.jobs, job, state=state, exit_code=seen[job].exit_code, reason=seen[job].reason)
        is_own = state == ledger
        reason = str(record.get("reason", "")) if is_own and record.get("reason") else seen[job].reason
        code = record.get("exit_code") if is_own else seen[job].exit_code
        states[job] = JobState(state, reason, code)
    return states


def _seen(records: Mapping[str, Mapping[str, Any]]) -> dict[str, JobState]:
    """Return the schedulers' states of the jobs that can still change, and `gone` for the others."""
    seen = {job: JobState("gone") for job in records}
    for name in ("pbs", "slurm"):
        ids = [job for job, record in records.items() if record.get("scheduler") == name and _may_change(record)]
        try:
            seen |= scheduler_of(name).states(ids) if ids else {}
        except LaunchError as problem:  # looked at from a machine without the scheduler's commands
            seen |= dict.fromkeys(ids, JobState("unknown", str(problem)))
    return seen | {job: local.job_state(record) for job, record in records.items() if _is_local(record)}


def _is_local(record: Mapping[str, Any]) -> bool:
    return record.get("scheduler", "local") == "local"


def _may_change(record: Mapping[str, Any]) -> bool:
    """Return whether a job's state can still change: Slurm queues a preempted job again after it has written its
    end."""
    state = record.get("state")
    return state in ACTIVE_STATES or (
        record.get("scheduler") == "slurm" and state in ("failed", "stopped", "cancelled")
    )
