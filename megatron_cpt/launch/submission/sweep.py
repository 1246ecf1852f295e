"""A sweep: a small grid of settings, each point a labelled variant in a run directory of its own, one report at the end.

The grid's folder is `VARIANT+sweep` beside the points: `sweep.json` (what was asked for), `jobs/`, `logs/`, `report/`. On a
cluster the missing points are tasks of one array job and the report waits for it (afterany: a point that fails does not
keep the others from being compared); locally they run one after the other. The same command again submits the points
that are neither finished nor queued or running; a point that has begun continues from its last checkpoint.
"""

import dataclasses
import json
import logging
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_cpt.config.loading.resolve import LoadedConfig
from megatron_cpt.config.settings.derived import train_iters, world_size
from megatron_cpt.errors import ConfigError, LaunchError
from megatron_cpt.files import write_json
from megatron_cpt.launch.node.processes import process_environment
from megatron_cpt.launch.scheduler import queue
from megatron_cpt.launch.scheduler.job import Dependency, Job, parse_dependency
from megatron_cpt.launch.scheduler.local import run_local
from megatron_cpt.launch.scheduler.render import render_job
from megatron_cpt.launch.submission.grid import Point
from megatron_cpt.launch.submission.submit import (
    Submission,
    live_jobs,
    queue_job,
    show_dry_run,
    stage_job,
    training_job,
)
from megatron_cpt.launch.submission.validate import check_site, check_training
from megatron_cpt.run.directory import run_dir
from megatron_cpt.run.ledger import ACTIVE_STATES, append_record, read_jobs
from megatron_cpt.run.lock import run_lock
from megatron_cpt.run.progress import last_checkpoint
from megatron_cpt.run.variants import labelled

logger = logging.getLogger(__name__)

MAX_FAILURES = 2
"""Of a point's job that Slurm has queued again; a point has one link."""


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """A grid with the submissions of its points and of itself."""

    submission: Submission
    """Of the sweep's own folder: jobs, logs and report."""
    points: Sequence[Point]
    submissions: Sequence[Submission]
    """One per point."""
    old: tuple[str, ...]
    """Corpora that may not be forgotten."""


def check_sweep(sweep: Sweep) -> None:
    """Check every point that is not finished: site, data, checkpoint, disk, and that held-out losses will be there.

    Raises: LaunchError, ConfigError with the first point's problems.
    """
    config = sweep.submission.loaded.config
    if not config.evaluation.eval_interval:
        raise ConfigError(
            "evaluation.eval_interval: 0. A sweep compares held-out losses, which are measured during training. Set it."
        )
    if config.launch.scheduler != "local":
        check_site(config, sweep.submission.site)
    for submission in sweep.submissions:
        if not is_finished(submission):
            check_training(submission.loaded, submission.run)


def is_finished(submission: Submission) -> bool:
    """Return whether a point's last checkpoint is that of its last iteration."""
    return last_checkpoint(submission.run) >= train_iters(submission.loaded.config.training)


def write_sweep(sweep: Sweep) -> Path:
    """Write `sweep.json`, from which the report is made; run directories are named relative to it."""
    folder = sweep.submission.run.path
    mix = {name for submission in sweep.submissions for name in submission.loaded.config.data.mix}
    points = [
        {
            "label": point.label,
            "run": os.path.relpath(submission.run.path, folder),
            "axes": dict(point.axes),
            "train_iters": train_iters(submission.loaded.config.training),
        }
        for point, submission in zip(sweep.points, sweep.submissions, strict=True)
    ]
    content = {"format": 1, "old": list(sweep.old), "new": sorted(mix - {*sweep.old, "buffer"}), "points": points}
    write_json(folder / "sweep.json", content)
    return folder / "sweep.json"


def run_sweep(sweep: Sweep) -> int:
    """Train the missing points on this machine, one after the other, then write the report; return an exit code.

    A point that fails (a peak that diverges, say) does not stop the others; a user's mistake (2) does.
    """
    check_sweep(sweep)
    failed = 0
    for point, submission in zip(sweep.points, sweep.submissions, strict=True):
        config = submission.loaded.config
        if is_finished(submission):
            logger.info("%-24s finished", point.label)
            continue
        if sweep.submission.dry_run:
            sys.stdout.write(f"$ megatron-cpt train {_shown(submission.run_arguments)}\n")
            continue
        logger.info("%-24s megatron-cpt train %s", point.label, _shown(submission.run_arguments))
        code = run_local(
            run_dir(config),
            submission.run_arguments,
            num_ranks=world_size(config),
            max_restarts=config.launch.max_restarts,
        )
        failed = failed or code
        if code in (2, 130):
            return code
    report = _report_arguments(sweep)
    if sweep.submission.dry_run:
        sys.stdout.write(f"$ megatron-cpt {_shown(report)}\n")
        return 0
    write_sweep(sweep)
    environment = {**os.environ, "PYTHONPATH": process_environment(os.environ, 1)["PYTHONPATH"]}
    code = subprocess.run([sys.executable, "-m", "megatron_cpt", *report], env=environment, check=False).returncode
    return failed or code


