"""The training loop: set up, resume, step, log, evaluate, save, end.

Every rank runs `train`; rank 0 decides and writes, the others follow through broadcasts. The stage's position is one
number, the samples consumed; iteration, tokens, learning rate, batches and per-corpus counts are functions of it.
"""

import contextlib
import dataclasses
import logging
from typing import Any

import torch
from megatron.core import tensor_parallel

from megatron_cpt.config.loading.resolve import LoadedConfig
from megatron_cpt.config.settings.derived import train_iters
from megatron_cpt.config.settings.iteration_ranges import contains
from megatron_cpt.config.settings.schema import RunConfig
from megatron_cpt.data.blend.plan import finish_stage
from megatron_cpt.data.lists.data_list import read_data_list
from megatron_cpt.errors import DataError
from megatron_cpt.evaluate.page.build import LivePage
from megatron_cpt.run.directory import RunDir, run_dir
from megatron_cpt.run.progress import read_progress
from megatron_cpt.train.backend.agreement import check_ranks_agree
from megatron_cpt.train.backend.parallel import finish_parallel, initialize_parallel, on_rank_0
from megatron_cpt.train.samples.batches import microbatches
from megatron_cpt.train.samples.prefetch import Prefetch
from megatron_cpt.train.stage.saving import Saver
from megatron_cpt.train.stage.schedule import schedule
from megatron_cpt.train.stage.setup import Stage, prepare
from megatron_cpt.train.stage.spike_reaction import react
from megatron_cpt.train.stage.step import StepResult, layout_text, train_step
from megatron_cpt.train.stage.step_log import StepLog
from megatron_cpt.train.stage.validation import validation_loss
from megatron_cpt.train.watch.held_run import held_run
from megatron_cpt.train.watch.interrupt import Interrupts
from megatron_cpt.train.watch.metrics import MetricsWriter, train_line
from megatron_cpt.train.watch.spikes import SpikeDetector
from megatron_cpt.train.watch.wandb_run import check_wandb
from megatron_cpt.train.watch.watchdog import Watchdog, longest_stage_seconds

logger = logging.getLogger(__name__)

MAX_SKIPPED_STEPS = 10
"""Steps in a row whose loss or gradients are not finite, after which a run stops."""


def train(loaded: LoadedConfig) -> str:
    """Train one stage to its end, or until it is asked to stop; return the reason it ended.

    The reason is `finished`, `signal`, `walltime` or `stop_now`: all of them saved a checkpoint, and the same command
    continues the run. Raises: CptError for errors that a user can fix.
    """
    config = loaded.config
    with Watchdog(config.launch.hang_timeout, stage="joining") as watchdog:

        def met() -> None:
            watchdog.listen()
            check_ranks_agree(config)

        initialize_parallel(config, _collective_timeout(config.launch.hang_timeout), met)
        watchdog.enter("preparation")
        return _train_and_leave(loaded, watchdog)


def _train_and_leave(loaded: LoadedConfig, watchdog: Watchdog) -> str:
    try:
        with held_run(run_dir(loaded.config)):
            return _train(loaded, watchdog)
    except BrokenPipeError as problem:  # of the command line's output it would be a reason to end without a word
        raise RuntimeError("a process that helps this rank (a checkpoint's writer) has ended unexpectedly") from problem
    finally:
        finish_parallel()


def _train(loaded: LoadedConfig, watchdog: Watchdog) -> str:
    with contextlib.ExitStack() as ends:  # the reading ahead ends with the run, however it ends
        return _train_stage(loaded, ends, watchdog)


