"""Checkpoints of a running stage: synchronous or asynchronous, with the older ones pruned."""

import logging
import time
from pathlib import Path

from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from torch.distributed.checkpoint import CheckpointException

from megatron_cpt.checkpoint.torch_dist.retention import prune
from megatron_cpt.errors import CheckpointError
from megatron_cpt.train.stage.setup import Stage
from megatron_cpt.train.state.checkpointing import save_checkpoint
from megatron_cpt.train.watch.metrics import MetricsWriter

logger = logging.getLogger(__name__)


class Saver:
    """Saves a stage; every rank calls it at the same iterations."""

    def __init__(self, stage: Stage, writer: MetricsWriter):
        self._stage = stage
        self._writer = writer
        self._queue = AsyncCallsQueue() if stage.config.checkpoint.async_save else None

    def save(self, iteration: int, losses: list[float], *, can_wait: bool = True) -> None:
        """Save the stage's state after `iteration` iterations; with `can_wait` False return when it is on disk."""
        stage, started = self._stage, time.monotonic()
        stall: float | None = None  # known once training goes on; a save that is complete before stalls it all the time

        def after(directory: Path) -> None:
            seconds = time.monotonic() - started
            stalled = seconds if stall is None else stall
            self._writer.write("save", iteration=iteration, seconds=round(seconds, 3), stall_seconds=round(stalled, 3))
            logger.info("saved %s in %.1f s, %.1f s of them stalled", directory, seconds, stalled)
            kept = stage.config.checkpoint
            if kept.keep_last is not None or kept.keep_bytes is not None:
                prune(stage.run.checkpoints, kept.keep_last, kept.keep_every, quota=kept.keep_bytes)

        save_checkpoint(
            stage.run.checkpoints,
            iteration,
            stage.model,
            stage.optimizer,
            stage.manifest(iteration, losses),
            queue=self._queue if can_wait else None,
            read_back=stage.config.checkpoint.verify_on_save,
            after=after,
        )
        stall = time.monotonic() - started

    def finish(self, iteration: int, losses: list[float], *, is_blocking: bool) -> None:
        """Complete saves whose files are written; a save whose writer failed is done again at once, while we wait."""
        if self._queue is None or not self._queue.get_num_unfinalized_calls():
            return
        try:
            self._queue.maybe_finalize_async_calls(blocking=is_blocking)
        except (CheckpointException, CheckpointError) as problem:
            logger.error("an asynchronous save FAILED (%s); saving iteration %d now", str(problem)[:500], iteration)
            self.save(iteration, losses, can_wait=False)
