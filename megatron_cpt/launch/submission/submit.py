"""Submission: check everything on this node first, then hand jobs to their scheduler and note them in the ledger."""

import dataclasses
import logging
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_cpt.config.loading.resolve import LoadedConfig
from megatron_cpt.config.settings.derived import train_iters
from megatron_cpt.errors import LaunchError
from megatron_cpt.files import write_text
from megatron_cpt.launch.node.preflight import excluded_path, read_excluded
from megatron_cpt.launch.node.supervisor import HOSTFILE
from megatron_cpt.launch.scheduler import queue
from megatron_cpt.launch.scheduler.job import Dependency, Job, parse_dependency
from megatron_cpt.launch.scheduler.render import render_job
from megatron_cpt.launch.scheduler.site import Site
from megatron_cpt.launch.submission.validate import check_site, check_training
from megatron_cpt.run.directory import RunDir, run_dir
from megatron_cpt.run.ledger import append_record, read_jobs
from megatron_cpt.run.lock import run_lock
from megatron_cpt.run.progress import last_checkpoint

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Submission:
    """What is common to the jobs of one command."""

    loaded: LoadedConfig
    site: Site
    run_arguments: tuple[str, ...]
    """--task ... key=value: what makes another verb load the same configuration."""
    depend: str | None = None
    """Jobs to wait for, in the scheduler's own syntax."""
    dry_run: bool = False
    python: str = sys.executable
    work_dir: Path = dataclasses.field(default_factory=Path.cwd)
    stamp: str = dataclasses.field(default_factory=lambda: time.strftime("%Y%m%dT%H%M%S"))

    chain: str | None = None
    """Name of the chain that new links continue; None: a chain of their own."""

    @property
    def scheduler(self) -> str:
        """pbs or slurm."""
        return self.loaded.config.launch.scheduler

    @property
    def run(self) -> RunDir:
        """The run directory, from the root, because a job starts in another folder."""
        return RunDir((self.work_dir / run_dir(self.loaded.config).path).absolute())


def submit_chain(submission: Submission, *, num_links: int = 1, max_failures: int = 2) -> list[str]:
    """Submit training as `num_links` jobs, each after the one before; return their ids (none in a dry run).

    Links of the run that are queued or running already count: only the missing ones are submitted, behind them.

    Raises: LaunchError, DataError, ConfigError before anything is queued.
    """
    if num_links < 1:
        raise LaunchError(f"--chain {num_links}: a chain has at least one link. Give 1 or more.")
    check_site(submission.loaded.config, submission.site)
    iterations = train_iters(submission.loaded.config.training)
    if last_checkpoint(submission.run) >= iterations:
        logger.info("%s: finished at iteration %d, nothing to submit", submission.run.path, iterations)
        return []
    check_training(submission.loaded, submission.run)
    dependencies = parse_dependency(submission.depend, submission.scheduler) if submission.depend else ()
    if submission.dry_run:
        jobs = [
            training_job(submission, link, must_finish=link == num_links, max_failures=max_failures)
            for link in range(1, num_links + 1)
        ]
        _print_dry_run(submission, jobs, dependencies)
        return []
    queue.check_commands(submission.scheduler)
    queue.check_dependencies(submission.scheduler, dependencies)
    with run_lock(submission.run.jobs / "submit.lock", "another submission"):
        alive = live_jobs(submission, "train")
        if alive and num_links == 1:
            raise LaunchError(
                f"{submission.run.path}: job {', '.join(alive)} of this run is queued or running. One job at a time may "
                "work on a run. Wait, cancel it, or use --chain to line up links behind it."
            )
        return submit_chain_links(submission, alive, dependencies, num_links=num_links, max_failures=max_failures)


def submit_chain_links(
    submission: Submission,
    alive: Sequence[str],
    dependencies: Sequence[Dependency],
    *,
    num_links: int,
    max_failures: int,
) -> list[str]:
    """Submit the links that are missing behind those that are `alive`; return all ids. The caller holds the lock."""
    chain = read_jobs(submission.run.jobs)[alive[-1]].get("chain") if alive else None
    submission = dataclasses.replace(submission, chain=chain)
    if not alive:
        (submission.run.path / "stop_chain").unlink(missing_ok=True)
    ids = list(alive[:num_links])
    for link in range(len(ids) + 1, num_links + 1):
        waits = (Dependency("afterany", (ids[-1],)),) if ids else dependencies
        job = training_job(submission, link, must_finish=link == num_links, max_failures=max_failures)
        fields = {"chain": submission.chain or submission.stamp, "link": link, "name": "train"}
        ids.append(queue_job(submission, job, waits, fields))
    return ids


