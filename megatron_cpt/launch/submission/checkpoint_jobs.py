"""A job per kept checkpoint: bits per byte on the task's held-out texts, or the tasks of lm-evaluation-harness.

A checkpoint's Hugging Face export is measured where there is one, else the Megatron checkpoint itself, converted for the
time. What has its result already, or a job in the queue, is not submitted again.
"""

import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_cpt.config.settings.schema import RunConfig
from megatron_cpt.errors import LaunchError
from megatron_cpt.launch.node.processes import process_environment
from megatron_cpt.launch.scheduler import queue
from megatron_cpt.launch.scheduler.job import parse_dependency
from megatron_cpt.launch.scheduler.render import render_job
from megatron_cpt.launch.submission.graph import Stage
from megatron_cpt.launch.submission.submit import Submission, live_jobs, show_dry_run, stage_job, submit_stage
from megatron_cpt.launch.submission.validate import check_site
from megatron_cpt.run.directory import RunDir
from megatron_cpt.run.lock import run_lock

logger = logging.getLogger(__name__)


def checkpoint_stages(submission: Submission, harness_tasks: Sequence[str], every: int | None = None) -> list[Stage]:
    """Return one stage per checkpoint on disk, or per multiple of `every` and the last one.

    Raises: LaunchError when the run has no checkpoint, or the task no held-out text and no harness task is given.
    """
    config, run = submission.loaded.config, submission.run
    models = _models(run)
    if every is not None:
        models = {number: path for number, path in models.items() if number % every == 0 or number == max(models)}
    if not models:
        raise LaunchError(f"{run.path}: no checkpoint to measure. Train first.")
    tokenizer = _tokenizer(config)
    stages = []
    for number, path in sorted(models.items()):
        name = f"iter_{number:07d}"
        model = ("--model", f"{name}={path}", *tokenizer)
        if harness_tasks:
            output = run.report / "harness"
            arguments = ("evaluate", "harness", *model, "--tasks", ",".join(harness_tasks), "--output", str(output))
            stages.append(
                Stage(
                    name=f"harness-{name}", stage="evaluate", arguments=arguments,
                    is_done=any((output / name).rglob("results*.json")),
                )
            )  # fmt: skip
            continue
        result = run.report / "perplexity" / f"{name}.json"
        arguments = ("evaluate", "perplexity", *model, *_texts(config), "--output", str(result))
        stages.append(Stage(name=f"perplexity-{name}", stage="evaluate", arguments=arguments, is_done=result.is_file()))
    return stages


def submit_checkpoint_jobs(submission: Submission, stages: Sequence[Stage]) -> list[str]:
    """Submit a job per stage that is missing; return the ids (none in a dry run).

    Raises: LaunchError before anything is queued.
    """
    scheduler = submission.scheduler
    check_site(submission.loaded.config, submission.site)
    waits = parse_dependency(submission.depend, scheduler) if submission.depend else ()
    if submission.dry_run:
        for stage in stages:
            if stage.is_done:
                sys.stdout.write(f"# {stage.name}: done\n\n")
                continue
            job = stage_job(submission, stage.stage, stage.arguments, name=stage.name)
            script = submission.run.jobs / f"{job.log_dir.name}.sh"
            show_dry_run(script, render_job(job, scheduler), queue.submit_command(scheduler, script, waits))
        return []
    queue.check_commands(scheduler)
    queue.check_dependencies(scheduler, waits)
    ids = []
    with run_lock(submission.run.jobs / "submit.lock", "another submission"):
        for stage in stages:
            alive = [] if stage.is_done else live_jobs(submission, stage.stage, stage.name)
            if stage.is_done or alive:
                logger.info(
                    "%-24s %s", stage.name, "done" if stage.is_done else f"job {alive[-1]} is queued or running"
                )
                continue
            ids.append(submit_stage(submission, stage.stage, stage.arguments, dependencies=waits, name=stage.name))
    return ids


def run_checkpoint_jobs(submission: Submission, stages: Sequence[Stage]) -> int:
    """Run what is missing on this machine, one after the other; return the first exit code that is not 0."""
    environment = {**os.environ, "PYTHONPATH": process_environment(os.environ, 1)["PYTHONPATH"]}
    for stage in stages:
        if stage.is_done:
            logger.info("%-24s done", stage.name)
        elif submission.dry_run:
            sys.stdout.write(f"$ megatron-cpt {' '.join(stage.arguments)}\n")
        else:
            command = [sys.executable, "-m", "megatron_cpt", *stage.arguments]
            code = subprocess.run(command, env=environment, check=False).returncode
            if code:
                return code if code > 0 else 128 - code
    return 0


def _models(run: RunDir) -> dict[int, Path]:
    """Return iteration -> its export, or its checkpoint where it was not exported."""
    models = {}
    for folder, mark in ((run.checkpoints, "manifest.json"), (run.checkpoints_hf, "config.json")):
        for path in folder.glob("iter_*"):
            if (path / mark).is_file() and path.name.removeprefix("iter_").isdigit():
                models[int(path.name.removeprefix("iter_"))] = path
    return models


def _tokenizer(config: RunConfig) -> tuple[str, ...]:
    if config.data.tokenizer is None:
        return ()
    return ("--tokenizer", str(Path(config.paths.data_dir) / config.data.tokenizer))


def _texts(config: RunConfig) -> list[str]:
    words: list[str] = []
    for name, corpus in config.data.corpora.items():
        for path in corpus.validation_documents:
            words += ["--text", f"{name}={Path(config.paths.data_dir) / path}"]
    if not words:
        raise LaunchError(
            "data.corpora: no corpus has validation_documents. Texts to measure are needed. Name them, or use --harness."
        )
    return words
