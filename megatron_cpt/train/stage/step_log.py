"""Time of a run: parts of a step summed between two logged lines, throughput, and the remaining time of the stage.

Evaluations, saves and roll-backs are not part of a step's time; the seconds that saves held the run up are told apart.
All seconds are rank 0's wall clock and means per step. The remaining time includes future evaluations and saves, each
as long as the last one.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from megatron_cpt.train.stage.setup import Stage
from megatron_cpt.train.stage.step import StepResult
from megatron_cpt.train.watch.interrupt import Interrupts
from megatron_cpt.train.watch.metrics import flops_per_token, peak_flops, peak_memory_bytes


class StepLog:
    """Sums the steps since the last record."""

    def __init__(self, stage: Stage, interrupts: Interrupts):
        self._stage = stage
        self._interrupts = interrupts
        self._flops = flops_per_token(stage.config.model, stage.config.training.seq_length)
        self._peak = peak_flops()
        self._ranks = torch.distributed.get_world_size()
        self._last: dict[str, float] = {}
        self._restart()

    def _restart(self) -> None:
        self._steps = self._tokens = 0
        self._data = self._forward_backward = self._optimizer = self._saving = self._paused = 0.0
        self._began = time.monotonic()

    @contextmanager
    def data(self) -> Iterator[None]:
        """Count what runs inside as waiting for data."""
        started = time.monotonic()
        yield
        self._data += time.monotonic() - started

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """Leave what runs inside out of the steps' time."""
        started = time.monotonic()
        yield
        self._last["evaluation"] = time.monotonic() - started
        self._paused += self._last["evaluation"]

    @contextmanager
    def save(self, *, is_new: bool) -> Iterator[None]:
        """Leave what runs inside out of the steps' time and count it as a save's: a new one, or the end of an earlier one."""
        started = time.monotonic()
        yield
        seconds = time.monotonic() - started
        self._paused += seconds
        self._saving += seconds
        if is_new:
            self._last["save"] = seconds

    def restart(self) -> None:
        """Forget the steps since the last record: they were undone."""
        self._restart()

    def add(self, result: StepResult, num_samples: int) -> None:
        """Count a step."""
        self._steps += 1
        self._tokens += num_samples * self._stage.config.training.seq_length
        self._forward_backward += result.forward_backward_seconds
        self._optimizer += result.optimizer_seconds

    def record(self, iteration: int, result: StepResult, learning_rate: float, weight_decay: float) -> dict[str, Any]:
        """Return the record of the step that ended at `iteration`, with means over the steps since the last record."""
        stage, steps = self._stage, self._steps
        seconds = time.monotonic() - self._began - self._paused
        rate = self._tokens / seconds
        flops = rate * self._flops / self._ranks
        left = (stage.tokens(stage.iterations) - stage.tokens(iteration)) / rate + self._pauses_left(iteration)
        record = {
            "iteration": iteration,
            "consumed_samples": stage.sizes.samples(iteration),
            "consumed_tokens": stage.tokens(iteration),
            "loss": result.loss,
            "lr": learning_rate,
            "weight_decay": weight_decay,
            "global_batch_size": stage.sizes.size(iteration - 1),
            "grad_norm": result.grad_norm,
            "tokens_per_second": round(rate, 1),
            "tokens_per_second_per_gpu": round(rate / self._ranks, 1),
            "tflops_per_gpu": flops / 1e12,
            "mfu": flops / self._peak if self._peak else None,
            "step_seconds": round(seconds / steps, 6),
            "data_seconds": round(self._data / steps, 6),
            "forward_backward_seconds": round(self._forward_backward / steps, 6),
            "optimizer_seconds": round(self._optimizer / steps, 6),
            "checkpoint_seconds": round(self._saving, 6),
            "memory_bytes": peak_memory_bytes(),
            "eta_seconds": round(left, 1),
            "walltime_left_seconds": self._interrupts.seconds_left(),
        }
        self._restart()
        return record

    def _pauses_left(self, iteration: int) -> float:
        """Return the seconds of the evaluations and saves from the end of `iteration` on."""
        config, last = self._stage.config, self._stage.iterations

        def times(interval: int) -> int:
            return last // interval - (iteration - 1) // interval + (last % interval > 0) if interval else 0

        return times(config.evaluation.eval_interval) * self._last.get("evaluation", 0.0) + times(
            config.checkpoint.save_interval
        ) * self._last.get("save", 0.0)
