"""A stage ready to train: data, model and optimizer, at the run's current position.

`prepare` finds the run's newest good checkpoint, refuses settings or data that would silently change a run that has begun,
builds everything and loads it.
"""

import dataclasses
import gc
import logging
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.core.optimizer import MegatronOptimizer

from megatron_cpt.checkpoint.huggingface.options import ImportOptions
from megatron_cpt.checkpoint.torch_dist.kept_files import share_companions
from megatron_cpt.checkpoint.torch_dist.mcore import newest_good_checkpoint, read_manifest
from megatron_cpt.config.loading.paths import data_path
from megatron_cpt.config.loading.resolve import LoadedConfig, write_resolved
from megatron_cpt.config.settings.batch_sizes import BatchSizes, batch_sizes
from megatron_cpt.config.settings.derived import may_change_data_list, train_iters, train_samples, train_tokens
from megatron_cpt.config.settings.iteration_ranges import Ranges
from megatron_cpt.config.settings.schema import RunConfig
from megatron_cpt.data.blend.plan import plan_blend
from megatron_cpt.data.blend.sources import validation_prefixes
from megatron_cpt.data.blend.stage_order import StageOrder, write_order
from megatron_cpt.data.blend.start_position import continued_order
from megatron_cpt.data.blend.table import BlendPlan
from megatron_cpt.data.lists.data_list import DataEntry, read_data_list, write_data_list
from megatron_cpt.data.shards.corpus_documents import check_tokenized
from megatron_cpt.data.shards.discovery import content_problems
from megatron_cpt.data.tokenizer.interface import Tokenizer, load_tokenizer
from megatron_cpt.errors import ConfigError, DamagedError, DataError
from megatron_cpt.files import write_json
from megatron_cpt.run.data_history import keep_superseded
from megatron_cpt.run.directory import RunDir, run_dir
from megatron_cpt.run.revision import code_revision
from megatron_cpt.train.backend.agreement import check_data_agree
from megatron_cpt.train.backend.parallel import on_rank_0
from megatron_cpt.train.model.build import build_training_model
from megatron_cpt.train.samples.batches import DatasetTokenizer, build_train_dataset
from megatron_cpt.train.samples.skipped_iterations import passed_ranges, skipped_ranges, tokens_per_corpus
from megatron_cpt.train.samples.stage_samples import BlendedSamples
from megatron_cpt.train.stage.step import layout_text
from megatron_cpt.train.stage.validation import ValidationSet, build_validation_sets, check_validation_shards
from megatron_cpt.train.state.checkpointing import load_checkpoint
from megatron_cpt.train.state.resume_check import (
    check_model_fits,
    check_position,
    check_unchanged,
    reads_other_data,
)
from megatron_cpt.train.state.start_weights import initial_checkpoint
from megatron_cpt.train.watch.environment import environment
from megatron_cpt.train.watch.watchdog import Watchdog

logger = logging.getLogger(__name__)


@dataclass
class Stage:
    """Everything that a stage trains with."""

    config: RunConfig
    run: RunDir
    sizes: BatchSizes
    iterations: int
    """Iterations of the whole stage."""
    entries: list[DataEntry]
    dataset: BlendedSamples
    tokenizer: Tokenizer
    validation_sets: list[ValidationSet]
    model: list[Any]
    optimizer: MegatronOptimizer
    hf: dict[str, Any] | None
    """Metadata of the stage's initial model for an export to Hugging Face."""
    imported: dict[str, Any]
    """Options with which this model was converted, as its manifest holds them; an export needs them again."""
    skipped: Ranges
    """Iterations that pass without a step."""
    resume: Path | None
    """The run's own checkpoint that was loaded; None at a stage's start."""
    iteration: int
    """Iterations that this checkpoint has behind it."""
    counted: dict[str, int]
    """Tokens of each corpus in these."""
    recent_losses: list[float]
    """The spike detector's window at that iteration."""
    differences: list[str]
    """Settings that differ from the checkpoint's."""

    def tokens(self, iteration: int) -> int:
        """Return the tokens consumed by the first `iteration` iterations."""
        return self.sizes.samples(iteration) * self.config.training.seq_length

    def manifest(self, iteration: int, losses: list[float]) -> dict[str, Any]:
        """Return a checkpoint's record of the run at an iteration."""
        config, samples = self.config, self.sizes.samples(iteration)
        return {
            "iteration": iteration,
            "consumed_samples": samples,
            "consumed_tokens": samples * config.training.seq_length,
            "tokens_per_corpus": tokens_per_corpus(
                self.entries,
                self.dataset,
                self.sizes,
                (self.iteration, iteration),
                self.skipped,
                config.training.seq_length,
                self.counted,
            ),
            "skipped_iterations": passed_ranges(self.skipped, iteration),
            "recent_losses": losses,
            "train_tokens": train_tokens(config.training),
            "layout": {"text": layout_text(), **dataclasses.asdict(config.parallel)},
            "model": dataclasses.asdict(config.model),
            "config": dataclasses.asdict(config),
            "content": "full",
            "tokenizer": self.tokenizer.identity,
            "hf": self.hf,
            **self.imported,
        }


