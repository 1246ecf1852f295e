"""The whole graph of a run: tokenize -> build-index -> convert in -> train -> convert out -> soup -> evaluate -> report.

On this machine every stage is called in turn, and its verb keeps what is made of the same inputs already. On a cluster only
stages are submitted that are not current (`graph.current_stages`) and of which no job is queued or running, so the same
command repairs a pipeline whose job was lost, cancelled or failed. A stage waits (afterok) for the stages it needs, so a
failure cancels what follows on Slurm and deletes it on PBS, and nothing waits for ever.
"""

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_cpt.config.loading.paths import data_path
from megatron_cpt.config.settings.derived import may_change_data_list
from megatron_cpt.config.settings.schema import RunConfig
from megatron_cpt.data.shards.corpus_documents import document_problems, untokenized
from megatron_cpt.errors import CptError, LaunchError
from megatron_cpt.launch.submission.chain import Submitted, show_links, submit_links
from megatron_cpt.launch.submission.executor import Executor, after_of, executor_of
from megatron_cpt.launch.submission.graph import chosen_stages, current_stages, pipeline_stages
from megatron_cpt.launch.submission.submit import Submission
from megatron_cpt.launch.submission.validate import training_problems
from megatron_cpt.launch.submission.work import Work
from megatron_cpt.run.lock import run_lock
from megatron_cpt.run.progress import last_checkpoint

logger = logging.getLogger(__name__)


def submit_pipeline(
    submission: Submission,
    *,
    num_links: int = 1,
    max_failures: int = 2,
    num_array_tasks: int = 1,
    soup_last: int = 0,
    only: Sequence[str] = (),
) -> Submitted:
    """Run the graph here, or submit what is missing of it; a stage that fails here ends it.

    Raises: LaunchError, ConfigError, DataError before anything is queued.
    """
    executor = executor_of(submission)
    stages = pipeline_stages(submission, num_array_tasks=num_array_tasks, soup_last=soup_last)
    stages = chosen_stages(stages, only)
    current = current_stages(submission, stages) if executor.waits else set()
    missing = [stage for stage in stages if stage.name not in current]
    problems = [*executor.problems(), *_problems(submission, missing)]
    if submission.dry_run:
        _show(executor, stages, current, num_links, max_failures)
    if problems:
        raise LaunchError("\n".join(problems))
    if submission.dry_run:
        return Submitted()
    with run_lock(submission.run.jobs / "submit.lock", "another submission"):
        executor.begin()
        submitted: list[str] = []
        try:
            return _submit(executor, stages, current, num_links, max_failures, submitted)
        except LaunchError as problem:
            if not executor.waits or not submitted:
                raise
            raise type(problem)(
                f"{problem} Queued before that and still there: {', '.join(submitted)}. Correct the cause and give the same "
                "command again: it continues behind them."
            ) from None


def _submit(
    executor: Executor,
    stages: Sequence[Work],
    current: set[str],
    num_links: int,
    max_failures: int,
    submitted: list[str],
) -> Submitted:
    """Run or queue the stages that are not current; `submitted` gains the ids as they come."""
    last_ids: dict[str, str] = {}
    first = executor.parents()
    for stage in stages:
        if stage.name in current:
            logger.info("%-14s done", stage.name)
            continue
        alive = executor.live(stage.stage, None if stage.link else stage.name)
        if alive and stage.link is None:
            logger.info("%-14s job %s is queued or running", stage.name, alive[-1])
            last_ids[stage.name] = alive[-1]
            continue
        parents = [last_ids[name] for name in stage.needs if name in last_ids]
        if stage.link is not None:
            links = max(num_links, len(alive))
            ids = submit_links(executor, stage, alive, parents, first, num_links=links, max_failures=max_failures)
            submitted += ids[len(alive) :]
        else:
            ids = [executor.submit(stage, after_of(parents, first))]
            submitted += ids
        if executor.waits:
            last_ids[stage.name] = ids[-1]
        elif code := executor.states(ids[-1:])[ids[-1]].exit_code:
            logger.error("%s ended with exit code %d; what needs it was not started.", stage.name, code)
            return Submitted(ids=tuple(submitted), exit_code=code)
    return Submitted(ids=tuple(submitted))


def _problems(submission: Submission, missing: Sequence[Work]) -> list[str]:
    """Return everything that would let the missing stages fail, a line each."""
    config, run = submission.loaded.config, submission.run
    problems = []
    makes_tokens = any(stage.stage == "tokenize" for stage in missing)
    if makes_tokens:
        if config.data.tokenizer is None or not Path(data_path(config.paths, config.data.tokenizer)).exists():
            problems.append(
                f"data.tokenizer: {config.data.tokenizer} is not in {config.paths.data_dir}. A tokenizer is needed."
            )
        problems += document_problems(config)
        problems += [] if problems else _changed_documents(config, last_checkpoint(run), str(run.path))
    if any(stage.link for stage in missing):
        problems += training_problems(submission.loaded, run, data_will_exist=makes_tokens)
    return problems


def _changed_documents(config: RunConfig, iteration: int, run: str) -> list[str]:
    """Return the changes under a started run, which continues with its original tokens."""
    if not iteration or may_change_data_list(config.checkpoint):
        return []
    try:
        changed = untokenized(config)
    except CptError as problem:
        return [str(problem)]
    return [
        f"data.corpora.{name}: {', '.join(paths[:3])} changed or came after the tokens were made, and {run} has trained "
        f"{iteration} iterations on these tokens. A run's data stay as they are. Restore the documents, use another variant, "
        "or set checkpoint.accept_changes=[data]."
        for name, paths in changed.items()
    ]


def _show(executor: Executor, stages: Sequence[Work], current: set[str], num_links: int, max_failures: int) -> None:
    shown: set[str] = set()
    first = executor.shown_parents()
    for stage in stages:
        if stage.name in current:
            sys.stdout.write(f"# {stage.name}: done\n\n")
            continue
        parents = [f"<{name}>" for name in stage.needs if name in shown]
        if stage.link is not None:
            show_links(executor, stage, parents, first, num_links=num_links, max_failures=max_failures)
        else:
            executor.show(stage, after_of(parents, first))
        shown.add(stage.name)
