"""Encoders of `data prepare-chat`, here or in workers: pieces go out, results come back in order, a few at a time in memory."""

import os
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

from megatron_cpt.data.chat.encode import ChatEncoder, ChatJob
from megatron_cpt.data.reading.file_pool import FilePool
from megatron_cpt.data.reading.streams import Piece
from megatron_cpt.data.tokenizer.threads import ONE_THREAD


class ChatPool:
    """Encoders, in this process or in `workers` others; a context."""

    def __init__(self, job: ChatJob, workers: int):
        self._here = ChatEncoder(job)
        self._pool = FilePool(workers, "prepare-chat", (job,), _encoder) if workers > 1 else None

    def __enter__(self) -> ChatEncoder:
        return self._here

    def __exit__(self, *_: object) -> None:
        if self._pool:
            self._pool.__exit__()

    def results(self, method: str, tasks: Iterable[tuple[Any, ...]]) -> Iterator[tuple[Piece, Any]]:
        """Yield (piece, what `ChatEncoder.<method>` returns) of each task (piece, further arguments), in order."""
        if self._pool is None:
            for task in tasks:
                try:
                    yield task[0], getattr(self._here, method)(*task)
                finally:
                    _close(task[0])
            return
        waiting: deque[Piece] = deque()

        def jobs() -> Iterator[tuple[Any, ...]]:
            for task in tasks:
                waiting.append(task[0])
                yield (method, *task)

        try:
            for result in self._pool.in_order(_work, jobs()):
                yield waiting[0], result
                _close(waiting.popleft())
        finally:
            for piece in waiting:
                _close(piece)


def _encoder(job: ChatJob) -> tuple[ChatEncoder]:
    os.environ.update(ONE_THREAD)
    return (ChatEncoder(job),)


def _work(encoder: ChatEncoder, method: str, *task: Any) -> Any:
    return getattr(encoder, method)(*task)


def _close(piece: Piece) -> None:
    if piece.descriptor is not None:
        os.close(piece.descriptor)