def prepare(loaded: LoadedConfig, *, from_start: bool = False, watchdog: Watchdog | None = None) -> Stage | None:
    """Return the stage with everything loaded, None when the run is finished.

    With `from_start`, the run's own checkpoints are ignored, and no file that describes the run is written. A
    checkpoint of the run that verifies on rank 0 and that a rank then cannot load is passed over as a damaged one is.

    Raises: CptError for errors that a user can fix, on every rank.
    """
    unreadable: set[Path] = set()
    watchdog = watchdog or Watchdog(0)
    while True:
        try:
            return _prepare(loaded, unreadable, watchdog, from_start=from_start)
        except _Unloadable as failed:
            logger.warning("WALKING BACK: %s", failed)
            unreadable.add(failed.directory)
        gc.collect()  # the model that was half loaded


class _Unloadable(Exception):
    """A checkpoint of the run that cannot be read on some rank."""

    def __init__(self, directory: Path, problem: DamagedError):
        super().__init__(str(problem))
        self.directory = directory


def _prepare(
    loaded: LoadedConfig, unreadable: Collection[Path], watchdog: Watchdog, *, from_start: bool
) -> Stage | None:
    config, run = loaded.config, run_dir(loaded.config)
    iterations = train_iters(config.training)
    own = on_rank_0(lambda: newest_good_checkpoint(run.checkpoints, config.checkpoint.verify_on_load, unreadable))
    resume = None if from_start else own
    manifest = on_rank_0(lambda: read_manifest(resume)) if resume else None
    iteration = int(manifest["iteration"]) if manifest else 0
    if iteration >= iterations:
        return None
    differences = check_unchanged(manifest["config"] if manifest else None, config, resume or run.path)

    if resume and manifest:
        check_position(manifest, config.training, resume)
    may_change_list = own is None or may_change_data_list(config.checkpoint)
    is_changed = manifest is not None and reads_other_data(manifest["config"], config)

    def planned() -> StageOrder:
        plan = plan_blend(config, begun=run.data_list_path, order=_continued_order(config, run, manifest))
        if not from_start:
            if own is None:
                check_tokenized(config)
            _prepare_run_dir(loaded, run, plan, iteration, is_changed=is_changed, may_change_list=may_change_list)
        _check_contents(config, plan.entries)
        return plan.order

    order: StageOrder = on_rank_0(planned)
    check_data_agree(order.entries)
    on_rank_0(lambda: check_validation_shards(config))
    tokenizer = load_tokenizer(Path(data_path(config.paths, config.data.tokenizer))) if config.data.tokenizer else None
    if tokenizer is None:
        raise DataError("data.tokenizer: not set. Its end-of-document id is needed. Name the tokenizer's folder.")
    dataset_tokenizer = DatasetTokenizer(tokenizer.eod_id, tokenizer.vocab_size, tokenizer.identity)
    dataset = build_train_dataset(config, order, dataset_tokenizer, run.cache)
    validation_sets = build_validation_sets(config, dataset_tokenizer, run.cache)

    model, optimizer = build_training_model(config)
    with watchdog.during("loading" if resume else "preparation"):  # a model may be converted first
        origin = _load_start(config, run, resume, model, optimizer)
    origin_manifest = on_rank_0(lambda: read_manifest(origin)) if origin else {}
    if origin is not None:
        on_rank_0(lambda: share_companions(origin, run.checkpoints))
    return Stage(
        config=config,
        run=run,
        sizes=batch_sizes(config.training),
        iterations=iterations,
        entries=order.stage_entries,
        dataset=dataset,
        tokenizer=tokenizer,
        validation_sets=validation_sets,
        model=model,
        optimizer=optimizer,
        hf=origin_manifest.get("hf"),
        imported=ImportOptions.of(origin_manifest).record(),
        skipped=on_rank_0(lambda: skipped_ranges(config.data, run, manifest)),
        resume=resume,
        iteration=iteration,
        counted=dict(manifest["tokens_per_corpus"]) if manifest else {},
        recent_losses=manifest.get("recent_losses", []) if manifest else [],
        differences=differences,
    )


def _check_contents(config: RunConfig, entries: list[DataEntry]) -> None:
    """Look at blocks of every shard that is read: a damaged one would be trained on.

    Raises: DataError naming the damaged ones.
    """
    held_out = config.data.corpora if config.evaluation.eval_interval else ()
    prefixes = [entry.prefix for entry in entries]
    prefixes += [prefix for corpus in held_out for prefix in validation_prefixes(config, corpus, [])]
    if problems := content_problems(list(dict.fromkeys(prefixes))):
        raise DataError("\n".join(problems))


