"""A submission, and the job of each piece of its work."""

import dataclasses
import json
import logging
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_cpt.config.loading.resolve import LoadedConfig
from megatron_cpt.config.settings.derived import train_iters
from megatron_cpt.errors import LaunchError
from megatron_cpt.launch.node.preflight import excluded_path, read_excluded
from megatron_cpt.launch.node.supervisor import HOSTFILE, RECORDED
from megatron_cpt.launch.scheduler.job import Job
from megatron_cpt.launch.scheduler.site import Site
from megatron_cpt.launch.submission.work import Link, Work
from megatron_cpt.run.directory import RunDir, run_dir

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Submission:
    """Values common to the jobs of one command."""

    loaded: LoadedConfig
    site: Site
    run_arguments: tuple[str, ...]
    """--task ... key=value arguments that make another verb load the same configuration."""
    depend: str | None = None
    """Jobs to wait for, in the scheduler's own syntax."""
    dry_run: bool = False
    in_epochs: bool = False
    """Whether the length is stated in epochs: the jobs count the token files as they are when they start."""
    estimate: str = ""
    """How such a length was estimated; empty where the token files are made."""
    python: str = sys.executable
    work_dir: Path = dataclasses.field(default_factory=Path.cwd)
    stamp: str = dataclasses.field(default_factory=lambda: time.strftime("%Y%m%dT%H%M%S"))

    chain: str | None = None
    """Name of the chain that new links continue; None: a chain of their own."""

    @property
    def scheduler(self) -> str:
        """local, pbs or slurm."""
        return self.loaded.config.launch.scheduler

    @property
    def run(self) -> RunDir:
        """The run directory, from the root, because a job starts in another folder."""
        return RunDir((self.work_dir / run_dir(self.loaded.config).path).absolute())


def job_of(submission: Submission, work: Work) -> Job:
    """Return the job of a piece of work."""
    if work.points is not None:
        return _sweep_job(submission, work)
    if work.link is not None:
        return training_job(submission, work.link)
    if work.on_ranks:
        return rank_job(submission, work.stage, f"{work.name}-{submission.stamp}", work.words)
    return stage_job(submission, work)


def training_job(submission: Submission, link: Link) -> Job:
    """Return the job of one link of a chain."""
    length = RECORDED if submission.in_epochs else str(train_iters(submission.loaded.config.training))
    options = ["--chain", submission.chain or submission.stamp, "--train-iters", length]
    options += ["--max-failures", str(link.max_failures), *(["--must-finish"] if link.is_last else [])]
    words = ["train", *submission.run_arguments]
    job = rank_job(submission, "train", f"train-{submission.stamp}-{link.number:03d}", words, options)
    return dataclasses.replace(job, may_requeue=True)


def _sweep_job(submission: Submission, work: Work) -> Job:
    """Return the array whose tasks each train one point of a sweep."""
    job = training_job(submission, work.link or Link(number=1))
    split = job.command.index("--")
    command = (
        *job.command[:split],
        "--points",
        str(work.points),
        "--",
        submission.python,
        "-m",
        "megatron_cpt",
        "train",
    )
    name = f"{submission.loaded.config.task}-sweep"
    return dataclasses.replace(job, stage="train", name=name, command=command, num_array_tasks=work.num_array_tasks)


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
    options += ["--device", launch.device] if launch.device else []
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


def stage_job(submission: Submission, work: Work) -> Job:
    """Return the job of work that runs once, on one node, or as an array."""
    tasks, most = work.num_array_tasks, submission.site.max_array_tasks
    if tasks is not None and not 1 <= tasks <= most:
        raise LaunchError(
            f"{work.stage}: an array of {tasks} tasks. Between 1 and {most} are allowed (site.max_array_tasks). Choose "
            "another number."
        )
    options = ["--num-array-tasks", str(tasks)] if tasks else []
    if work.reads or work.writes:
        options += ["--reads", json.dumps(work.reads), "--writes", json.dumps(work.writes)]
    command = [submission.python, "-m", "megatron_cpt", *work.words]
    label = f"{work.name}-{submission.stamp}"
    return dataclasses.replace(_job(submission, work.stage, label, options, command), num_array_tasks=tasks)


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
