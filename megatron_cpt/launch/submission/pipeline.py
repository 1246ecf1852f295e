"""The whole graph of a run: tokenize -> build-index -> convert in -> train -> convert out -> soup -> evaluate -> report.

A stage is missing when its results are not on disk and no job of it is queued or running; only missing stages are
submitted, so the same command repairs a pipeline whose job was lost, cancelled or failed. A stage waits (afterok) for the
stages it needs, so a failure cancels what follows on Slurm and deletes it on PBS, and nothing waits for ever.
"""

import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_cpt.config.settings.derived import world_size
from megatron_cpt.config.settings.schema import RunConfig
from megatron_cpt.errors import ConfigError
from megatron_cpt.launch.node.processes import process_environment
from megatron_cpt.launch.scheduler import queue
from megatron_cpt.launch.scheduler.job import Dependency, Job, parse_dependency
from megatron_cpt.launch.scheduler.local import run_local
from megatron_cpt.launch.scheduler.render import render_job
from megatron_cpt.launch.submission.graph import Stage, chosen_stages, pipeline_stages
from megatron_cpt.launch.submission.submit import (
    Submission,
    live_jobs,
    show_dry_run,
    stage_job,
    submit_chain_links,
    submit_stage,
    training_job,
)
from megatron_cpt.launch.submission.validate import check_site, check_training
from megatron_cpt.run.directory import run_dir
from megatron_cpt.run.lock import run_lock

logger = logging.getLogger(__name__)


def submit_pipeline(
    submission: Submission,
    *,
    num_links: int = 1,
    max_failures: int = 2,
    num_array_tasks: int = 1,
    soup_last: int = 0,
    only: Sequence[str] = (),
) -> list[str]:
    """Submit what is missing of the graph; return the ids of the jobs submitted (none in a dry run).

    Raises: LaunchError, ConfigError, DataError before anything is queued.
    """
    scheduler, run = submission.scheduler, submission.run
    stages = pipeline_stages(submission, num_array_tasks=num_array_tasks, soup_last=soup_last)
    stages = chosen_stages(stages, only)
    _check(submission, stages)
    first = parse_dependency(submission.depend, scheduler) if submission.depend else ()
    if submission.dry_run:
        _show(submission, stages, first, num_links, max_failures)
        return []
    queue.check_commands(scheduler)
    queue.check_dependencies(scheduler, first)
    submitted: list[str] = []
    last_ids: dict[str, str] = {}
    with run_lock(run.jobs / "submit.lock", "another submission"):
        for stage in stages:
            if stage.is_done:
                logger.info("%-14s done", stage.name)
                continue
            alive = live_jobs(submission, stage.stage, None if stage.name == "train" else stage.name)
            if alive and stage.name != "train":
                logger.info("%-14s job %s is queued or running", stage.name, alive[-1])
                last_ids[stage.name] = alive[-1]
                continue
            parents = tuple(last_ids[name] for name in stage.needs if name in last_ids)
            waits = (Dependency("afterok", parents),) if parents else first
            if stage.name == "train":
                ids = submit_chain_links(
                    submission, alive, waits, num_links=max(num_links, len(alive)), max_failures=max_failures
                )
                submitted += ids[len(alive) :]
            else:
                ids = [
                    submit_stage(
                        submission,
                        stage.stage,
                        stage.arguments,
                        dependencies=waits,
                        num_array_tasks=stage.num_array_tasks,
                        name=stage.name,
                    )
                ]
                submitted += ids
            last_ids[stage.name] = ids[-1]
    return submitted


def run_pipeline(submission: Submission, *, soup_last: int = 0, only: Sequence[str] = ()) -> int:
    """Run what is missing of the graph on this machine, stage after stage; return the first exit code that is not 0."""
    stages = chosen_stages(pipeline_stages(submission, soup_last=soup_last), only)
    _check(submission, stages, needs_site=False)
    config = submission.loaded.config
    for stage in stages:
        if stage.is_done:
            logger.info("%-14s done", stage.name)
            continue
        command = [sys.executable, "-m", "megatron_cpt", *stage.arguments]
        if submission.dry_run:
            sys.stdout.write(f"$ megatron-cpt {' '.join(stage.arguments)}\n")
            continue
        logger.info("%-14s megatron-cpt %s", stage.name, " ".join(stage.arguments))
        if stage.name == "train":
            code = run_local(
                run_dir(config),
                submission.run_arguments,
                num_ranks=world_size(config),
                max_restarts=config.launch.max_restarts,
            )
        else:
            environment = {**process_environment(os.environ, 1), **os.environ}
            environment["PYTHONPATH"] = process_environment(os.environ, 1)["PYTHONPATH"]
            code = subprocess.run(command, env=environment, check=False).returncode
        if code:
            logger.error("%s ended with exit code %d; what needs it was not started.", stage.name, code)
            return code if code > 0 else 128 - code
    return 0


def _check(submission: Submission, stages: Sequence[Stage], needs_site: bool = True) -> None:
    config = submission.loaded.config
    if needs_site:
        check_site(config, submission.site)
    makes_tokens = any(stage.stage == "tokenize" and not stage.is_done for stage in stages)
    if any(stage.name == "train" and not stage.is_done for stage in stages):
        check_training(submission.loaded, submission.run, data_will_exist=makes_tokens)
    if makes_tokens:
        _check_documents(config)


def _check_documents(config: RunConfig) -> None:
    data_dir = Path(config.paths.data_dir)
    mistakes = []
    if config.data.tokenizer is None or not (data_dir / config.data.tokenizer).exists():
        mistakes.append(f"data.tokenizer: {config.data.tokenizer} is not in {data_dir}. A tokenizer is needed.")
    for name, corpus in config.data.corpora.items():
        # what is held out is made by a stage
        for pattern in (*corpus.documents, *(() if corpus.held_out else corpus.validation_documents)):
            if not any(True for _ in data_dir.glob(pattern)) and not Path(pattern).exists():
                mistakes.append(f"data.corpora.{name}: {pattern} matches nothing in {data_dir}. Correct the name.")
    if mistakes:
        raise ConfigError("\n".join(mistakes))


def _show(
    submission: Submission, stages: Sequence[Stage], first: Sequence[Dependency], num_links: int, max_failures: int
) -> None:
    shown: set[str] = set()
    for stage in stages:
        if stage.is_done:
            sys.stdout.write(f"# {stage.name}: done\n\n")
            continue
        jobs: list[Job]
        if stage.name == "train":
            jobs = [
                training_job(submission, link, must_finish=link == num_links, max_failures=max_failures)
                for link in range(1, num_links + 1)
            ]
        else:
            jobs = [
                stage_job(
                    submission, stage.stage, stage.arguments, num_array_tasks=stage.num_array_tasks, name=stage.name
                )
            ]
        parents = tuple(f"<{name}>" for name in stage.needs if name in shown)
        for index, job in enumerate(jobs):
            waits = (Dependency("afterok", parents),) if parents else first
            waits = waits if index == 0 else (Dependency("afterany", (f"<{stage.name} {index}>",)),)
            script = submission.run.jobs / f"{job.log_dir.name}.sh"
            command = queue.submit_command(submission.scheduler, script, waits)
            show_dry_run(script, render_job(job, submission.scheduler), command)
        shown.add(stage.name)
