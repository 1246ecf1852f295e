"""How many samples each step of a stage takes, and so which iteration follows how many samples; one place for all.

Without a ramp-up every step takes `global_batch_size` samples. `training.rampup_batch_size` lists levels, each a batch
size and its end, in iterations, samples, tokens or a fraction of the stage, counted from the stage's start:

- `[start, increment, length]` (Megatron-LM's `--rampup-batch-size`): the batch grows from `start` by `increment` in n equal
  shares of `length`, n = (global_batch_size - start) / increment. With c samples consumed of a length of s samples a step takes
  start + increment x floor(c x n / s), at most global_batch_size; a length in iterations is shared likewise.
- `[[batch, until], ...]` (`--step-batch-size-schedule`): each batch until its place, then global_batch_size.

A step uses the batch size at its first sample, so it can extend past a level's end; a level that a step jumps over has
no step. A fraction is of the stated length; of a length in iterations it is of the samples that these iterations take,
which depend on the ramp: the smallest stage for which both hold.

Everything else (data order, learning rate, counts per corpus) is a function of the samples consumed.

Source: `megatron/core/num_microbatches_calculator.py`: `RampupBatchsizeNumMicroBatchesCalculator` (0.16; 0.19 ignores the flag)
and `StepBatchsizeNumMicroBatchesCalculator` (0.19), which rounds tokens to samples downwards, we upwards. Whole numbers and
fractions here, where floating point could put a step on the other side of a boundary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from math import ceil

from megatron_cpt.config.settings.schema import TrainingConfig
from megatron_cpt.config.settings.values import BatchRamp, Duration
from megatron_cpt.errors import ConfigError


@dataclass(frozen=True)
class Level:
    """A batch of a ramp-up and where it ends: so many iterations, samples, or part (fraction) of the stage."""

    size: int
    until: Fraction
    unit: str


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
    """Return the sizes of a stage's steps.

    Raises: ConfigError when a fraction needs a length and the stage's is not known.
    """
    levels = ramp_levels(training)
    if not any(level.unit == "fraction" for level in levels):
        return _sizes(levels, training.global_batch_size, 0)
    if training.train_samples is not None:
        return _sizes(levels, training.global_batch_size, training.train_samples)
    if training.train_tokens is not None:
        return _sizes(levels, training.global_batch_size, -(-training.train_tokens // training.seq_length))
    if training.train_iters is not None:
        return _sizes_of_iterations(levels, training.global_batch_size, training.train_iters)
    raise ConfigError(
        f"training.rampup_batch_size is {ramp_text(training.rampup_batch_size)} and the stage's length is not known. A "
        "fraction needs it. State iterations, samples or tokens."
    )


def ramp_levels(training: TrainingConfig) -> list[Level]:
    """Return the levels of a ramp-up in order; none without one."""
    ramp = training.rampup_batch_size
    if ramp is None:
        return []
    if isinstance(ramp[0], tuple):
        return [Level(size, *_end(until, training)) for size, until in ramp]  # type: ignore[misc]
    start, increment, length = ramp
    assert isinstance(start, int) and isinstance(increment, int) and not isinstance(length, tuple)
    whole, unit = _end(length, training)
    count = (training.global_batch_size - start) // increment
    return [Level(start + increment * n, whole * (n + 1) / count, unit) for n in range(count)]


def ramp_text(ramp: BatchRamp | None) -> str:
    """Return a human-readable description of a ramp-up."""
    if ramp is None:
        return "none"
    if isinstance(ramp[0], tuple):
        return ", ".join(f"{size} until {until}" for size, until in ramp)  # type: ignore[misc]
    start, increment, length = ramp
    return f"from {start} by {increment} in the first {f'{length} samples' if isinstance(length, int) else length}"


def shared_sizes(ramp: BatchRamp | None) -> list[tuple[str, int]]:
    """Return what the ranks must be able to share of a ramp-up, each with its words."""
    if ramp is None:
        return []
    if isinstance(ramp[0], tuple):
        return [("has the batch", size) for size, _ in ramp]  # type: ignore[misc]
    return [("starts at", ramp[0]), ("grows by", ramp[1])]  # type: ignore[list-item]


def _end(length: int | Duration, training: TrainingConfig) -> tuple[Fraction, str]:
    if isinstance(length, int):
        return Fraction(length), "samples"
    # From the text: 0.1 is one tenth here, not the nearest double.
    amount = Fraction(str(length.amount))
    if length.unit == "tokens":
        return Fraction(ceil(amount / training.seq_length)), "samples"
    return amount, length.unit


def _sizes(levels: Sequence[Level], whole: int, stage_samples: int) -> BatchSizes:
    """Return the steps' sizes, `stage_samples` being what fractions are of."""
    pieces: list[Piece] = []
    iteration = samples = 0
    for level in levels:
        if level.unit == "iterations":
            steps = ceil(level.until) - iteration
        else:
            end = ceil(level.until * stage_samples) if level.unit == "fraction" else ceil(level.until)
            # Rounded up: a step has the size of its first sample, so the last step can pass the level's end.
            steps = -(-(end - samples) // level.size)
        if steps > 0:
            pieces.append(Piece(iteration, samples, level.size))
            iteration, samples = iteration + steps, samples + steps * level.size
    return BatchSizes((*pieces, Piece(iteration, samples, whole)))


def _sizes_of_iterations(levels: Sequence[Level], whole: int, iterations: int) -> BatchSizes:
    """Return the sizes for the smallest stage that so many iterations fill: a longer stage has a longer ramp, and so fewer
    samples in its iterations.
    """
    # `high` assumes the largest size at every step, so no stage of so many iterations has more samples.
    low, high = 0, iterations * max(whole, *(level.size for level in levels))
    while low < high:
        middle = (low + high) // 2
        if _sizes(levels, whole, middle).samples(iterations) <= middle:
            high = middle
        else:
            low = middle + 1
    return _sizes(levels, whole, low)
