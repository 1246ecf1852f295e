"""One training at a time per run, also where ranks were started without our launcher (`torchrun -m megatron_cpt train`)."""

import contextlib
import os
from collections.abc import Iterator

from megatron_cpt.run.directory import RunDir
from megatron_cpt.run.lock import is_held_for_us, run_lock
from megatron_cpt.train.backend.parallel import on_rank_0


@contextlib.contextmanager
def held_run(run: RunDir) -> Iterator[None]:
    """Hold the run's lock on rank 0 while the block runs, unless the job that started the ranks holds it.

    Raises: LaunchError on every rank when another job holds it.
    """
    path = run.jobs / "lock.json"
    with contextlib.ExitStack() as stack:

        def take() -> None:
            if not is_held_for_us(path):
                stack.enter_context(run_lock(path, f"training without launcher, process {os.getpid()}"))

        on_rank_0(take)
        yield
