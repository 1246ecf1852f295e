"""The state of a run as a table: its jobs from ledger and scheduler, its progress from the metrics.

The table shows the reason why a job waits or died: the scheduler's message, the job's exit code, or the first error
line in its logs. A job that the ledger believes alive and the scheduler no longer knows was lost; submitting again
repairs it. `launch/scheduler/states.py` defines how the two are combined.
"""

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_cpt.config.settings.derived import train_iters, train_tokens
from megatron_cpt.config.settings.schema import RunConfig
from megatron_cpt.launch.scheduler.states import job_states
from megatron_cpt.log import format_count, format_seconds
from megatron_cpt.run.directory import RunDir
from megatron_cpt.run.ledger import read_jobs
from megatron_cpt.run.progress import first_error, last_checkpoint, read_progress

_ABORTED_SECONDS = 600
"""Silence after which a training job is suspected to hang."""


@dataclass(frozen=True)
class JobRow:
    """One line of the table."""

    job: str
    stage: str
    state: str
    age: str
    restarts: int
    reason: str


def job_rows(run: RunDir, now: float | None = None) -> list[JobRow]:
    """Return the run's jobs, oldest first, with the scheduler's states where it still knows them.

    If the scheduler reports the end of a job that is alive in the ledger, the ledger is updated. If the scheduler does
    not answer, the state is `unknown` and the ledger is unchanged.
    """
    now = time.time() if now is None else now
    states = job_states(run)
    rows = []
    for job, record in read_jobs(run.jobs).items():
        if "/" in job:
            continue
        seen = states[job]
        state, reason = seen.state, seen.reason
        if state in ("failed", "lost", "cancelled") and not reason.startswith("links"):
            found = first_error(Path(str(record["log_dir"]))) if record.get("log_dir") else None
            reason = found or reason or f"exit code {record.get('exit_code')}"
        age = format_seconds(max(now - _number(record.get("submitted"), now), 0))
        name = str(record.get("name") or record.get("stage", "?"))
        rows.append(JobRow(job, name, state, age, int(_number(record.get("restarts"), 0)), reason))
    return rows


def _number(value: Any, otherwise: float) -> float:
    """Return a number of the ledger's; a damaged one is not worth the table."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) and value else otherwise


def status_text(run: RunDir, config: RunConfig | None, now: float | None = None) -> str:
    """Return the table; `config` contains the length of the run, if known."""
    now = time.time() if now is None else now
    rows = job_rows(run, now)
    table = [("job", "stage", "state", "since", "restarts", "why")]
    table += [(row.job, row.stage, row.state, row.age, str(row.restarts), row.reason) for row in rows]
    widths = [max(len(line[column]) for line in table) for column in range(5)]
    lines = [str(run.path), *_progress_lines(run, config, rows, now), ""]
    for line in table if rows else []:
        lines.append(
            "  ".join([*(cell.ljust(width) for cell, width in zip(line[:5], widths, strict=True)), line[5]]).rstrip()
        )
    return "\n".join(lines) + "\n"


def _progress_lines(run: RunDir, config: RunConfig | None, rows: list[JobRow], now: float) -> list[str]:
    progress = read_progress(run)
    checkpoint = last_checkpoint(run)
    if progress.last_time is None:
        return ["no training yet"]
    iterations = f"iteration {progress.iteration:,}"
    tokens = f"{format_count(progress.consumed_tokens)} tokens"
    eta = ""
    if config is not None:
        total = train_tokens(config.training)
        iterations += f" of {train_iters(config.training):,}"
        tokens += f" of {format_count(total)}"
        left = total - progress.consumed_tokens
        if progress.tokens_per_second and left > 0:
            eta = f", {format_seconds(left / progress.tokens_per_second)} left"
    loss = f", loss {progress.loss:.4f}" if progress.loss is not None else ""
    rate = f", {progress.tokens_per_second:,.0f} tokens/s" if progress.tokens_per_second else ""
    lines = [f"{iterations}, {tokens}{loss}{rate}{eta}"]
    silence = now - progress.last_time
    ended = f", ended: {progress.end_reason}" if progress.end_reason else ""
    lines.append(
        f"last checkpoint {checkpoint:,}, {max(progress.num_starts - 1, 0)} resumes, "
        f"last record {format_seconds(silence)} ago{ended}"
    )
    is_running = any(row.state == "running" and row.stage == "train" for row in rows)
    if is_running and not progress.end_reason and silence > _ABORTED_SECONDS:
        lines.append(f"nothing was logged for {format_seconds(silence)}: the job may hang; look at its logs")
    return lines