def _train_stage(loaded: LoadedConfig, ends: contextlib.ExitStack, watchdog: Watchdog) -> str:
    config, run, rank = loaded.config, run_dir(loaded.config), torch.distributed.get_rank()
    if config.training.deterministic:
        torch.use_deterministic_algorithms(True)
    interrupts = Interrupts(config.launch, run.path)
    on_rank_0(lambda: check_wandb(config.logging))
    stage = prepare(loaded, watchdog=watchdog)
    if stage is None:
        if rank == 0:
            _finish_after_a_kill(config, run)
        logger.info("%s: finished, nothing to do", run.path)
        return "finished"
    writer = MetricsWriter(
        run,
        is_writer=rank == 0,
        config=config,
        iteration=stage.iteration,
        consumed_tokens=stage.tokens(stage.iteration),
    )
    page = LivePage(run, is_writer=rank == 0)
    saver, log, curve = Saver(stage, writer), StepLog(stage, interrupts), schedule(config)
    spikes = SpikeDetector(config.training.spike_threshold, stage.recent_losses)
    has_dropout = config.model.hidden_dropout > 0 or config.model.attention_dropout > 0
    iteration = first_iteration = stage.iteration
    _write_start(stage, writer)

    reason, num_skipped = "finished", 0
    if config.evaluation.eval_interval and iteration == 0:
        with log.evaluation(), watchdog.during("evaluation"):
            _evaluate(stage, writer, iteration)
            page.rewrite()
    watchdog.enter("step")
    batches_ahead = ends.enter_context(_batches_ahead(stage))
    while iteration < stage.iterations:
        watchdog.beat()
        first_sample, num_samples = stage.sizes.samples(iteration), stage.sizes.size(iteration)
        iteration += 1
        if contains(stage.skipped, iteration):
            logger.info("iteration %d: skipped (data.skip_iterations or skip_iterations.txt)", iteration)
            writer.write("skip", iteration=iteration, consumed_tokens=stage.tokens(iteration))
        else:
            learning_rate, weight_decay = curve.learning_rate(first_sample), curve.weight_decay(first_sample)
            with log.data():
                batches = batches_ahead.get(iteration)
            if has_dropout:  # what is dropped follows from the iteration, so a resume drops what it would have
                tensor_parallel.model_parallel_cuda_manual_seed(config.training.seed + iteration - 1)
            result = train_step(stage.model, stage.optimizer, batches, config, learning_rate, weight_decay)
            log.add(result, num_samples)
            num_skipped = 0 if result.is_updated else num_skipped + 1
            if not result.is_updated:
                if num_skipped >= MAX_SKIPPED_STEPS:
                    saver.finish(iteration, spikes.losses, is_blocking=True)  # the checkpoint from before
                _note_no_update(stage, iteration, result, num_skipped)
            elif (spike := spikes.see(result.loss)) and react(stage, saver, writer, spike, iteration):
                # The loss is summed over all ranks, so every rank sees the same spike and goes back with the
                # others. The window is the checkpoint's, so the repeated steps are judged as in a resumed run.
                iteration, spikes = stage.iteration, SpikeDetector(spikes.threshold, stage.recent_losses)
                # Batches that were read ahead belong to later iterations, and their thread uses the old skip list.
                batches_ahead.close()
                batches_ahead = ends.enter_context(_batches_ahead(stage))
                # No log line, evaluation or save: the step has been undone.
                log.restart()
                continue
            is_first = iteration == first_iteration + 1
            if is_first or iteration % config.logging.log_interval == 0 or iteration == stage.iterations:
                _check_learning_rate(stage.optimizer, learning_rate)
                record = log.record(iteration, result, learning_rate, weight_decay)
                writer.write("train", **record)
                logger.info("%s", train_line(record, stage.iterations))
        is_last = iteration == stage.iterations
        if config.evaluation.eval_interval and (iteration % config.evaluation.eval_interval == 0 or is_last):
            with log.evaluation(), watchdog.during("evaluation"):
                _evaluate(stage, writer, iteration)
                page.rewrite()
        # Every step, on every rank: a signal can reach one rank only, and all ranks must save together.
        request = interrupts.agreed()
        if iteration % config.checkpoint.save_interval == 0 or is_last or request is not None:
            with log.save(is_new=True), watchdog.during("saving"):
                saver.save(iteration, spikes.losses)
        with log.save(is_new=False), watchdog.during("saving"):
            saver.finish(iteration, spikes.losses, is_blocking=False)
        if request is not None and request != "save_now" and not is_last:
            reason = request
            break
    watchdog.enter("saving")
    saver.finish(iteration, spikes.losses, is_blocking=True)
    ends.close()
    if reason == "finished" and rank == 0:
        finish_stage(config, stage.entries)
    writer.write("end", iteration=iteration, reason=reason)
    writer.close()
    page.rewrite(is_last=True)
    logger.info("%s: ended at iteration %d of %d: %s", run.path, iteration, stage.iterations, reason)
    return reason


