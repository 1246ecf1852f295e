"""Whether a batch ramp-up is one: levels that rise to the global batch size, each with steps of its own."""

from collections.abc import Iterator

from megatron_cpt.config.checks.problem import Problem
from megatron_cpt.config.settings.batch_sizes import batch_sizes, ramp_text
from megatron_cpt.config.settings.schema import TrainingConfig
from megatron_cpt.config.settings.values import BatchRamp, Duration
from megatron_cpt.errors import ConfigError

RAMP = "training.rampup_batch_size"
SIZE = "training.global_batch_size"


def ramp_problems(training: TrainingConfig) -> Iterator[Problem]:
    """Yield what makes `training.rampup_batch_size` no ramp-up; nothing else can be looked at with one that is none."""
    ramp, size = training.rampup_batch_size, training.global_batch_size
    if ramp is None:
        return
    if isinstance(ramp[0], tuple):
        yield from _step_problems(training, ramp)
        return
    start, increment, length = ramp
    assert isinstance(start, int) and isinstance(increment, int) and not isinstance(length, tuple)
    amount = length.amount if isinstance(length, Duration) else length
    if min(start, increment, amount) <= 0:
        yield Problem(
            (RAMP,),
            f"{RAMP} is {ramp_text(ramp)}. Three numbers above 0 are needed: start, increment, length. "
            "Write [16, 16, '1M samples'].",
        )
        return
    if start >= size:
        yield Problem(
            (RAMP, SIZE),
            f"{RAMP} starts at {start}, not below global_batch_size ({size}). Start lower, or remove it.",
        )
    elif (size - start) % increment:
        yield Problem(
            (RAMP, SIZE),
            f"{RAMP} grows by {increment} from {start}, which does not reach global_batch_size ({size}): "
            f"{size} - {start} = {size - start} is no multiple of {increment}. Use an increment that divides it.",
        )


def _step_problems(training: TrainingConfig, ramp: BatchRamp) -> Iterator[Problem]:
    size = training.global_batch_size
    sizes = [batch for batch, _ in ramp]  # type: ignore[misc]
    if min(sizes) < 1:
        yield Problem((RAMP,), f"{RAMP} is {ramp_text(ramp)}. A batch is above 0. Write [[16, 1B], [32, 3B]].")
        return
    for before, after in zip(sizes, [*sizes[1:], size], strict=True):
        if before >= after:
            yield Problem(
                (RAMP, SIZE),
                f"{RAMP} is {ramp_text(ramp)}, then global_batch_size ({size}): {before} is not below {after}. Let the "
                "batches rise.",
            )
            return
    try:
        stepped = {piece.size for piece in batch_sizes(training).pieces}
    except ConfigError:  # the stage's length is missing or counted later
        return
    for batch, until in ramp:  # type: ignore[misc]
        if batch not in stepped:
            yield Problem(
                (RAMP,),
                f"{RAMP} has the batch {batch} until {until}, which is over before it begins: no step has it. Let it end "
                "later than the one before, or remove it.",
            )
