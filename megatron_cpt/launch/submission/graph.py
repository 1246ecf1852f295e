"""What a run consists of: its stages as a graph, and which of them are there already.

A stage is missing when its results are not on disk; `pipeline.py` submits or runs what is missing.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_cpt.config.settings.derived import stage_corpora, train_iters
from megatron_cpt.config.settings.held_out import DOCUMENTS, VALIDATION, split_dir, training_documents
from megatron_cpt.config.settings.schema import CorpusConfig, RunConfig
from megatron_cpt.errors import ConfigError, LaunchError
from megatron_cpt.launch.submission.submit import Submission
from megatron_cpt.run.directory import RunDir, run_dir
from megatron_cpt.run.ledger import read_jobs
from megatron_cpt.run.progress import last_checkpoint

TOKENS_SUFFIX = "_text_document"


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One node of the graph."""

    name: str
    """Unique in the graph: `tokenize-D0`, `train` ..."""
    stage: str
    """Kind, as in the site file's `stages`."""
    arguments: tuple[str, ...]
    """Of `megatron-cpt`."""
    needs: tuple[str, ...] = ()
    is_done: bool = False
    num_array_tasks: int | None = None


def pipeline_stages(submission: Submission, *, num_array_tasks: int = 1, soup_last: int = 0) -> list[Stage]:
    """Return the graph in an order in which every stage comes after those it needs.

    Raises: ConfigError when a corpus has documents but says not where its tokens go.
    """
    config, run, options = submission.loaded.config, submission.run, submission.run_arguments
    iterations = train_iters(config.training)
    stages = _tokenize_stages(config, num_array_tasks, run)
    tokenized = tuple(stage.name for stage in stages)
    is_trained = last_checkpoint(run) >= iterations
    stages.append(
        Stage(
            name="build-index",
            stage="build-index",
            arguments=("blend", "build-index", *options),
            needs=tokenized,
            is_done=is_trained or _has_finished(run, "build-index"),
        )
    )
    before_training = ["build-index"]
    source = Path(config.init.from_path or "")
    if config.init.from_path and (source / "config.json").is_file():
        multiple = str(config.model.make_vocab_size_divisible_by)
        stages.append(
            Stage(
                name="convert-in",
                stage="convert",
                arguments=("convert", "hf-to-mcore", str(source), str(run.path / "init"),
                           "--make-vocab-size-divisible-by", multiple),
                is_done=is_trained or (run.path / "init" / "release" / "manifest.json").is_file(),
            )
        )  # fmt: skip
        before_training.append("convert-in")
    stages.append(
        Stage(
            name="train", stage="train", arguments=("train", *options), needs=tuple(before_training), is_done=is_trained
        )
    )
    last_export = run.checkpoints_hf / f"iter_{iterations:07d}"
    stages.append(
        Stage(
            name="convert-out",
            stage="convert",
            arguments=("convert", "all", *options),
            needs=("train",),
            is_done=(last_export / "config.json").is_file(),
        )
    )
    after_training = [("cpt", last_export)]
    if soup_last:
        soup = run.path / "soup" / f"last_{soup_last}"
        stages.append(_soup_stage(config, run, soup, soup_last, iterations))
        after_training.append(("soup", soup))
    evaluation = _evaluation_stage(config, run, after_training, "soup" if soup_last else "convert-out")
    compared: tuple[str, ...] = ()
    if evaluation is not None:
        stages.append(evaluation)
        if config.init.from_path is not None:
            compared = ("--evaluation", str(run.report / "evaluation" / "forgetting.json"))
    stages.append(
        Stage(
            name="report",
            stage="report",
            arguments=("report", str(run.path), "--output", str(run.report), *compared),
            needs=(stages[-1].name,),
            is_done=(run.report / "report.md").is_file() and is_trained,
        )
    )
    return stages


def chosen_stages(stages: Sequence[Stage], only: Sequence[str]) -> list[Stage]:
    """Return the stages named, or of the kinds named, in `only`; all of them when it is empty.

    Raises: LaunchError naming the stages there are.
    """
    known = list(dict.fromkeys([*(stage.stage for stage in stages), *(stage.name for stage in stages)]))
    unknown = [name for name in only if name not in known]
    if unknown:
        raise LaunchError(f"--only {unknown[0]}: no such stage in this run. There are {', '.join(known)}.")
    return [stage for stage in stages if not only or stage.name in only or stage.stage in only]


def _tokenize_stages(config: RunConfig, num_array_tasks: int, run: RunDir) -> list[Stage]:
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
                made = _tokenize_corpus(config, label, documents, tokens[0], tasks, run)
                stages += [dataclasses.replace(stage, needs=stage.needs or split) for stage in made]
            elif documents and not tokens and not label.endswith("validation"):
                raise ConfigError(_no_tokens(name, corpus))
    return stages


def _split_stage(config: RunConfig, name: str, corpus: CorpusConfig) -> Stage:
    """Return the job that takes a corpus's held-out documents apart."""
    data_dir = Path(config.paths.data_dir)
    output = data_dir / split_dir(name)
    inputs = [f"{DOCUMENTS}={data_dir / pattern}" for pattern in corpus.documents]
    words = ("data", "split", *inputs, "--name", VALIDATION, "--fraction", repr(corpus.held_out), "--compress")
    return Stage(
        name=f"split-{name}",
        stage="tokenize",
        arguments=(*words, "--output", str(output)),
        is_done=(output / f"{VALIDATION}.json").is_file(),
    )


