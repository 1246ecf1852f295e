"""The stages of a run as a graph, and which of them are up to date.

On this machine every stage is called, and its verb decides which results it keeps. On a cluster a job costs a wait, so
a stage is left out whose last job finished and whose inputs and outputs are those of that job (`run/made_of.py`).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_cpt.config.loading.paths import data_path
from megatron_cpt.config.loading.resolve import read_resolved
from megatron_cpt.config.settings.derived import stage_corpora, train_iters
from megatron_cpt.config.settings.held_out import DOCUMENTS, VALIDATION, split_dir, training_documents
from megatron_cpt.config.settings.schema import CheckpointConfig, CorpusConfig, RunConfig
from megatron_cpt.data.shards.corpus_documents import document_inputs
from megatron_cpt.errors import ConfigError, LaunchError
from megatron_cpt.launch.submission.submit import Submission
from megatron_cpt.launch.submission.work import Link, Work
from megatron_cpt.run.directory import RunDir, run_dir
from megatron_cpt.run.ledger import read_jobs
from megatron_cpt.run.made_of import fingerprint
from megatron_cpt.run.progress import last_checkpoint

TOKENS_SUFFIX = "_text_document"


def pipeline_stages(submission: Submission, *, num_array_tasks: int = 1, soup_last: int = 0) -> list[Work]:
    """Return the graph in an order in which every stage comes after those it needs.

    Raises: ConfigError if a corpus has documents but no path for its tokens.
    """
    config, run, options = submission.loaded.config, submission.run, submission.run_arguments
    iterations = train_iters(config.training)
    stages = _tokenize_stages(config, num_array_tasks)
    tokenized = tuple(stage.name for stage in stages)
    tokens = _token_paths(config)
    stages.append(
        Work(
            name="build-index",
            stage="build-index",
            words=("blend", "build-index", *options),
            needs=tokenized,
            reads=tokens,
        )
    )
    before_training = ["build-index"]
    source = config.init.from_path
    if source and (Path(source) / "config.json").is_file():
        stages.append(
            Work(
                name="convert-in",
                stage="convert",
                words=("convert", "init", *options),
                reads=(source,),
                writes=(str(run.path / "init"),),
            )
        )
        before_training.append("convert-in")
    stages.append(
        Work(
            name="train",
            stage="train",
            words=("train", *options),
            needs=tuple(before_training),
            on_ranks=True,
            link=Link(number=1),
        )
    )
    # of a folder of exports the newest is measured: a length in epochs is known when training starts
    last_export = run.checkpoints_hf if submission.in_epochs else run.checkpoints_hf / f"iter_{iterations:07d}"
    stages.append(
        Work(
            name="convert-out",
            stage="convert",
            words=("convert", "all", *options),
            needs=("train",),
            reads=(str(run.checkpoints),),
            writes=(str(run.checkpoints_hf),),
        )
    )
    after_training = [("cpt", last_export)]
    if soup_last:
        if submission.estimate:
            raise LaunchError(
                f"--soup-last {soup_last}: the last checkpoints of a stage in epochs are known once its token files are counted. "
                "Make them first (`submit pipeline --only tokenize`), or state train_tokens."
            )
        soup = run.path / "soup" / f"last_{soup_last}"
        stages.append(_soup_stage(config.checkpoint, run, soup, soup_last, iterations))
        after_training.append(("soup", soup))
    evaluation = _evaluation_stage(config, run, after_training, "soup" if soup_last else "convert-out")
    compared: tuple[str, ...] = ()
    if evaluation is not None:
        stages.append(evaluation)
        if config.init.from_path is not None:
            compared = ("--evaluation", str(run.report / "evaluation" / "forgetting.json"))
    stages.append(
        Work(
            name="report",
            stage="report",
            words=("report", str(run.path), "--output", str(run.report), *compared),
            needs=(stages[-1].name,),
            reads=(str(run.metrics_path), *compared[1:]),
            writes=(str(run.report / "report.md"),),
        )
    )
    return stages


def chosen_stages(stages: Sequence[Work], only: Sequence[str]) -> list[Work]:
    """Return the stages named, or of the kinds named, in `only`; all of them when it is empty.

    Raises: LaunchError naming the stages there are.
    """
    known = list(dict.fromkeys([*(stage.stage for stage in stages), *(stage.name for stage in stages)]))
    unknown = [name for name in only if name not in known]
    if unknown:
        raise LaunchError(f"--only {unknown[0]}: no such stage in this run. There are {', '.join(known)}.")
    return [stage for stage in stages if not only or stage.name in only or stage.stage in only]


def current_stages(submission: Submission, stages: Sequence[Work]) -> set[str]:
    """Return the names of the stages that are made of their inputs as these are now, and so are those they need."""
    jobs = read_jobs(submission.run.jobs)
    by_name = {stage.name: stage for stage in stages}
    is_trained = _is_trained(submission)
    settled = {"train", "build-index", "convert-in"} if is_trained else set()  # a trained run is not trained again
    alone = settled | {
        stage.name
        for stage in stages
        if stage.link is None and _is_current(stage, jobs, has_outputs=stage.joined_by is None)
    }
    current: set[str] = set()
    for stage in stages:
        joined = stage.joined_by is None or stage.joined_by in alone
        needed = () if stage.name in settled else stage.needs
        if stage.name in alone and joined and all(name in current for name in needed if name in by_name):
            current.add(stage.name)
    return current


def _is_trained(submission: Submission) -> bool:
    """Return whether the stage's last checkpoint is there; a length that is only estimated is read from the run itself."""
    config, path = submission.loaded.config, submission.run.config_path
    if submission.estimate:
        if not path.is_file():
            return False
        config = read_resolved(path)
    return last_checkpoint(submission.run) >= train_iters(config.training)