def submit_sweep(sweep: Sweep) -> list[str]:
    """Submit the missing points as one array and the report behind it; return the new jobs' ids (none in a dry run)."""
    check_sweep(sweep)
    base = sweep.submission
    first = parse_dependency(base.depend, base.scheduler) if base.depend else ()
    if base.dry_run:
        missing = [index for index, submission in enumerate(sweep.submissions) if not is_finished(submission)]
        _show(sweep, missing, first)
        return []
    queue.check_commands(base.scheduler)
    queue.check_dependencies(base.scheduler, first)
    with run_lock(base.run.jobs / "submit.lock", "another submission"):
        alive = live_jobs(base, "train")
        taken = _labels_alive(sweep, alive)
        missing = []
        for index, (point, submission) in enumerate(zip(sweep.points, sweep.submissions, strict=True)):
            state = "finished" if is_finished(submission) else "queued or running" if point.label in taken else ""
            logger.info("%-24s %s", point.label, state or "submitted")
            missing += [] if state else [index]
        write_sweep(sweep)
        ids = []
        if missing:
            job, table = array_job(sweep, missing)
            write_json(_table_path(sweep), table)
            labels = [sweep.points[index].label for index in missing]
            fields = {"name": "sweep", "num_array_tasks": len(missing), "points": labels, "chain": base.stamp}
            ids.append(queue_job(base, job, first, fields))
            for task, index in enumerate(missing):
                run = sweep.submissions[index].run
                append_record(run.jobs, f"{ids[0]}/{task}", stage="train", scheduler=base.scheduler, state="submitted")
        if missing or not (alive or live_jobs(base, "report") or (base.run.report / "sweep.md").is_file()):
            waits = (Dependency("afterany", (*alive, *ids)),) if alive or ids else first
            report = stage_job(base, "report", _report_arguments(sweep))
            ids.append(queue_job(base, report, waits, {"name": "report"}))
    return ids


def array_job(sweep: Sweep, missing: Sequence[int]) -> tuple[Job, list[dict[str, Any]]]:
    """Return the job of the points in `missing`, and the table that tells each task what to train.

    Raises: LaunchError when the site allows no array that large.
    """
    base = sweep.submission
    if len(missing) > base.site.max_array_tasks:
        raise LaunchError(
            f"--grid: {len(missing)} points. The site allows {base.site.max_array_tasks} array tasks. Use a smaller grid."
        )
    job = training_job(base, 1, must_finish=True, max_failures=MAX_FAILURES)
    split = job.command.index("--")
    program = (base.python, "-m", "megatron_cpt", "train")
    command = (*job.command[:split], "--points", str(_table_path(sweep)), "--", *program)
    table = [
        {
            "run": str(sweep.submissions[index].run.path),
            "log_dir": str(sweep.submissions[index].run.logs / job.log_dir.name),
            "train_iters": train_iters(sweep.submissions[index].loaded.config.training),
            "arguments": list(sweep.submissions[index].run_arguments),
        }
        for index in missing
    ]
    job = dataclasses.replace(job, stage="train", name=f"{base.loaded.config.task}-sweep", command=command)
    return dataclasses.replace(job, num_array_tasks=len(missing)), table


def sweep_submission(submission: Submission, name: str) -> Submission:
    """Return the submission of the sweep's own folder, `VARIANT+NAME`."""
    config = submission.loaded.config
    own = dataclasses.replace(config, variant=labelled(config.variant, name))
    return dataclasses.replace(submission, loaded=LoadedConfig(own, submission.loaded.origins))


def _labels_alive(sweep: Sweep, alive: Sequence[str]) -> set[str]:
    """Return the points of arrays that the scheduler still holds, without those whose task has ended."""
    labels = set()
    jobs = read_jobs(sweep.submission.run.jobs)
    runs = {point.label: s.run for point, s in zip(sweep.points, sweep.submissions, strict=True)}
    for job in alive:
        for task, label in enumerate(jobs[job].get("points", [])):
            record = read_jobs(runs[label].jobs).get(f"{job}/{task}", {}) if label in runs else {}
            if record.get("state") in ACTIVE_STATES:
                labels.add(label)
    return labels


def _table_path(sweep: Sweep) -> Path:
    return sweep.submission.run.jobs / f"points-{sweep.submission.stamp}.json"


def _report_arguments(sweep: Sweep) -> list[str]:
    return ["evaluate", "sweep", str(sweep.submission.run.path), "--output", str(sweep.submission.run.report)]


def _show(sweep: Sweep, missing: Sequence[int], first: Sequence[Dependency]) -> None:
    base = sweep.submission
    for index, point in enumerate(sweep.points):
        state = "" if index in missing else "  (finished)"
        sys.stdout.write(f"# {point.label}: {_shown(sweep.submissions[index].run_arguments)}{state}\n")
    sys.stdout.write("\n")
    waits: Sequence[Dependency] = first
    if missing:
        job, table = array_job(sweep, missing)
        script = base.run.jobs / f"{job.log_dir.name}.sh"
        sys.stdout.write(f"# {_table_path(sweep)}\n{json.dumps(table, indent=1)}\n\n")
        show_dry_run(script, render_job(job, base.scheduler), queue.submit_command(base.scheduler, script, first))
        waits = (Dependency("afterany", ("<sweep>",)),)
    report = stage_job(base, "report", _report_arguments(sweep))
    script = base.run.jobs / f"{report.log_dir.name}.sh"
    show_dry_run(script, render_job(report, base.scheduler), queue.submit_command(base.scheduler, script, waits))


def _shown(arguments: Sequence[str]) -> str:
    return shlex.join(arguments)
