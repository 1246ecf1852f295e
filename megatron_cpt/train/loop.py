"""The training loop: set up, continue where the run stands, step, log, evaluate, save, end.

Every rank runs `train`; rank 0 decides and writes, the others follow through broadcasts. The stage's position is one
number, the samples consumed; iteration, tokens, learning rate, batches and per-corpus counts are functions of it.
"""

import dataclasses
import logging
import time
from pathlib import Path
from typing import Any

import numpy
import torch
from megatron.core import tensor_parallel
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from torch.distributed.checkpoint import CheckpointException

from megatron_cpt.checkpoint.mcore import newest_good_checkpoint, read_manifest
from megatron_cpt.checkpoint.retention import prune
from megatron_cpt.config.derived import train_iters, train_tokens
from megatron_cpt.config.load import LoadedConfig, write_resolved
from megatron_cpt.config.schema import RunConfig
from megatron_cpt.data.blend import finish_stage, plan_blend
from megatron_cpt.data.datalist import DataEntry, read_data_list, write_data_list
from megatron_cpt.data.tokenizer import load_tokenizer
from megatron_cpt.errors import CheckpointError, DataError
from megatron_cpt.launch.run_dir import RunDir, run_dir
from megatron_cpt.train.batches import DatasetTokenizer, build_train_dataset, microbatches
from megatron_cpt.train.checkpointing import (
    check_model_fits,
    check_unchanged,
    load_checkpoint,
    save_checkpoint,
)
from megatron_cpt.train.evaluation import build_validation_sets, validation_loss
from megatron_cpt.train.init import initial_checkpoint
from megatron_cpt.train.interrupt import Interrupts
from megatron_cpt.train.metrics import MetricsWriter, flops_per_token, peak_flops, train_line
from megatron_cpt.train.model import build_training_model
from megatron_cpt.train.parallel import finish_parallel, initialize_parallel, on_rank_0
from megatron_cpt.train.revision import code_revision
from megatron_cpt.train.samples import BlendedSamples
from megatron_cpt.train.schedule import schedule
from megatron_cpt.train.step import layout_text, train_step
from megatron_cpt.train.watchdog import Watchdog

logger = logging.getLogger(__name__)

MAX_SKIPPED_STEPS = 10
"""Steps in a row whose loss or gradients are not finite, after which a run gives up."""


def train(loaded: LoadedConfig) -> str:
    """Train one stage to its end, or until it is asked to stop; return the reason it ended.

    The reason is `finished`, `signal`, `walltime` or `stop_now`: all of them saved a checkpoint, and the same command
    continues the run. Raises: CptError for what a user can mend.
    """
    config = loaded.config
    run = run_dir(config)
    initialize_parallel(config)
    try:
        return _train(loaded, config, run)
    finally:
        finish_parallel()


