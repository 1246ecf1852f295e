"""Worker processes for files and pieces of them: results in the order of the jobs, workers that end with this process."""

import os
import select
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any

from megatron_cpt.errors import DataError
from megatron_cpt.log import Progress

_AHEAD = 3
"""Jobs per worker that are begun ahead of the result that is waited for."""

_shared: tuple[Any, ...] = ()


class FilePool:
    """Processes that call functions with shared values; a context manager.

    `shared` is sent to each worker once; `prepare(*shared)` makes of it there what cannot travel. Workers leave interrupts to
    this process and end when it ends, also when it is killed.

    Raises (in `result` and `in_order`): DataError when a worker dies.
    """

    def __init__(
        self,
        workers: int,
        label: str,
        shared: tuple[Any, ...] = (),
        prepare: Callable[..., tuple[Any, ...]] | None = None,
    ):
        self.workers, self.label = workers, label
        context = get_context("forkserver")
        self._pool = ProcessPoolExecutor(workers, context, initializer=_start, initargs=(os.getpid(), shared, prepare))

    def __enter__(self) -> "FilePool":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def submit[T](self, function: Callable[..., T], job: tuple[Any, ...]) -> "Future[T]":
        """Begin `function(*shared, *job)` in a worker."""
        return self._pool.submit(_call, function, job)

    def result[T](self, future: "Future[T]") -> T:
        """Return what a job gave."""
        try:
            return future.result()
        except BrokenProcessPool:
            raise DataError(
                f"{self.label}: a worker process was killed, usually because memory ran out. "
                "Run the same command again with fewer --workers; finished files are kept."
            ) from None

    def in_order[T](self, function: Callable[..., T], jobs: Iterable[tuple[Any, ...]]) -> Iterator[T]:
        """Yield `function(*shared, *job)` of each job, in order, with only a few jobs begun ahead."""
        waiting: deque[Future[T]] = deque()
        try:
            for job in jobs:
                waiting.append(self.submit(function, job))
                if len(waiting) > _AHEAD * self.workers:
                    yield self.result(waiting.popleft())
            while waiting:
                yield self.result(waiting.popleft())
        finally:
            for future in waiting:
                future.cancel()


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
    with FilePool(workers, label, shared) as pool:
        numbers = {pool.submit(function, job): number for number, job in enumerate(jobs)}
        for future in as_completed(numbers):
            found[numbers[future]] = pool.result(future)
            progress.add(sizes[numbers[future]] / 1e6)
    return [found[number] for number in range(len(jobs))]


def _start(main_process: int, shared: tuple[Any, ...], prepare: Callable[..., tuple[Any, ...]] | None) -> None:
    """Take what all jobs share; end this worker when the main process ends, since the pool's pipes do not tell it."""
    global _shared
    threading.Thread(target=_end_with, args=(main_process,), daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _shared = shared if prepare is None else prepare(*shared)


def _end_with(process: int) -> None:
    """Wait for a process to end, and end then: a worker's parent is the fork server, whose death would come later."""
    try:
        descriptor = os.pidfd_open(process)
    except ProcessLookupError:
        os._exit(1)
    select.select([descriptor], [], [])
    os._exit(1)


def _call[T](function: Callable[..., T], job: tuple[Any, ...]) -> T:
    return function(*_shared, *job)
