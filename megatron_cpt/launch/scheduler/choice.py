"""The batch scheduler of a name; the one place that knows which schedulers there are."""

from megatron_cpt.launch.scheduler.pbs import Pbs
from megatron_cpt.launch.scheduler.queue import Scheduler
from megatron_cpt.launch.scheduler.slurm import Slurm


def scheduler_of(name: str) -> Scheduler:
    """Return the batch scheduler `pbs` or `slurm`."""
    return {"pbs": Pbs, "slurm": Slurm}[name]()
