"""A sweep: a small grid of settings, each point a labelled variant in a run directory of its own, one report at the end.

The grid's folder is `VARIANT+sweep` next to the points: `sweep.json` (the request), `jobs/`, `logs/`, `report/`. On a
cluster the missing points are tasks of one array job and the report waits for it (afterany: a point that fails does not
keep the others from being compared); locally they run one after the other. The same command again submits the points
that are neither finished nor queued or running; a point that has begun continues from its last checkpoint.
"""

import dataclasses
import json
import logging
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_cpt.config.loading.resolve import LoadedConfig
from megatron_cpt.config.settings.derived import train_iters
from megatron_cpt.errors import ConfigError, CptError, LaunchError
from megatron_cpt.files import write_json
from megatron_cpt.launch.scheduler.job import Dependency
from megatron_cpt.launch.submission.chain import Submitted
from megatron_cpt.launch.submission.executor import Executor, after_of, executor_of
from megatron_cpt.launch.submission.grid import Point
from megatron_cpt.launch.submission.submit import Submission, job_of
from megatron_cpt.launch.submission.validate import check_training
from megatron_cpt.launch.submission.work import Link, Work
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
    """Corpora that must not be forgotten."""


def check_sweep(sweep: Sweep) -> None:
    """Check every point that is not finished: site, data, checkpoint, disk, and that held-out losses will be there.

    Raises: LaunchError, ConfigError with the first point's problems.
    """
    config = sweep.submission.loaded.config
    if not config.evaluation.eval_interval:
        raise ConfigError(
            "evaluation.eval_interval: 0. A sweep compares held-out losses, which are measured during training. Set it."
        )
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


def submit_sweep(sweep: Sweep) -> Submitted:
    """Train the missing points and write the report: here one after the other, on a cluster as one array with the report
    behind it.

    A point that fails here (a peak that diverges, say) does not stop the others; a user's mistake (2) does.
    """
    executor = executor_of(sweep.submission)
    problems = executor.problems()
    try:
        check_sweep(sweep)
    except CptError as problem:
        problems.append(str(problem))
    missing = [index for index, submission in enumerate(sweep.submissions) if not is_finished(submission)]
    if sweep.submission.dry_run:
        _show(sweep, executor, missing)
    if problems:
        raise LaunchError("\n".join(problems))
    if sweep.submission.dry_run:
        return Submitted()
    with run_lock(sweep.submission.run.jobs / "submit.lock", "another submission"):
        executor.begin()
        write_sweep(sweep)
        return _queue(sweep, executor) if executor.waits else _run_here(sweep, executor, missing)


def _run_here(sweep: Sweep, executor: Executor, missing: Sequence[int]) -> Submitted:
    ids, failed = [], 0
    for index in missing:
        point = executor_of(sweep.submissions[index])
        ids.append(point.submit(_point_work(sweep, index)))
        code = point.states(ids[-1:])[ids[-1]].exit_code or 0
        failed = failed or code
        if code in (2, 130):
            return Submitted(ids=tuple(ids), exit_code=code)
    ids.append(executor.submit(_report_work(sweep)))
    return Submitted(ids=tuple(ids), exit_code=failed or executor.states(ids[-1:])[ids[-1]].exit_code or 0)


def _queue(sweep: Sweep, executor: Executor) -> Submitted:
    base = sweep.submission
    alive = executor.live("train")
    taken = _labels_alive(sweep, alive)
    missing = []
    for index, (point, submission) in enumerate(zip(sweep.points, sweep.submissions, strict=True)):
        state = "finished" if is_finished(submission) else "queued or running" if point.label in taken else ""
        logger.info("%-24s %s", point.label, state or "submitted")
        missing += [] if state else [index]
    ids = []
    if missing:
        write_json(_table_path(sweep), point_table(sweep, missing))
        ids.append(executor.submit(array_work(sweep, missing), executor.parents()))
        for task, index in enumerate(missing):
            run = sweep.submissions[index].run
            append_record(run.jobs, f"{ids[0]}/{task}", stage="train", scheduler=base.scheduler, state="submitted")
    if missing or not (alive or executor.live("report") or (base.run.report / "sweep.md").is_file()):
        ids.append(executor.submit(_report_work(sweep), after_of((*alive, *ids), executor.parents(), "afterany")))
    return Submitted(ids=tuple(ids))


def array_work(sweep: Sweep, missing: Sequence[int]) -> Work:
    """Return the work of the points in `missing` as one array, whose table contains the run of each task.

    Raises: LaunchError when the site allows no array that large.
    """
    most = sweep.submission.site.max_array_tasks
    if len(missing) > most:
        raise LaunchError(f"--grid: {len(missing)} points. The site allows {most} array tasks. Use a smaller grid.")
    return Work(
        name="sweep",
        stage="train",
        words=("train",),
        on_ranks=True,
        link=Link(number=1, max_failures=MAX_FAILURES),
        num_array_tasks=len(missing),
        points=str(_table_path(sweep)),
        fields={"points": [sweep.points[index].label for index in missing]},
    )


def point_table(sweep: Sweep, missing: Sequence[int]) -> list[dict[str, Any]]:
    """Return what each task of the array trains."""
    label = job_of(sweep.submission, array_work(sweep, missing)).log_dir.name
    return [
        {
            "run": str(submission.run.path),
            "log_dir": str(submission.run.logs / label),
            "train_iters": train_iters(submission.loaded.config.training),
            "arguments": list(submission.run_arguments),
        }
        for submission in (sweep.submissions[index] for index in missing)
    ]


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


def _point_work(sweep: Sweep, index: int) -> Work:
    words = ("train", *sweep.submissions[index].run_arguments)
    return Work(name="train", stage="train", words=words, on_ranks=True, link=Link(number=1))


def _report_work(sweep: Sweep) -> Work:
    run = sweep.submission.run
    return Work(name="report", stage="report", words=("evaluate", "sweep", str(run.path), "--output", str(run.report)))


def _show(sweep: Sweep, executor: Executor, missing: Sequence[int]) -> None:
    if not executor.waits:
        for index in missing:
            executor.show(_point_work(sweep, index))
        executor.show(_report_work(sweep))
        return
    for index, point in enumerate(sweep.points):
        state = "" if index in missing else "  (finished)"
        sys.stdout.write(f"# {point.label}: {shlex.join(sweep.submissions[index].run_arguments)}{state}\n")
    sys.stdout.write("\n")
    waits: Sequence[Dependency] = executor.shown_parents()
    if missing:
        sys.stdout.write(f"# {_table_path(sweep)}\n{json.dumps(point_table(sweep, missing), indent=1)}\n\n")
        executor.show(array_work(sweep, missing), waits)
        waits = (Dependency("afterany", ("<sweep>",)),)
    executor.show(_report_work(sweep), waits)