def _is_current(stage: Work, jobs: Mapping[str, Mapping[str, Any]], *, has_outputs: bool) -> bool:
    """Return whether the newest job of this name finished, made of these inputs, and its outputs are as it left them."""
    newest = next((job for job in reversed(list(jobs)) if jobs[job].get("name") == stage.name and "/" not in job), None)
    if newest is None:
        return False
    records: list[Mapping[str, Any]] = [jobs[newest]]
    if jobs[newest].get("num_array_tasks"):
        records = [record for job, record in jobs.items() if job.startswith(f"{newest}/")]
        if len(records) < int(jobs[newest]["num_array_tasks"]):
            return False
    inputs = fingerprint(stage.reads, stage.words)
    if any(record.get("state") != "finished" or record.get("inputs") != inputs for record in records):
        return False
    last = max(records, key=lambda record: float(record.get("time") or 0))
    return not has_outputs or last.get("outputs") == fingerprint(stage.writes)


def _token_paths(config: RunConfig) -> tuple[str, ...]:
    data_dir = Path(config.paths.data_dir)
    paths: list[str] = []
    for corpus in config.data.corpora.values():
        paths += [str(data_dir / pattern) for pattern in (*corpus.tokens, *corpus.validation)]
    return tuple(paths)


def _tokenize_stages(config: RunConfig, num_array_tasks: int) -> list[Work]:
    stages = []
    read = stage_corpora(config.data)
    for name, corpus in config.data.corpora.items():
        parts: list[tuple[str, tuple[str, ...], tuple[str, ...]]] = []
        split: tuple[str, ...] = ()
        if corpus.held_out is not None and name in read:
            stages.append(_split_stage(config, name, corpus))
            split = (stages[-1].name,)
        if name in read:
            parts.append((f"tokenize-{name}", training_documents(name, corpus), corpus.tokens))
        parts.append((f"tokenize-{name}-validation", corpus.validation_documents, corpus.validation))
        for label, documents, tokens in parts:
            if documents and tokens:
                # a validation set is small: one job
                tasks = 1 if label.endswith("-validation") else num_array_tasks
                made = _tokenize_corpus(config, label, documents, tokens[0], tasks)
                stages += [dataclasses.replace(stage, needs=stage.needs or split) for stage in made]
            elif documents and not tokens and not label.endswith("validation"):
                raise ConfigError(_no_tokens(name, corpus))
    return stages


def _split_stage(config: RunConfig, name: str, corpus: CorpusConfig) -> Work:
    """Return the job that takes a corpus's held-out documents apart."""
    output = Path(config.paths.data_dir) / split_dir(name)
    documents = document_inputs(config.paths, corpus.documents)
    inputs = [f"{DOCUMENTS}={path}" for path in documents]
    words = ("data", "split", *inputs, "--name", VALIDATION, "--fraction", repr(corpus.held_out), "--compress")
    return Work(
        name=f"split-{name}",
        stage="tokenize",
        words=(*words, "--output", str(output)),
        reads=tuple(documents),
        writes=(str(output),),
    )


def _no_tokens(name: str, corpus: CorpusConfig) -> str:
    return (
        f"data.corpora.{name}: documents {', '.join(corpus.documents)} but no tokens. The place of the token files is "
        f"needed. Set tokens: [tokens/{name}{TOKENS_SUFFIX}]."
    )