def submit_stage(
    submission: Submission,
    stage: str,
    arguments: Sequence[str],
    *,
    dependencies: Sequence[Dependency] = (),
    num_array_tasks: int | None = None,
    name: str | None = None,
) -> str:
    """Submit one job that runs `megatron-cpt ARGUMENTS` once (or per array task) on one node; return its id."""
    job = stage_job(submission, stage, arguments, num_array_tasks=num_array_tasks, name=name)
    return queue_job(submission, job, dependencies, {"name": name or stage, "num_array_tasks": num_array_tasks})


def live_jobs(submission: Submission, stage: str, name: str | None = None) -> list[str]:
    """Return the ids of this run's jobs of a stage that the scheduler still holds, in the order of submission."""
    candidates = [
        job
        for job, record in read_jobs(submission.run.jobs).items()
        if record.get("stage") == stage
        and record.get("scheduler") == submission.scheduler
        and (name is None or record.get("name") == name)
        and "/" not in job
    ]
    states = queue.job_states(submission.scheduler, candidates)
    return [job for job in candidates if states[job].state in queue.ALIVE]


def training_job(submission: Submission, link: int, *, must_finish: bool, max_failures: int) -> Job:
    """Return the job of one link of a chain."""
    config = submission.loaded.config
    options = ["--chain", submission.chain or submission.stamp, "--train-iters", str(train_iters(config.training))]
    options += ["--max-failures", str(max_failures), *(["--must-finish"] if must_finish else [])]
    words = ["train", *submission.run_arguments]
    job = rank_job(submission, "train", f"train-{submission.stamp}-{link:03d}", words, options)
    return dataclasses.replace(job, may_requeue=True)


