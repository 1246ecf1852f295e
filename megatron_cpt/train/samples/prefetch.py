"""Reading ahead: a thread reads the batches of the next steps, in their order, while the current step runs.

A step receives the same batch as without prefetching: batches are functions of the iteration, so this module has no
part of a run's state. A mistake while reading is raised by the step that was to have the batch.
"""

import queue
import threading
from collections.abc import Callable, Iterable
from typing import Any

import torch

from megatron_cpt.train.backend import cpu

AHEAD = 2
"""Maximum number of steps with ready batches; one more can be in preparation."""


class Prefetch:
    """Calls `read(iteration)` for each of `iterations` in a thread. A context: leaving it ends the thread."""

    def __init__(self, read: Callable[[int], Any], iterations: Iterable[int]):
        self._waiting: queue.Queue[tuple[int | None, Any, BaseException | None]] = queue.Queue(maxsize=AHEAD)
        self._is_closed = threading.Event()
        device = None if cpu.is_cpu() else torch.cuda.current_device()  # a thread begins on device 0
        self._thread = threading.Thread(target=self._run, args=(read, iterations, device), name="prefetch", daemon=True)
        self._thread.start()

    def get(self, iteration: int) -> Any:
        """Return what was read for the next iteration, which must be `iteration`.

        Raises: the exception of the read.
        """
        found, value, problem = self._waiting.get()
        if problem is not None:
            raise problem
        if found != iteration:
            raise AssertionError(f"iteration {iteration} was asked for, {found} comes next")
        return value

    def close(self) -> None:
        """End the thread and drop its batches."""
        self._is_closed.set()
        while self._thread.is_alive():
            while not self._waiting.empty():  # the thread may be waiting for room
                self._waiting.get_nowait()
            self._thread.join(timeout=0.05)

    def __enter__(self) -> "Prefetch":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self, read: Callable[[int], Any], iterations: Iterable[int], device: int | None) -> None:
        iteration: int | None = None
        try:
            if device is not None:
                torch.cuda.set_device(device)
            for iteration in iterations:
                if self._is_closed.is_set():
                    return
                self._waiting.put((iteration, read(iteration), None))
        except BaseException as problem:  # whatever it is, the step raises it
            self._waiting.put((iteration, None, problem))
