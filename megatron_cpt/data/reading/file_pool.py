"""Work on many files in worker processes, the results in the order of the files."""

import os
import select
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any

from megatron_cpt.errors import DataError
from megatron_cpt.log import Progress

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
    """Take what all jobs share; end this worker when the main process ends, since the pool's pipes do not tell it."""
    global _shared
    _shared = shared
    threading.Thread(target=_end_with, args=(main_process,), daemon=True).start()


def _end_with(process: int) -> None:
    try:
        descriptor = os.pidfd_open(process)
    except ProcessLookupError:
        os._exit(1)
    select.select([descriptor], [], [])
    os._exit(1)


def _call[T](function: Callable[..., T], job: tuple[Any, ...]) -> T:
    return function(*_shared, *job)