def _no_tokens(name: str, corpus: CorpusConfig) -> str:
    return (
        f"data.corpora.{name}: documents {', '.join(corpus.documents)} but no tokens. The place of the token files is "
        f"needed. Set tokens: [tokens/{name}{TOKENS_SUFFIX}]."
    )


def _tokenize_corpus(
    config: RunConfig, label: str, documents: tuple[str, ...], tokens: str, num_array_tasks: int, run: RunDir
) -> list[Stage]:
    """Return the job that makes a corpus's token files; an array that makes parts of one shard needs one that joins them."""
    data_dir = Path(config.paths.data_dir)
    arguments = ["tokenize", "--input", *(str(data_dir / pattern) for pattern in documents)]
    arguments += ["--tokenizer", str(data_dir / (config.data.tokenizer or ""))]
    target = data_dir / tokens
    is_one_shard = tokens.endswith(TOKENS_SUFFIX)
    if is_one_shard:
        arguments += ["--output-prefix", str(target).removesuffix(TOKENS_SUFFIX)]
    else:
        arguments += ["--output-dir", str(target).split("*", 1)[0].rstrip("/")]
    files = [target.with_name(target.name + suffix) for suffix in (".bin", ".idx", ".json")]
    is_whole = is_one_shard and all(path.is_file() for path in files)
    is_array = num_array_tasks > 1
    if is_array:
        arguments += ["--shard", "{array_index}/{num_array_tasks}"]
    stage = Stage(
        name=label,
        stage="tokenize",
        arguments=tuple(arguments),
        is_done=is_whole or ((is_array or not is_one_shard) and _has_finished(run, label)),
        num_array_tasks=num_array_tasks if is_array else None,
    )
    if not (is_array and is_one_shard):
        return [stage]
    join = ("data", "merge", "--output-prefix", str(target), "--remove-inputs")
    name = label.replace("tokenize-", "merge-", 1)
    return [stage, Stage(name=name, stage="tokenize", arguments=join, needs=(label,), is_done=is_whole)]


def _soup_stage(config: RunConfig, run: RunDir, output: Path, soup_last: int, iterations: int) -> Stage:
    interval = config.checkpoint.save_interval
    saved = [*range(interval, iterations, interval), iterations]
    if len(saved) < soup_last:
        raise LaunchError(f"--soup-last {soup_last}: the run saves {len(saved)} checkpoints. Give a smaller number.")
    if config.checkpoint.keep_last is not None and config.checkpoint.keep_last < soup_last:
        raise LaunchError(
            f"--soup-last {soup_last}: checkpoint.keep_last keeps {config.checkpoint.keep_last}. Raise it to {soup_last}."
        )
    models = [str(run.checkpoints_hf / f"iter_{iteration:07d}") for iteration in saved[-soup_last:]]
    return Stage(
        name="soup",
        stage="soup",
        arguments=("soup", "--inputs", *models, "--output", str(output)),
        needs=("convert-out",),
        is_done=(output / "config.json").is_file(),
    )


def _evaluation_stage(config: RunConfig, run: RunDir, models: Sequence[tuple[str, Path]], needs: str) -> Stage | None:
    """Return bits per byte of the stage's start and end on every held-out text; None where there is no such text."""
    data_dir = Path(config.paths.data_dir)
    arguments = ["evaluate", "perplexity"]
    source = config.init.from_path
    if source is not None:
        arguments = ["evaluate", "forgetting", "--model", f"base={_base_model(config, source)}"]
    for name, path in models:
        arguments += ["--model", f"{name}={path}"]
    texts = [
        f"{name}={data_dir / path}"
        for name, corpus in config.data.corpora.items()
        for path in corpus.validation_documents
    ]
    for text in texts:
        arguments += ["--text", text]
    if not texts:
        return None
    if config.data.tokenizer:
        arguments += ["--tokenizer", str(data_dir / config.data.tokenizer)]
    output = run.report / "evaluation"
    result = output / ("perplexity.json" if source is None else "forgetting.json")
    arguments += ["--output", str(result if source is None else output)]
    is_done = result.is_file()
    return Stage(name="evaluate", stage="evaluate", arguments=tuple(arguments), needs=(needs,), is_done=is_done)


def _base_model(config: RunConfig, source: str) -> str:
    if not source.startswith("variant:"):
        return source
    name, _, iteration = source.removeprefix("variant:").partition("@")
    checkpoints = run_dir(dataclasses.replace(config, variant=name)).checkpoints
    return str(checkpoints / f"iter_{int(iteration):07d}" if iteration else checkpoints)


def _has_finished(run: RunDir, name: str) -> bool:
    """Return whether the ledger knows a finished job of this name; all tasks of an array must have finished."""
    jobs = read_jobs(run.jobs)
    for job, record in jobs.items():
        if record.get("name") != name or "/" in job:
            continue
        tasks = [other for identifier, other in jobs.items() if identifier.startswith(f"{job}/")]
        expected = record.get("num_array_tasks") or 0
        states = [task.get("state") for task in tasks] if expected else [record.get("state")]
        if states and all(state == "finished" for state in states) and len(states) >= expected:
            return True
    return False
