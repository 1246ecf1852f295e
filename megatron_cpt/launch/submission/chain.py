"""Training as a chain of jobs, each of one walltime, each continuing from the last checkpoint.

Every link has the dependencies of training (`afterok` of the parents) and comes after all links before it (`afterany`):
a link whose parents failed never starts, and a cancelled link does not let the next one start while another one is running.
"""

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_cpt.config.settings.derived import train_iters
from megatron_cpt.errors import LaunchError
from megatron_cpt.launch.scheduler.job import Dependency
from megatron_cpt.launch.submission.executor import Executor, executor_of
from megatron_cpt.launch.submission.submit import Submission
from megatron_cpt.launch.submission.validate import training_problems
from megatron_cpt.launch.submission.work import Link, Work
from megatron_cpt.run.ledger import read_jobs
from megatron_cpt.run.lock import run_lock
from megatron_cpt.run.progress import last_checkpoint

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Submitted:
    """Result of a `submit` command."""

    ids: tuple[str, ...] = ()
    """Jobs that it submitted or ran."""
    exit_code: int = 0
    """Of the first job that ended with another one than 0 while the command ran."""


def submit_training(submission: Submission, *, num_links: int = 1, max_failures: int = 2) -> Submitted:
    """Train: on this machine now, on a cluster as `num_links` jobs, each after those before.

    Links of the run that are queued or running already count: only the missing ones are submitted, behind them.

    Raises: LaunchError, DataError, ConfigError before anything is queued.
    """
    if num_links < 1:
        raise LaunchError(f"--chain {num_links}: a chain has at least one link. Give 1 or more.")
    executor, run = executor_of(submission), submission.run
    iterations = train_iters(submission.loaded.config.training)
    work = Work(
        name="train", stage="train", words=("train", *submission.run_arguments), on_ranks=True, link=Link(number=1)
    )
    is_finished = executor.waits and not submission.estimate and last_checkpoint(run) >= iterations
    problems = executor.problems() + ([] if is_finished else training_problems(submission.loaded, run))
    if submission.dry_run:
        show_links(executor, work, (), executor.shown_parents(), num_links=num_links, max_failures=max_failures)
    if problems:
        raise LaunchError("\n".join(problems))
    if submission.dry_run:
        return Submitted()
    if is_finished:
        logger.info("%s: finished at iteration %d, nothing to submit", run.path, iterations)
        return Submitted()
    with run_lock(run.jobs / "submit.lock", "another submission"):
        executor.begin()
        alive = executor.live("train")
        if alive and num_links == 1:
            raise LaunchError(
                f"{run.path}: job {', '.join(alive)} of this run is queued or running. One job at a time may "
                "work on a run. Wait, cancel it, or use --chain to line up links behind it."
            )
        ids = submit_links(
            executor, work, alive, (), executor.parents(), num_links=num_links, max_failures=max_failures
        )
    codes = [executor.states([job])[job].exit_code for job in ids] if not executor.waits else []
    return Submitted(ids=tuple(ids), exit_code=next((code for code in codes if code), 0))


def submit_links(
    executor: Executor,
    work: Work,
    alive: Sequence[str],
    parents: Sequence[str],
    first: Sequence[Dependency],
    *,
    num_links: int,
    max_failures: int,
) -> list[str]:
    """Submit the links that are missing behind those that are `alive`; return all ids. The caller holds the lock.

    `parents` must have finished before any link starts; without parents, `first` applies to the first link.
    """
    submission = executor.submission
    chain = read_jobs(submission.run.jobs)[alive[-1]].get("chain") if alive else None
    executor.submission = dataclasses.replace(submission, chain=chain)
    if not alive:
        (submission.run.path / "stop_chain").unlink(missing_ok=True)
    ids = list(alive[:num_links])
    for number in range(len(ids) + 1, num_links + 1):
        link = Link(number=number, is_last=number == num_links, max_failures=max_failures)
        after = link_condition(ids, parents, first)
        ids.append(executor.submit(dataclasses.replace(work, link=link), after))
    return ids


def show_links(
    executor: Executor,
    work: Work,
    parents: Sequence[str],
    first: Sequence[Dependency],
    *,
    num_links: int,
    max_failures: int,
) -> None:
    """Write what `submit_links` would do; ids of jobs to come are their names in angle brackets."""
    before: list[str] = []
    for number in range(1, num_links + 1):
        link = Link(number=number, is_last=number == num_links, max_failures=max_failures)
        executor.show(dataclasses.replace(work, link=link), link_condition(before, parents, first))
        before.append(f"<{work.name} {number}>")


def link_condition(
    before: Sequence[str], parents: Sequence[str], first: Sequence[Dependency]
) -> tuple[Dependency, ...]:
    """Return the condition of a link: its parents have finished, and all links before it have ended."""
    needed = (Dependency("afterok", tuple(parents)),) if parents else tuple(first)
    return (*needed, Dependency("afterany", tuple(before))) if before else needed