def _train(loaded: LoadedConfig, config: RunConfig, run: RunDir) -> str:
    rank = torch.distributed.get_rank()
    training, iterations = config.training, train_iters(config.training)
    if training.deterministic:
        torch.use_deterministic_algorithms(True)
    interrupts = Interrupts(config.launch, run.path)
    resume = on_rank_0(lambda: newest_good_checkpoint(run.checkpoints, config.checkpoint.verify_on_load))
    manifest = read_manifest(resume) if resume else None
    iteration = int(manifest["iteration"]) if manifest else 0
    if iteration >= iterations:
        if rank == 0 and run.data_list_path.exists():
            finish_stage(config, read_data_list(run.data_list_path))  # a kill may have come just before it
        logger.info("%s: finished at iteration %d, nothing to do", run.path, iteration)
        return "finished"
    differences = check_unchanged(manifest["config"] if manifest else None, config, resume or run.path)

    may_change_list = resume is None or config.checkpoint.accept_changes
    entries = on_rank_0(lambda: _prepare_run_dir(loaded, run, may_change_list=may_change_list))
    data_dir = Path(config.paths.data_dir)
    tokenizer = load_tokenizer(data_dir / config.data.tokenizer) if config.data.tokenizer else None
    if tokenizer is None:
        raise DataError("data.tokenizer: not set. Its end-of-document id is needed. Name the tokenizer's folder.")
    dataset_tokenizer = DatasetTokenizer(tokenizer.eod_id, tokenizer.vocab_size, tokenizer.identity)
    dataset = build_train_dataset(config, entries, dataset_tokenizer, run.cache)
    validation_sets = build_validation_sets(config, dataset_tokenizer, run.cache, data_dir)

    model, optimizer = build_training_model(config)
    origin = _load(config, run, resume, model, optimizer)
    hf_config = read_manifest(origin).get("hf") if origin else None
    curve = schedule(config)
    flops = flops_per_token(config.model, training.seq_length)
    peak = peak_flops()
    writer = MetricsWriter(run, is_writer=rank == 0, tensorboard=config.logging.tensorboard)
    tokens_per_iteration = training.global_batch_size * training.seq_length
    writer.write(
        "start",
        iteration=iteration,
        consumed_tokens=iteration * tokens_per_iteration,
        resumed=resume is not None,
        layout=layout_text(),
        world_size=torch.distributed.get_world_size(),
        changed_settings=differences,
    )
    logger.info(
        "%s: %s, %s, iterations %d to %d (%d tokens each)",
        run.path, "continuing" if resume else "starting", layout_text(), iteration, iterations, tokens_per_iteration,
    )  # fmt: skip

    def evaluate() -> None:
        for validation in validation_sets:
            values = validation_loss(model, validation, config, tokenizer.eod_id)
            writer.write(
                "validation",
                iteration=iteration,
                consumed_tokens=iteration * tokens_per_iteration,
                corpus=validation.corpus,
                **values,
            )
            logger.info(
                "validation %s: loss %.4f, %.4f bits per byte",
                validation.corpus,
                values["loss"],
                values["bits_per_byte"],
            )

    queue = AsyncCallsQueue() if config.checkpoint.async_save else None

    def save(*, is_async: bool = queue is not None) -> None:
        started, saved_iteration = time.monotonic(), iteration
        state = _manifest(config, entries, dataset, iteration) | {"tokenizer": tokenizer.identity, "hf": hf_config}

        def after(directory: Path) -> None:
            seconds = time.monotonic() - started
            writer.write("save", iteration=saved_iteration, seconds=round(seconds, 3), stall_seconds=round(stall, 3))
            logger.info("saved %s in %.1f s, %.1f s of them stalled", directory, seconds, stall or seconds)
            if config.checkpoint.keep_last is not None:
                prune(run.checkpoints, config.checkpoint.keep_last, config.checkpoint.keep_every)

        stall = 0.0
        save_checkpoint(
            run.checkpoints, iteration, model, optimizer, state, queue=queue if is_async else None, after=after
        )
        stall = time.monotonic() - started

    def finish_saves(*, blocking: bool) -> None:
        """Complete saves whose files are written; a save whose writer failed is done again at once, while we wait."""
        if queue is None or not queue.get_num_unfinalized_calls():
            return
        try:
            queue.maybe_finalize_async_calls(blocking=blocking)
        except (CheckpointException, CheckpointError) as problem:
            logger.error("an asynchronous save FAILED (%s); saving iteration %d now", str(problem)[:500], iteration)
            save(is_async=False)

    reason = "finished"
    num_skipped = 0
    has_dropout = config.model.hidden_dropout > 0 or config.model.attention_dropout > 0
    window_started, window_iterations, window_data_seconds = time.monotonic(), 0, 0.0
    if config.evaluation.eval_interval and iteration == 0:
        evaluate()
        window_started = time.monotonic()
    first_iteration = iteration
    watchdog = Watchdog(config.launch.hang_timeout)
    while iteration < iterations:
        watchdog.beat()
        consumed_samples = iteration * training.global_batch_size
        learning_rate = curve.learning_rate(consumed_samples)
        data_started = time.monotonic()
        batches = microbatches(dataset, consumed_samples, training.global_batch_size, config, tokenizer.eod_id)
        window_data_seconds += time.monotonic() - data_started
        if has_dropout:  # what is dropped follows from the iteration, so a resume drops what it would have
            tensor_parallel.model_parallel_cuda_manual_seed(training.seed + iteration)
        result = train_step(model, optimizer, batches, config, learning_rate)
        iteration += 1
        window_iterations += 1
        num_skipped = 0 if result.is_updated else num_skipped + 1
        if not result.is_updated:
            logger.warning(
                "iteration %d: loss %s, gradient norm %s: step skipped (%d in a row)",
                iteration, result.loss, result.grad_norm, num_skipped,
            )  # fmt: skip
            if num_skipped >= MAX_SKIPPED_STEPS:
                raise DataError(
                    f"{run.path}: {num_skipped} steps in a row without a finite loss or gradient, at iteration "
                    f"{iteration}. The last checkpoint is from before. Lower optimizer.lr or look at the data."
                )
        if iteration == first_iteration + 1 or iteration % config.logging.log_interval == 0 or iteration == iterations:
            _check_learning_rate(optimizer, learning_rate)
            seconds = (time.monotonic() - window_started) / window_iterations
            tokens_per_second = tokens_per_iteration / seconds
            flops_per_second = tokens_per_second * flops / torch.distributed.get_world_size()
            record = {
                "iteration": iteration,
                "consumed_samples": iteration * training.global_batch_size,
                "consumed_tokens": iteration * tokens_per_iteration,
                "loss": result.loss,
                "lr": learning_rate,
                "grad_norm": result.grad_norm,
                "tokens_per_second": round(tokens_per_second, 1),
                "tflops_per_gpu": flops_per_second / 1e12,
                "mfu": flops_per_second / peak if peak else None,
                "data_seconds": round(window_data_seconds / window_iterations, 6),
                "memory_bytes": torch.cuda.max_memory_allocated(),
            }
            writer.write("train", **record)
            logger.info("%s", train_line(record, iterations, (iterations - iteration) * seconds))
            window_started, window_iterations, window_data_seconds = time.monotonic(), 0, 0.0
        paused = time.monotonic()
        if config.evaluation.eval_interval and (
            iteration % config.evaluation.eval_interval == 0 or iteration == iterations
        ):
            evaluate()
        request = on_rank_0(interrupts.poll)
        if iteration % config.checkpoint.save_interval == 0 or iteration == iterations or request is not None:
            save()
        finish_saves(blocking=False)
        window_started += time.monotonic() - paused
        if request is not None and request != "save_now" and iteration < iterations:
            reason = request
            break
    finish_saves(blocking=True)
    watchdog.stop()
    if reason == "finished" and rank == 0:
        finish_stage(config, entries)
    writer.write("end", iteration=iteration, reason=reason)
    writer.close()
    logger.info("%s: ended at iteration %d of %d: %s", run.path, iteration, iterations, reason)
    return reason