def _finish_after_a_kill(config: RunConfig, run: RunDir) -> None:
    """Do what a run that was killed between its last save and its end has left undone."""
    if run.data_list_path.exists():
        finish_stage(config, read_data_list(run.data_list_path))
    if run.metrics_path.exists() and read_progress(run).end_reason != "finished":
        silent = dataclasses.replace(config.logging, tensorboard=False, wandb_project=None)
        writer = MetricsWriter(run, is_writer=True, config=dataclasses.replace(config, logging=silent))
        writer.write("end", iteration=train_iters(config.training), reason="finished")
        writer.close()


def _collective_timeout(hang_timeout: int) -> int:
    """Return seconds after which a collective call fails: later than the watchdog ends a rank, so that the watchdog
    reports the reason."""
    return max(1800, int(longest_stage_seconds(hang_timeout)) + 120)


def _batches_ahead(stage: Stage) -> Prefetch:
    """Return the batches of the steps from the stage's iteration on, counted as the log counts, read ahead."""
    config, sizes, skipped = stage.config, stage.sizes, stage.skipped

    def read(iteration: int) -> Any:
        first_sample, num_samples = sizes.samples(iteration - 1), sizes.size(iteration - 1)
        return microbatches(stage.dataset, first_sample, num_samples, config, stage.tokenizer.eod_id)

    steps = range(stage.iteration + 1, stage.iterations + 1)
    return Prefetch(read, (iteration for iteration in steps if not contains(skipped, iteration)))


def _write_start(stage: Stage, writer: MetricsWriter) -> None:
    iteration, is_resumed = stage.iteration, stage.resume is not None
    writer.write(
        "start",
        iteration=iteration,
        consumed_tokens=stage.tokens(iteration),
        resumed=is_resumed,
        layout=layout_text(),
        world_size=torch.distributed.get_world_size(),
        changed_settings=stage.differences,
    )
    logger.info(
        "%s: %s, %s, iterations %d to %d (%d tokens each)",
        stage.run.path, "continuing" if is_resumed else "starting", layout_text(), iteration, stage.iterations,
        stage.sizes.size(iteration) * stage.config.training.seq_length,
    )  # fmt: skip


def _evaluate(stage: Stage, writer: MetricsWriter, iteration: int) -> None:
    for validation in stage.validation_sets:
        values = validation_loss(stage.model, validation, stage.config, stage.tokenizer.eod_id)
        place = {"iteration": iteration, "consumed_tokens": stage.tokens(iteration), "corpus": validation.corpus}
        writer.write("validation", **place, **values)
        bits = f", {values['bits_per_byte']:.4f} bits per byte" if "bits_per_byte" in values else ""
        logger.info("validation %s: loss %.4f%s", validation.corpus, values["loss"], bits)


def _note_no_update(stage: Stage, iteration: int, result: StepResult, num_skipped: int) -> None:
    """Warn about a step that changed nothing. Raises: DataError when there were too many in a row."""
    logger.warning(
        "iteration %d: loss %s, gradient norm %s: step skipped (%d in a row)",
        iteration, result.loss, result.grad_norm, num_skipped,
    )  # fmt: skip
    if num_skipped >= MAX_SKIPPED_STEPS:
        raise DataError(
            f"{stage.run.path}: {num_skipped} steps in a row without a finite loss or gradient, at iteration "
            f"{iteration}. The last checkpoint is from before. Lower optimizer.lr or look at the data."
        )


def _check_learning_rate(optimizer: Any, learning_rate: float) -> None:
    used = {group["lr"] / group.get("lr_mult", 1.0) for group in optimizer.param_groups}
    if used != {learning_rate}:
        raise AssertionError(f"the optimizer uses the learning rates {used}, the schedule says {learning_rate}")
