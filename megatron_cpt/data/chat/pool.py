"""Worker processes of `data prepare-chat`: pieces go out, results come back in order, only a few at a time in memory."""

import ctypes
import os
import signal
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any

from megatron_cpt.data.chat.encode import ChatEncoder, ChatJob
from megatron_cpt.data.reading.streams import Piece
from megatron_cpt.errors import DataError

_AHEAD = 3
"""Pieces per worker that are read ahead of the result that is waited for."""
_PR_SET_PDEATHSIG = 1


class ChatPool:
    """Encoders, in this process or in `workers` others; a context."""

    def __init__(self, job: ChatJob, workers: int):
        self.workers = workers
        self._here = ChatEncoder(job)
        self._pool: ProcessPoolExecutor | None = None
        if workers > 1:
            self._pool = ProcessPoolExecutor(
                workers, mp_context=get_context("forkserver"), initializer=_start, initargs=(job, os.getpid())
            )

    def __enter__(self) -> ChatEncoder:
        return self._here

    def __exit__(self, *_: object) -> None:
        if self._pool:
            self._pool.shutdown(cancel_futures=True)

    def results(self, method: str, tasks: Iterable[tuple[Any, ...]]) -> Iterator[tuple[Piece, Any]]:
        """Yield (piece, what `ChatEncoder.<method>` returns) of each task (piece, further arguments), in order."""
        waiting: deque[tuple[Piece, Future[Any] | None, tuple[Any, ...]]] = deque()
        try:
            for task in tasks:
                future = self._pool.submit(_work, method, task) if self._pool else None
                waiting.append((task[0], future, task))
                if self._pool is None or len(waiting) > _AHEAD * self.workers:
                    yield self._next(method, waiting)
            while waiting:
                yield self._next(method, waiting)
        except BrokenProcessPool:
            raise DataError(
                "prepare-chat: a worker died, usually because memory ran out. Run the same command with fewer --workers."
            ) from None
        finally:
            for piece, future, _ in waiting:
                if future:
                    future.cancel()
                _close(piece)

    def _next(
        self, method: str, waiting: deque[tuple[Piece, "Future[Any] | None", tuple[Any, ...]]]
    ) -> tuple[Piece, Any]:
        piece, future, task = waiting[0]
        result = future.result() if future else getattr(self._here, method)(*task)
        waiting.popleft()
        _close(piece)
        return piece, result


_encoder: ChatEncoder | None = None


def _start(job: ChatJob, parent: int) -> None:
    """Load a worker's encoder, once; a worker dies with its parent and leaves interrupts to it."""
    global _encoder
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.update(TOKENIZERS_PARALLELISM="false", RAYON_NUM_THREADS="1")
    _encoder = ChatEncoder(job)


def _work(method: str, task: tuple[Any, ...]) -> Any:
    assert _encoder is not None
    return getattr(_encoder, method)(*task)


def _close(piece: Piece) -> None:
    if piece.descriptor is not None:
        os.close(piece.descriptor)
