"""Whether a batch ramp-up is one: three numbers whose steps reach the global batch size."""

from collections.abc import Iterator

from megatron_cpt.config.problem import Problem
from megatron_cpt.config.schema import RunConfig

RAMP = "training.rampup_batch_size"


def ramp_problems(config: RunConfig) -> Iterator[Problem]:
    """Yield what makes `training.rampup_batch_size` no ramp-up; nothing else can be looked at with one that is none."""
    ramp, size = config.training.rampup_batch_size, config.training.global_batch_size
    if ramp is None:
        return
    shown = list(ramp)
    if len(ramp) != 3 or min(ramp) < 1:
        yield Problem(
            (RAMP,),
            f"{RAMP} is {shown}. Three numbers above 0 are needed: start, increment, samples. Write [16, 16, 1M].",
        )
        return
    start, increment, _ = ramp
    if start >= size:
        yield Problem(
            (RAMP, "training.global_batch_size"),
            f"{RAMP} starts at {start}, not below global_batch_size ({size}). Start lower, or remove it.",
        )
    elif (size - start) % increment:
        yield Problem(
            (RAMP, "training.global_batch_size"),
            f"{RAMP} grows by {increment} from {start}, which does not reach global_batch_size ({size}): "
            f"{size} - {start} = {size - start} is no multiple of {increment}. Use an increment that divides it.",
        )
