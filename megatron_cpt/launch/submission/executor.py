"""Executors of a piece of work: this machine, at once, or a batch scheduler, later. Every launch feature speaks to this
interface.

`submit` returns a job's id. On this machine the job has ended by then, with its final state; a scheduler's job can wait
for others. An option that an executor does not support (`supports`) is refused by name.
"""

import abc
import dataclasses
import logging
import os
import shlex
import sys
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from megatron_cpt.config.settings.derived import world_size
from megatron_cpt.errors import CptError, LaunchError
from megatron_cpt.files import write_text
from megatron_cpt.launch.scheduler import local
from megatron_cpt.launch.scheduler.choice import scheduler_of
from megatron_cpt.launch.scheduler.job import Dependency, Job, parse_dependency
from megatron_cpt.launch.scheduler.queue import ALIVE, JobState, NotKnown
from megatron_cpt.launch.scheduler.render import render_job
from megatron_cpt.launch.submission.submit import Submission, job_of
from megatron_cpt.launch.submission.validate import check_site
from megatron_cpt.launch.submission.work import Work
from megatron_cpt.run.intents import close_intent, open_intents, write_intent
from megatron_cpt.run.ledger import append_record, read_jobs

logger = logging.getLogger(__name__)

_SETTLE_SECONDS = 10.0
"""Time that a scheduler is given to show a job whose submission it did not answer."""
_ADVICE = {
    "--depend": "it runs everything at once",
    "--queue": "it has no queues",
    "--account": "it has no accounts",
    "--chain": "it has no walltime; launch.max_restarts continues a training that died",
    "--max-failures": "it has no chains; launch.max_restarts is its limit",
    "--array-tasks": "tokenizing uses all cores in one process group",
}


class Executor(abc.ABC):
    """Runs or queues the work of one submission."""

    options: frozenset[str] = frozenset()
    """Options of `submit` that it supports, of those in `_ADVICE`."""
    waits = False
    """Whether a job can wait for others; otherwise it has ended when `submit` returns."""

    def __init__(self, submission: Submission):
        self.submission = submission

    @property
    def name(self) -> str:
        """local, pbs or slurm."""
        return self.submission.scheduler

    def supports(self, option: str) -> bool:
        """Return whether an option of `submit` means something here."""
        return option in self.options or option not in _ADVICE

    def check_options(self, given: Mapping[str, object]) -> None:
        """Raise LaunchError for options that were given (not None) and are not supported."""
        wrong = [
            f"{option} {value}: launch.scheduler is {self.name}; {_ADVICE[option]}. Leave it out, or name a --site."
            for option, value in given.items()
            if value is not None and not self.supports(option)
        ]
        if wrong:
            raise LaunchError("\n".join(wrong))

    @abc.abstractmethod
    def problems(self) -> list[str]:
        """Return what keeps this executor from working, found without asking anybody: a line each."""

    @abc.abstractmethod
    def begin(self) -> None:
        """Make sure, under the submission's lock, that the executor can be asked and that all its jobs are known.

        Raises: LaunchError.
        """

    @abc.abstractmethod
    def parents(self) -> tuple[Dependency, ...]:
        """Return what the first jobs wait for: `--depend`."""

    def shown_parents(self) -> tuple[Dependency, ...]:
        """Return `parents` for a dry run, which shows what it can."""
        try:
            return self.parents()
        except LaunchError:  # among the problems that a dry run lists
            return ()

    @abc.abstractmethod
    def live(self, stage: str, name: str | None = None) -> list[str]:
        """Return the ids of this run's jobs of a stage that can still run, in the order of submission.

        Raises: NotKnown when that cannot be told.
        """

    @abc.abstractmethod
    def submit(self, work: Work, after: Sequence[Dependency] = ()) -> str:
        """Run or queue work; return the job's id."""

    @abc.abstractmethod
    def show(self, work: Work, after: Sequence[Dependency] = ()) -> None:
        """Write to stdout what `submit` would do."""

    @abc.abstractmethod
    def states(self, ids: Iterable[str]) -> dict[str, JobState]:
        """Return the states of jobs."""

    @abc.abstractmethod
    def cancel(self, ids: Sequence[str]) -> None:
        """Cancel jobs; one that has ended already is no error."""