def _tokenize_corpus(
    config: RunConfig, label: str, documents: tuple[str, ...], tokens: str, num_array_tasks: int
) -> list[Work]:
    """Return the job that makes a corpus's token files; an array that makes parts of one shard needs one that joins them."""
    data_dir = Path(config.paths.data_dir)
    inputs = document_inputs(config.paths, documents)
    tokenizer = data_path(config.paths, config.data.tokenizer or "")
    words = ["tokenize", "--input", *inputs, "--tokenizer", tokenizer]
    target = data_dir / tokens
    is_one_shard = tokens.endswith(TOKENS_SUFFIX)
    if is_one_shard:
        words += ["--output-prefix", str(target).removesuffix(TOKENS_SUFFIX)]
        made = str(target)
    else:
        made = str(target).split("*", 1)[0].rstrip("/")
        words += ["--output-dir", made]
    is_array = num_array_tasks > 1
    if is_array:
        words += ["--shard", "{array_index}/{num_array_tasks}"]
    join = label.replace("tokenize-", "merge-", 1) if is_array and is_one_shard else None
    stage = Work(
        name=label,
        stage="tokenize",
        words=tuple(words),
        num_array_tasks=num_array_tasks if is_array else None,
        reads=(*inputs, tokenizer),
        writes=(made,),
        joined_by=join,
    )
    if join is None:
        return [stage]
    merge = ("data", "merge", "--output-prefix", str(target), "--remove-inputs", "--replace")
    return [stage, Work(name=join, stage="tokenize", words=merge, needs=(label,), writes=(str(target),))]


def _soup_stage(checkpoint: CheckpointConfig, run: RunDir, output: Path, soup_last: int, iterations: int) -> Work:
    interval = checkpoint.save_interval
    saved = [*range(interval, iterations, interval), iterations]
    if len(saved) < soup_last:
        raise LaunchError(f"--soup-last {soup_last}: the run saves {len(saved)} checkpoints. Give a smaller number.")
    if checkpoint.keep_last is not None and checkpoint.keep_last < soup_last:
        raise LaunchError(
            f"--soup-last {soup_last}: checkpoint.keep_last keeps {checkpoint.keep_last}. Raise it to {soup_last}."
        )
    models = [str(run.checkpoints_hf / f"iter_{iteration:07d}") for iteration in saved[-soup_last:]]
    return Work(
        name="soup",
        stage="soup",
        words=("soup", "--inputs", *models, "--output", str(output)),
        needs=("convert-out",),
        reads=tuple(models),
        writes=(str(output),),
    )


def held_out_texts(config: RunConfig) -> dict[str, list[str]]:
    """Return corpus -> paths of its held-out documents, for those that have some."""
    return {
        name: document_inputs(config.paths, corpus.validation_documents)
        for name, corpus in config.data.corpora.items()
        if corpus.validation_documents
    }


def text_words(config: RunConfig) -> list[str]:
    """Return `--text NAME=PATH` for every held-out text."""
    return [
        word
        for name, paths in held_out_texts(config).items()
        for path in paths
        for word in ("--text", f"{name}={path}")
    ]


def _evaluation_stage(config: RunConfig, run: RunDir, models: Sequence[tuple[str, Path]], needs: str) -> Work | None:
    """Return bits per byte of the stage's start and end on every held-out text; None where there is no such text."""
    texts = text_words(config)
    if not texts:
        return None
    words = ["evaluate", "perplexity"]
    source = config.init.from_path
    measured: list[str] = [str(path) for _, path in models]
    if source is not None:
        base = _base_model(config, source)
        words = ["evaluate", "forgetting", "--model", f"base={base}"]
        measured.append(base)
    for name, path in models:
        words += ["--model", f"{name}={path}"]
    words += texts
    if config.data.tokenizer:
        words += ["--tokenizer", data_path(config.paths, config.data.tokenizer)]
    output = run.report / "evaluation"
    result = output / ("perplexity.json" if source is None else "forgetting.json")
    words += ["--output", str(result if source is None else output)]
    return Work(
        name="evaluate",
        stage="evaluate",
        words=tuple(words),
        needs=(needs,),
        reads=(*measured, *(path for paths in held_out_texts(config).values() for path in paths)),
        writes=(str(result),),
    )


def _base_model(config: RunConfig, source: str) -> str:
    if not source.startswith("variant:"):
        return source
    name, _, iteration = source.removeprefix("variant:").partition("@")
    checkpoints = run_dir(dataclasses.replace(config, variant=name)).checkpoints
    return str(checkpoints / f"iter_{int(iteration):07d}" if iteration else checkpoints)