def _load(config: RunConfig, run: RunDir, resume: Path | None, model: list[Any], optimizer: Any) -> Path | None:
    """Load the run's own checkpoint, else what the stage starts from; return it, None for random weights."""
    source = None
    if resume is not None:
        check_model_fits(resume, config.model)
        load_checkpoint(resume, model, optimizer)
    else:
        source = on_rank_0(lambda: initial_checkpoint(config, run))
        if source is None:
            logger.warning("init.from_path is not set: training starts from random weights")
            return None
        check_model_fits(source, config.model)
        is_full = config.init.load == "full"
        load_checkpoint(source, model, optimizer if is_full else None)
        logger.info("loaded %s (%s)", source, "weights and optimizer" if is_full else "weights")
        if not is_full:
            optimizer.reload_model_params()
    for group in optimizer.param_groups:  # a checkpoint's groups carry the hyperparameters it was saved with
        group["betas"] = (config.optimizer.adam_beta1, config.optimizer.adam_beta2)
        group["eps"] = config.optimizer.adam_eps
    return resume or source


def _prepare_run_dir(loaded: LoadedConfig, run: RunDir, *, may_change_list: bool) -> list[DataEntry]:
    """Write the run directory's configuration, revision and data list; return the list's entries.

    Raises: DataError when the data of a run that has begun would change.
    """
    plan = plan_blend(loaded.config, begun=run.data_list_path)
    run.path.mkdir(parents=True, exist_ok=True)
    if run.data_list_path.exists() and not may_change_list:
        if list(read_data_list(run.data_list_path)) != list(plan.entries):
            raise DataError(
                f"{run.data_list_path}: the run began with this list, but its data now gives another one. "
                "Restore the token files or the mix, or start a new variant."
            )
    else:
        write_data_list(run.data_list_path, plan.entries)
    write_resolved(loaded, run.config_path)
    run.revision_path.write_text(code_revision() + "\n", encoding="utf-8")
    return list(plan.entries)


def _manifest(config: RunConfig, entries: list[DataEntry], dataset: BlendedSamples, iteration: int) -> dict[str, Any]:
    consumed = iteration * config.training.global_batch_size
    return {
        "iteration": iteration,
        "consumed_samples": consumed,
        "consumed_tokens": consumed * config.training.seq_length,
        "tokens_per_corpus": tokens_per_corpus(entries, dataset, consumed, config.training.seq_length),
        "train_tokens": train_tokens(config.training),
        "layout": {"text": layout_text(), **dataclasses.asdict(config.parallel)},
        "model": dataclasses.asdict(config.model),
        "config": dataclasses.asdict(config),
        "content": "full",
    }


def tokens_per_corpus(
    entries: list[DataEntry], dataset: BlendedSamples, consumed: int, seq_length: int
) -> dict[str, int]:
    """Return the tokens of each corpus in the first `consumed` samples, counted from the blend's own index."""
    counts = numpy.bincount(dataset.dataset_index[:consumed], minlength=len(entries))
    totals: dict[str, int] = {}
    for entry, count in zip(entries, counts, strict=True):
        name = entry.corpus or entry.prefix
        totals[name] = totals.get(name, 0) + int(count) * seq_length
    return totals


def _check_learning_rate(optimizer: Any, learning_rate: float) -> None:
    used = {group["lr"] / group.get("lr_mult", 1.0) for group in optimizer.param_groups}
    if used != {learning_rate}:
        raise AssertionError(f"the optimizer uses the learning rates {used}, the schedule says {learning_rate}")
