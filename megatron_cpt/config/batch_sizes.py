"""How many samples each step of a stage takes, and so which iteration follows how many samples; one place for all.

Without a ramp-up every step takes `global_batch_size` samples. `training.rampup_batch_size: [start, increment, samples]`
is Megatron-LM's `--rampup-batch-size`: the batch grows from `start` by `increment` in equal shares of the first `samples`
samples, so a step that begins after c of them takes

    start + increment x floor(c x n / samples),  n = (global_batch_size - start) / increment,  at most global_batch_size

Everything else (data order, learning rate, counts per corpus) is a function of the samples consumed.

Source: `megatron/core/num_microbatches_calculator.py` 0.19, `RampupBatchsizeNumMicroBatchesCalculator`; whole numbers
here, where floating point could put a step on the other side of a boundary.
"""

from dataclasses import dataclass
from functools import cache

from megatron_cpt.config.schema import TrainingConfig


@dataclass(frozen=True)
class Piece:
    """Steps of one size: from `iteration` steps and `samples` samples on, until the next piece."""

    iteration: int
    samples: int
    size: int


@dataclass(frozen=True)
class BatchSizes:
    """The sizes of a stage's steps; `iteration` counts finished steps, so step n + 1 begins at iteration n."""

    pieces: tuple[Piece, ...]

    def size(self, iteration: int) -> int:
        """Return the samples of the step that begins after `iteration` steps."""
        return self._piece(iteration).size

    def samples(self, iteration: int) -> int:
        """Return the samples of the first `iteration` steps."""
        piece = self._piece(iteration)
        return piece.samples + (iteration - piece.iteration) * piece.size

    def iterations(self, samples: int) -> int:
        """Return the fewest steps that take at least `samples` samples."""
        piece = next(piece for piece in reversed(self.pieces) if piece.samples <= samples)
        return piece.iteration - (-(samples - piece.samples) // piece.size)

    def _piece(self, iteration: int) -> Piece:
        return next(piece for piece in reversed(self.pieces) if piece.iteration <= iteration)


@cache
def batch_sizes(training: TrainingConfig) -> BatchSizes:
    """Return the sizes of a stage's steps."""
    if training.rampup_batch_size is None:
        return BatchSizes((Piece(0, 0, training.global_batch_size),))
    start, increment, ramp_samples = training.rampup_batch_size
    num_increments = (training.global_batch_size - start) // increment
    pieces: list[Piece] = []
    iteration = samples = 0
    while not pieces or pieces[-1].size < training.global_batch_size:
        level = min(samples * num_increments // ramp_samples, num_increments)
        size = start + increment * level
        pieces.append(Piece(iteration, samples, size))
        end = -(-(level + 1) * ramp_samples // num_increments) if level < num_increments else samples
        steps = -(-(end - samples) // size)
        iteration, samples = iteration + steps, samples + steps * size
    return BatchSizes(tuple(pieces))
