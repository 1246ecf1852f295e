"""Work on many files in worker processes, the results in the order of the files."""

import ctypes
import os
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any

from megatron_cpt.errors import DataError
from megatron_cpt.log import Progress

_PR_SET_PDEATHSIG = 1
_shared: tuple[Any, ...] = ()


def map_files[T](
    function: Callable[..., T],
    jobs: Sequence[tuple[Any, ...]],
    sizes: Sequence[int],
    workers: int,
    label: str,
    shared: tuple[Any, ...] = (),
) -> list[T]:
    """Return `function(*shared, *job)` of each job, in order; `sizes` in bytes are for the progress.

    The first error ends the work. Workers die with this process, also when it is killed.

    Raises: DataError when a worker dies.
    """
    progress = Progress(label, sum(sizes) / 1e6, "MB")
    workers = max(1, min(workers, len(jobs)))
    if workers == 1:
        results = []
        for job, size in zip(jobs, sizes, strict=True):
            results.append(function(*shared, *job))
            progress.add(size / 1e6)
        return results
    found: dict[int, T] = {}
    context = get_context("forkserver")
    with ProcessPoolExecutor(workers, context, initializer=_start, initargs=(os.getpid(), shared)) as pool:
        numbers = {pool.submit(_call, function, job): number for number, job in enumerate(jobs)}
        try:
            for future in as_completed(numbers):
                found[numbers[future]] = future.result()
                progress.add(sizes[numbers[future]] / 1e6)
        except BrokenProcessPool:
            raise DataError(
                f"{label}: a worker process was killed, usually because memory ran out. "
                "Run the same command again with fewer --workers; finished files are kept."
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)
    return [found[number] for number in range(len(jobs))]


def _start(main_process: int, shared: tuple[Any, ...]) -> None:
    """Die with the fork server, which dies with the main process; take what all jobs share."""
    global _shared
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if not os.path.exists(f"/proc/{main_process}"):
        os._exit(1)
    _shared = shared


def _call[T](function: Callable[..., T], job: tuple[Any, ...]) -> T:
    return function(*_shared, *job)