def rank_job(
    submission: Submission, stage: str, label: str, words: Sequence[str], more_options: Sequence[str] = ()
) -> Job:
    """Return the job that runs `megatron-cpt WORDS` on every rank that a training job has, with its nodes and GPUs."""
    site, launch = submission.site, submission.loaded.config.launch
    per_node = launch.gpus_per_node if site.processes == "rank" else 1
    if not site.launcher:
        raise LaunchError(
            "site.launcher: not set. A command that starts processes on all nodes is needed, such as srun."
        )
    holes = {
        "nodes": launch.nodes,
        "processes": launch.nodes * per_node,
        "processes_per_node": per_node,
        "gpus_per_node": launch.gpus_per_node,
        "hostfile": HOSTFILE,
    }
    launcher = shlex.join(word.format(**holes) for word in site.launcher)
    options = ["--launcher", launcher, "--processes", site.processes, "--nodes", str(launch.nodes)]
    options += ["--gpus-per-node", str(launch.gpus_per_node), *more_options]
    options += ["--preflight"] if site.preflight else []
    options += ["--forward", ",".join(site.environment)] if site.environment else []
    command = [submission.python, "-m", "megatron_cpt", *words]
    job = _job(submission, stage, label, options, command)
    excluded = read_excluded(submission.run.jobs)
    avoid = (f"--exclude={','.join(excluded)}",) if excluded and submission.scheduler == "slurm" else ()
    if excluded and submission.scheduler == "pbs" and launch.spare_nodes < len(excluded):
        logger.warning(
            "%s names %d bad nodes, which PBS may give to the job: launch.spare_nodes is %d. Ask for as many.",
            excluded_path(submission.run.jobs), len(excluded), launch.spare_nodes,
        )  # fmt: skip
    num_nodes = launch.nodes + launch.spare_nodes
    return dataclasses.replace(
        job,
        nodes=launch.nodes,
        gpus_per_node=launch.gpus_per_node,
        tasks_per_node=per_node,
        walltime=launch.walltime,
        queue=site.queue,
        select=_filled(site.select, num_nodes, launch.gpus_per_node),
        options=(*(_filled(option, num_nodes, launch.gpus_per_node) for option in site.options), *avoid),
        signal_seconds=min(site.signal_seconds, launch.walltime // 2),
    )


def stage_job(
    submission: Submission,
    stage: str,
    arguments: Sequence[str],
    *,
    num_array_tasks: int | None = None,
    name: str | None = None,
) -> Job:
    """Return the job of a stage that runs once, on one node, or as an array."""
    if num_array_tasks is not None and not 1 <= num_array_tasks <= submission.site.max_array_tasks:
        raise LaunchError(
            f"{stage}: an array of {num_array_tasks} tasks. Between 1 and {submission.site.max_array_tasks} are allowed "
            "(site.max_array_tasks). Choose another number."
        )
    options = ["--num-array-tasks", str(num_array_tasks)] if num_array_tasks else []
    command = [submission.python, "-m", "megatron_cpt", *arguments]
    label = f"{name or stage}-{submission.stamp}"
    return dataclasses.replace(_job(submission, stage, label, options, command), num_array_tasks=num_array_tasks)


def _job(submission: Submission, stage: str, label: str, options: list[str], command: list[str]) -> Job:
    config, site = submission.loaded.config, submission.site
    resources = site.stages.get(stage)
    gpus = config.launch.gpus_per_node if stage == "evaluate" else 0
    walltime = resources.walltime if resources and resources.walltime else config.launch.walltime
    select = resources.select if resources and resources.select else site.select
    stage_options = resources.options if resources and resources.options is not None else site.options
    log_dir = submission.run.logs / label
    batch = [submission.python, "-m", "megatron_cpt.launch.node.supervisor", "--run", str(submission.run.path)]
    batch += ["--stage", stage, "--log-dir", str(log_dir), *options, "--", *command]
    return Job(
        name=f"{config.task}-{stage}",
        stage=stage,
        command=tuple(batch),
        work_dir=submission.work_dir,
        log_dir=log_dir,
        walltime=walltime,
        gpus_per_node=gpus,
        queue=(resources.queue if resources and resources.queue else site.queue),
        account=site.account,
        environment=dict(site.environment) | _package_path(),
        options=tuple(_filled(option, 1, gpus) for option in stage_options),
        select=_filled(select, 1, gpus),
        modules=site.modules,
        setup=site.setup,
        umask=site.umask,
    )


def _package_path() -> dict[str, str]:
    """Return PYTHONPATH for a checkout that is not installed; an installed package needs none."""
    import megatron_cpt

    root = Path(megatron_cpt.__file__).parents[1]
    return {} if root.name == "site-packages" else {"PYTHONPATH": str(root)}


def _filled(text: str, nodes: int, gpus_per_node: int) -> str:
    return text.format(nodes=nodes, gpus_per_node=gpus_per_node)


def queue_job(submission: Submission, job: Job, dependencies: Sequence[Dependency], fields: dict[str, object]) -> str:
    """Write the job's script, hand it to the scheduler and note it in the ledger with `fields`; return its id."""
    run, scheduler = submission.run, submission.scheduler
    job.log_dir.mkdir(parents=True, exist_ok=True)  # PBS holds a job, Slurm fails it, whose log folder is missing
    script = run.jobs / f"{job.log_dir.name}.sh"
    write_text(script, render_job(job, scheduler))
    identifier = queue.submit(scheduler, script, dependencies)
    append_record(
        run.jobs,
        identifier,
        stage=job.stage,
        scheduler=scheduler,
        state="submitted",
        command=queue.submit_command(scheduler, script, dependencies),
        dependencies=[str(dependency) for dependency in dependencies],
        nodes=job.nodes,
        script=str(script),
        log_dir=str(job.log_dir),
        **fields,
    )
    link = run.logs / identifier.replace("/", "_")
    if not link.exists():
        link.symlink_to(job.log_dir.name)
    logger.info("%s: job %s, logs in %s", job.stage, identifier, job.log_dir)
    return identifier


def _print_dry_run(submission: Submission, jobs: Sequence[Job], first: Sequence[Dependency]) -> None:
    """Write every script and the command that would submit it to stdout; ids of jobs to come are PREVIOUS."""
    for index, job in enumerate(jobs):
        script = submission.run.jobs / f"{job.log_dir.name}.sh"
        dependencies = first if index == 0 else [Dependency("afterany", ("PREVIOUS",))]
        command = queue.submit_command(submission.scheduler, script, dependencies)
        show_dry_run(script, render_job(job, submission.scheduler), command)


def show_dry_run(script: Path, text: str, command: Sequence[str], write: Callable[[str], object] | None = None) -> None:
    """Write a script and the command that would submit it."""
    (write or sys.stdout.write)(f"# {script}\n{text}\n$ {shlex.join(command)}\n\n")