class Local(Executor):
    """This machine."""

    def __init__(self, submission: Submission):
        super().__init__(submission)
        self._ended: dict[str, JobState] = {}

    def problems(self) -> list[str]:
        return []

    def begin(self) -> None:
        pass

    def parents(self) -> tuple[Dependency, ...]:
        return ()

    def live(self, stage: str, name: str | None = None) -> list[str]:
        return []  # the run's lock tells

    def submit(self, work: Work, after: Sequence[Dependency] = ()) -> str:
        submission = self.submission
        logger.info("%-14s megatron-cpt %s", work.name, shlex.join(work.words))
        job = local.job_name()
        if work.on_ranks:
            config = submission.loaded.config
            code = local.run_local(
                submission.run,
                work.words[1:],
                num_ranks=world_size(config),
                max_restarts=config.launch.max_restarts if work.link else 0,
                stage=work.stage,
                program=("-m", "megatron_cpt", work.words[0]),
                job=job,
                fields={"name": work.name, **work.fields},
            )
        else:
            code = local.run_once(submission.run, job, work.stage, work.name, work.words, work.reads, work.writes)
        self._ended[job] = JobState("failed" if code else "finished", exit_code=code)
        return job

    def show(self, work: Work, after: Sequence[Dependency] = ()) -> None:
        ranks = f"  # on {world_size(self.submission.loaded.config)} local ranks" if work.on_ranks else ""
        sys.stdout.write(f"$ megatron-cpt {shlex.join(work.words)}{ranks}\n")

    def states(self, ids: Iterable[str]) -> dict[str, JobState]:
        jobs = read_jobs(self.submission.run.jobs)
        return {job: self._ended.get(job) or local.job_state(jobs.get(job, {})) for job in ids}

    def cancel(self, ids: Sequence[str]) -> None:
        jobs = read_jobs(self.submission.run.jobs)
        for job in ids:
            local.end_job(jobs.get(job, {}))