def go_back(stage: Stage) -> None:
    """Load the run's newest good checkpoint into the stage, and reread the skipped iterations."""
    config, run = stage.config, stage.run
    directory = on_rank_0(lambda: newest_good_checkpoint(run.checkpoints, config.checkpoint.verify_on_load))
    load_checkpoint(directory, stage.model, stage.optimizer)
    set_hyperparameters(stage.optimizer, config)
    manifest = on_rank_0(lambda: read_manifest(directory))
    stage.resume, stage.iteration = directory, int(manifest["iteration"])
    stage.counted = dict(manifest["tokens_per_corpus"])
    stage.recent_losses = manifest.get("recent_losses", [])
    stage.skipped = on_rank_0(lambda: skipped_ranges(config.data, run, manifest))


def set_hyperparameters(optimizer: MegatronOptimizer, config: RunConfig) -> None:
    """Give the optimizer this configuration's Adam settings: a checkpoint's groups carry those it was saved with."""
    for group in optimizer.param_groups:
        group["betas"] = (config.optimizer.adam_beta1, config.optimizer.adam_beta2)
        group["eps"] = config.optimizer.adam_eps


def _load_start(
    config: RunConfig, run: RunDir, resume: Path | None, model: list[Any], optimizer: MegatronOptimizer
) -> Path | None:
    """Load the run's own checkpoint, else what the stage starts from; return it, None for random weights."""
    source = None
    if resume is not None:
        on_rank_0(lambda: check_model_fits(resume, config.model))
        try:
            load_checkpoint(resume, model, optimizer)
        except DamagedError as problem:
            raise _Unloadable(resume, problem) from None
    else:
        source = on_rank_0(lambda: initial_checkpoint(config, run))
        if source is None:
            logger.warning("init.from_path is not set: training starts from random weights")
            return None
        on_rank_0(lambda: check_model_fits(source, config.model))
        is_full = config.init.load == "full"
        load_checkpoint(source, model, optimizer if is_full else None)
        logger.info("loaded %s (%s)", source, "weights and optimizer" if is_full else "weights")
        if not is_full:
            optimizer.reload_model_params()
    set_hyperparameters(optimizer, config)
    return resume or source


def _continued_order(config: RunConfig, run: RunDir, manifest: dict[str, Any] | None) -> StageOrder | None:
    """Return the order that the stage continues, None for one of its own.

    A run with only its length changed continues its original order: an order planned for the new length would repeat
    some samples and skip others.
    """
    order = continued_order(config)
    if manifest is None:
        return order
    if reads_other_data(manifest["config"], config):
        if config.data.order == "continue":
            raise ConfigError(
                f"{run.path}: the data differ from those of the order that it continues. Restore them, or use another variant."
            )
        return None
    num_samples = int(manifest["train_tokens"]) // config.training.seq_length
    if order is not None or num_samples == train_samples(config.training):
        return order
    return StageOrder(
        source=f"{run.path}, planned for {num_samples} samples",
        num_samples=num_samples,
        count=train_samples(config.training),
        seq_length=config.training.seq_length,
        seed=config.training.seed,
        shuffle_in_corpus=config.data.shuffle_in_corpus,
        entries=tuple(read_data_list(run.data_list_path)),
    )


def _prepare_run_dir(
    loaded: LoadedConfig,
    run: RunDir,
    plan: BlendPlan,
    iteration: int,
    *,
    is_changed: bool,
    may_change_list: bool,
) -> None:
    """Write the run directory's configuration, revision, order and data list.

    The data of the run's first `iteration` iterations (None: it does not resume) is kept if another list, or the same
    list in another order (`is_changed`), follows.

    Raises: DataError when the data of a run that has begun would change.
    """
    run.path.mkdir(parents=True, exist_ok=True)
    is_other = run.data_list_path.exists() and list(read_data_list(run.data_list_path)) != list(plan.entries)
    if may_change_list or not is_other:
        keep_superseded(run, iteration, is_changed=is_changed or is_other)
    if plan.order.is_continued:  # before the list, which follows from it
        write_order(run.data_order_path, plan.order)
    elif may_change_list:
        run.data_order_path.unlink(missing_ok=True)
    if run.data_list_path.exists() and not may_change_list:
        if is_other:
            raise DataError(
                f"{run.data_list_path}: the run began with this list, but its data now gives another one. "
                "Restore the token files or the mix, or start a new variant."
            )
    else:
        write_data_list(run.data_list_path, plan.entries)
    write_resolved(loaded, run.config_path)
    run.revision_path.write_text(code_revision() + "\n", encoding="utf-8")
    write_json(run.environment_path, environment())
