"""A job per kept checkpoint: bits per byte on the task's held-out texts, or the tasks of lm-evaluation-harness.

A checkpoint's Hugging Face export is measured where there is one, else the Megatron checkpoint itself, converted for
the time. A checkpoint that already has its result, or a job in the queue, is not submitted again.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

from megatron_cpt.config.loading.paths import data_path
from megatron_cpt.config.settings.schema import RunConfig
from megatron_cpt.errors import LaunchError
from megatron_cpt.launch.submission.chain import Submitted
from megatron_cpt.launch.submission.executor import executor_of
from megatron_cpt.launch.submission.graph import current_stages, held_out_texts, text_words
from megatron_cpt.launch.submission.submit import Submission
from megatron_cpt.launch.submission.work import Work
from megatron_cpt.run.directory import RunDir
from megatron_cpt.run.lock import run_lock

logger = logging.getLogger(__name__)


def checkpoint_stages(submission: Submission, harness_tasks: Sequence[str], every: int | None = None) -> list[Work]:
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
            words = ("evaluate", "harness", *model, "--tasks", ",".join(harness_tasks), "--output", str(output))
            stages.append(
                Work(
                    name=f"harness-{name}",
                    stage="evaluate",
                    words=words,
                    reads=(str(path),),
                    writes=(str(output / name),),
                )
            )
            continue
        result = run.report / "perplexity" / f"{name}.json"
        words = ("evaluate", "perplexity", *model, *_texts(config), "--output", str(result))
        read = (str(path), *(text for texts in held_out_texts(config).values() for text in texts))
        stages.append(Work(name=f"perplexity-{name}", stage="evaluate", words=words, reads=read, writes=(str(result),)))
    return stages


def submit_checkpoint_jobs(submission: Submission, stages: Sequence[Work]) -> Submitted:
    """Measure every checkpoint: here one after the other, on a cluster a job each, but those measured already.

    Raises: LaunchError before anything is queued.
    """
    executor = executor_of(submission)
    problems = executor.problems()
    waits = executor.shown_parents()
    if submission.dry_run:
        for stage in stages:
            executor.show(stage, waits)
    if problems:
        raise LaunchError("\n".join(problems))
    if submission.dry_run:
        return Submitted()
    ids = []
    current = current_stages(submission, stages)
    with run_lock(submission.run.jobs / "submit.lock", "another submission"):
        executor.begin()
        for stage in stages:
            alive = [] if stage.name in current else executor.live(stage.stage, stage.name)
            if stage.name in current or alive:
                state = f"job {alive[-1]} is queued or running" if alive else "done"
                logger.info("%-24s %s", stage.name, state)
                continue
            ids.append(executor.submit(stage, waits))
            if code := 0 if executor.waits else executor.states(ids[-1:])[ids[-1]].exit_code:
                return Submitted(ids=tuple(ids), exit_code=code)
    return Submitted(ids=tuple(ids))


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
    return ("--tokenizer", data_path(config.paths, config.data.tokenizer))


def _texts(config: RunConfig) -> list[str]:
    words = text_words(config)
    if not words:
        raise LaunchError(
            "data.corpora: no corpus has validation_documents. Texts to measure are needed. Name them, or use --harness."
        )
    return words