class Batch(Executor):
    """PBS or Slurm, which differ in their commands only (`launch/scheduler/queue.py`)."""

    options = frozenset(_ADVICE)
    waits = True

    def __init__(self, submission: Submission):
        super().__init__(submission)
        self.scheduler = scheduler_of(submission.scheduler)

    def problems(self) -> list[str]:
        found = []
        for check in (lambda: check_site(self.submission.loaded.config.launch, self.submission.site), self.parents):
            try:
                check()
            except CptError as problem:
                found.append(str(problem))
        return found

    def parents(self) -> tuple[Dependency, ...]:
        depend = self.submission.depend
        return parse_dependency(depend, self.name) if depend else ()

    def begin(self) -> None:
        self.scheduler.check_commands()
        self.scheduler.check_dependencies(self.parents())
        self._settle_intents()

    def live(self, stage: str, name: str | None = None) -> list[str]:
        # A record with a slash is a task of an array. The scheduler is asked about the array's own id.
        candidates = [
            job
            for job, record in read_jobs(self.submission.run.jobs).items()
            if record.get("stage") == stage
            and record.get("scheduler") == self.name
            and (name is None or record.get("name") == name)
            and "/" not in job
        ]
        states = self.states(candidates)
        for job, state in states.items():
            if state.state == "unknown":
                raise NotKnown(
                    f"{self.submission.run.path}: {self.name} does not answer about job {job} ({state.reason}). Whether it "
                    "is still there must be known before more is submitted. Give the same command again later."
                )
        return [job for job in candidates if states[job].state in ALIVE]

    def submit(self, work: Work, after: Sequence[Dependency] = ()) -> str:
        job = self._named(job_of(self.submission, work))
        run, script = self.submission.run, self._script(job)
        job.log_dir.mkdir(parents=True, exist_ok=True)  # PBS holds a job, Slurm fails it, whose log folder is missing
        write_text(script, render_job(job, self.name))
        fields: dict[str, object] = {
            "stage": job.stage,
            "name": work.name,
            "scheduler": self.name,
            "command": self.scheduler.submit_command(script, after),
            "dependencies": [str(dependency) for dependency in after],
            "nodes": job.nodes,
            "script": str(script),
            "log_dir": str(job.log_dir),
            "num_array_tasks": work.num_array_tasks,
            **work.fields,
        }
        if work.link is not None:
            fields |= {"chain": self.submission.chain or self.submission.stamp, "link": work.link.number}
        # Written first: if the scheduler takes the job and its answer is lost, the next command finds the job by
        # its unique name and does not submit a second one.
        write_intent(run.jobs, job.name, fields)
        try:
            identifier = self.scheduler.submit(script, after, job.name)
        # The intent stays open: only a refusal is known to have left no job.
        except NotKnown:
            raise
        except LaunchError:
            close_intent(run.jobs, job.name)
            raise
        self._enter(identifier, job.name, fields)
        logger.info("%-14s job %s, logs in %s", work.name, identifier, job.log_dir)
        return identifier

    def show(self, work: Work, after: Sequence[Dependency] = ()) -> None:
        job = job_of(self.submission, work)
        job = dataclasses.replace(job, name=self.scheduler.job_name(job.name, "xxxxxxxx"))
        script = self._script(job)
        command = shlex.join(self.scheduler.submit_command(script, after))
        sys.stdout.write(f"# {script}\n{render_job(job, self.name)}\n$ {command}\n\n")

    def states(self, ids: Iterable[str]) -> dict[str, JobState]:
        return self.scheduler.states(ids)

    def cancel(self, ids: Sequence[str]) -> None:
        self.scheduler.cancel(ids)

    def _named(self, job: Job) -> Job:
        return dataclasses.replace(job, name=self.scheduler.job_name(job.name, uuid.uuid4().hex[:8]))

    def _script(self, job: Job) -> Path:
        return self.submission.run.jobs / f"{job.log_dir.name}.sh"

    def _enter(self, identifier: str, name: str, fields: Mapping[str, object]) -> None:
        """Enter a job that the scheduler has taken into the ledger; a job that has begun by now keeps its state."""
        run = self.submission.run
        # The job can start and write its own record before this process does.
        has_begun = identifier in read_jobs(run.jobs)
        state = {} if has_begun else {"state": "submitted"}
        append_record(run.jobs, identifier, **{**fields, **state, "job_name": name})
        close_intent(run.jobs, name)
        link = run.logs / identifier.replace("/", "_")
        if not os.path.lexists(link):
            link.symlink_to(str(fields["log_dir"]).rpartition("/")[2])

    def _settle_intents(self) -> None:
        """Find out what became of submissions whose answer was lost: the scheduler has the job, or the job itself wrote.

        Raises: NotKnown when the scheduler does not answer.
        """
        run = self.submission.run
        for name, (written, fields) in open_intents(run.jobs).items():
            if fields.get("scheduler") != self.name:
                continue
            found = self.scheduler.named(name)
            # [] means that the scheduler knows no such job, None that it did not answer. A new job can be missing
            # from the queue for some seconds.
            if found == [] and time.time() - written < _SETTLE_SECONDS:
                time.sleep(max(_SETTLE_SECONDS - (time.time() - written), 0))
                found = self.scheduler.named(name)
            found = (
                # A short job can have left the queue. The record that it wrote itself has the same name.
                found or [job for job, record in read_jobs(run.jobs).items() if record.get("job_name") == name] or found
            )
            if found is None:
                raise NotKnown(
                    f"{run.path}: {self.name} does not say whether it has taken the job {name}. Nothing is submitted before "
                    "that is known. Give the same command again later."
                )
            if found:
                logger.warning("%s: job %s was taken although its submission was not answered", name, found[-1])
                self._enter(found[-1], name, fields)
            else:
                close_intent(run.jobs, name)


def executor_of(submission: Submission) -> Executor:
    """Return the executor that a submission's `launch.scheduler` means."""
    return Local(submission) if submission.scheduler == "local" else Batch(submission)


def after_of(ids: Sequence[str], first: Sequence[Dependency], kind: str = "afterok") -> tuple[Dependency, ...]:
    """Return the condition of a job that needs `ids`, or where there are none the submission's own."""
    return (Dependency(kind, tuple(ids)),) if ids else tuple(first)
