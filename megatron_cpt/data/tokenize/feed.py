"""The tasks of one shard, in the order of its documents; a thread reads ahead where sources are streams."""

import contextlib
import os
import queue
import threading
from collections.abc import Iterator, Sequence

from megatron_cpt.data.reading.streams import Layout, Piece, pieces_of
from megatron_cpt.data.tokenize.shard_plan import ShardPlan

_MAX_PIECES_OF_TASK = 64
_READ_AHEAD_TASKS = 2


class TaskFeed:
    """The tasks of one shard, in order; a thread reads ahead where sources are streams."""

    def __init__(self, plan: ShardPlan, layout: Layout, piece_bytes: int, wake: int):
        self._tasks = _tasks(plan, layout, piece_bytes)
        self._wake = wake
        self._queue: queue.Queue[list[Piece] | BaseException | None] = queue.Queue(_READ_AHEAD_TASKS)
        self._closing = threading.Event()
        self._thread = None
        self.is_exhausted = False
        if not all(source.is_splittable for source in plan.sources):
            self._thread = threading.Thread(target=self._read_ahead, daemon=True)
            self._thread.start()

    def take(self) -> list[Piece] | None:
        """Return the next task if one is ready."""
        if self.is_exhausted:
            return None
        if self._thread is None:
            found: list[Piece] | BaseException | None = next(self._tasks, None)
        else:
            try:
                found = self._queue.get_nowait()
            except queue.Empty:
                return None
        if isinstance(found, BaseException):
            raise found
        self.is_exhausted = found is None
        return found

    def close(self) -> None:
        """Stop reading ahead and let go of blocks nobody will take."""
        self._closing.set()
        if self._thread:
            self._thread.join()
        with contextlib.suppress(queue.Empty):
            while True:
                found = self._queue.get_nowait()
                if isinstance(found, list):
                    close_pieces(found)

    def _read_ahead(self) -> None:
        try:
            for task in self._tasks:
                self._put(task)
                if self._closing.is_set():
                    return
            self._put(None)
        except BaseException as problem:
            self._put(problem)

    def _put(self, item: list[Piece] | BaseException | None) -> None:
        while not self._closing.is_set():
            try:
                self._queue.put(item, timeout=0.2)
            except queue.Full:
                continue
            with contextlib.suppress(BlockingIOError):
                os.write(self._wake, b".")
            return
        if isinstance(item, list):
            close_pieces(item)


def _tasks(plan: ShardPlan, layout: Layout, piece_bytes: int) -> Iterator[list[Piece]]:
    """Yield lists of pieces of about `piece_bytes` together."""
    task: list[Piece] = []
    size = 0
    for number, source in enumerate(plan.sources):
        for piece in pieces_of(source, number, layout, piece_bytes):
            task.append(piece)
            size += piece.end - piece.start
            if size >= piece_bytes or len(task) >= _MAX_PIECES_OF_TASK:
                yield task
                task, size = [], 0
    if task:
        yield task


def close_pieces(pieces: Sequence[Piece]) -> None:
    """Let go of the memory files of pieces that are done."""
    for piece in pieces:
        if piece.descriptor is not None:
            os.close(piece.descriptor)
