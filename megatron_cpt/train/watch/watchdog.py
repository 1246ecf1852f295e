"""Ends a rank that makes no progress for too long, or whose neighbour is gone, so that a hang does not burn node hours.

Two things are watched from the moment a rank starts. A stage of the program (joining, preparation, a step, an
evaluation, a save) has a separate limit in multiples of `launch.hang_timeout`: a rank that exceeds it ends. Each rank
also sends a heartbeat every few seconds through the rendezvous store. A rank that was stopped, or whose node is gone,
sends none, and the previous rank reports it in any stage.
"""

import contextlib
import faulthandler
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from megatron_cpt.launch.node.processes import HANG_EXIT_CODE

TIMES = {"step": 1, "joining": 2, "evaluation": 6, "saving": 6, "loading": 6, "preparation": 12}
"""Limits of stages in hang time-outs: indexes of a large blend, or a model that is converted first, take hours."""
TELL_SECONDS = 10.0
SILENT_SECONDS = 180.0
"""Silence after which a rank is considered stopped: longer than any of our calls holds the interpreter."""


class Watchdog:
    """A thread that wants to hear `beat()` at least every `timeout_seconds`; 0 turns it off.

    When it does not, it writes the stack of every thread to stderr (each rank's own log), waits `grace_seconds` (None:
    half the time-out, a minute at most) and ends the process with `HANG_EXIT_CODE`; the launcher then ends the other
    ranks. They wait for the one that stalls in the same step, at most a step's time later, and the grace lets them write
    their stacks too. A context: leaving it ends the watch.
    """

    def __init__(self, timeout_seconds: float, grace_seconds: float | None = None, stage: str = "step"):
        self._timeout_seconds = timeout_seconds
        self._grace_seconds = min(timeout_seconds / 2, 60) if grace_seconds is None else grace_seconds
        self._stage, self._last = stage, time.monotonic()
        self._stopped = threading.Event()
        self._heard: float | None = None
        self._silent_seconds, self._neighbour = SILENT_SECONDS, "the store where the ranks met"
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")
        if timeout_seconds:
            self._thread.start()

    def beat(self) -> None:
        """Say that there was progress."""
        self._last = time.monotonic()

    def enter(self, stage: str) -> None:
        """Say that a stage begins; the one before it is over."""
        self._stage, self._last = stage, time.monotonic()

    @contextlib.contextmanager
    def during(self, stage: str) -> Iterator[None]:
        """Give the block the time of `stage`, then what is left of the program the time of the stage before it."""
        before = self._stage
        self.enter(stage)
        try:
            yield
        finally:
            self.enter(before)

    def listen(self, silent_seconds: float = SILENT_SECONDS, tell_seconds: float = TELL_SECONDS) -> None:
        """Tell the other ranks from now on that this one lives, and watch that the next one does. After they have met."""
        import torch  # the watch of a process that trains nothing needs none

        ranks = torch.distributed.get_world_size()
        if not self._timeout_seconds or ranks == 1:
            return
        store = (
            torch.distributed.distributed_c10d._get_default_store().clone()
        )  # its own connection: others wait in theirs
        self._silent_seconds, self._heard = silent_seconds, time.monotonic()
        rank = torch.distributed.get_rank()
        threading.Thread(
            target=self._listen, args=(store, rank, (rank + 1) % ranks, tell_seconds), daemon=True, name="heartbeat"
        ).start()

    def stop(self) -> None:
        """End the watch and its thread, which wakes at once."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5)

    def __enter__(self) -> "Watchdog":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _listen(self, store: Any, rank: int, neighbour: int, tell_seconds: float) -> None:
        own, others, seen = f"alive/{rank}", f"alive/{neighbour}", b""
        number = 0
        try:
            while not self._stopped.wait(tell_seconds if number else 0):
                number += 1
                store.set(own, f"{number} {socket.gethostname()}")
                if store.check([others]) and (told := store.get(others)) != seen:
                    seen, self._heard = told, time.monotonic()
                self._neighbour = f"rank {neighbour}" + (f" on {seen.decode().partition(' ')[2]}" if seen else "")
        except (
            RuntimeError
        ):  # the store is gone with the rank, or the launcher, that kept it; the watch counts the silence
            return

    def _watch(self) -> None:
        while not self._stopped.wait(min(self._timeout_seconds / 4, self._silent_seconds / 4, 10)):
            now, rank = time.monotonic(), os.environ.get("RANK", "0")
            limit, silent = self._timeout_seconds * TIMES[self._stage], now - self._last
            if silent > limit:
                what = "has made no step" if self._stage == "step" else f"is in its {self._stage}"
                self._end(f"rank {rank} {what} for {silent:.0f} s ({_limit_text(self._timeout_seconds, self._stage)})")
            elif self._heard is not None and now - self._heard > self._silent_seconds:
                self._end(
                    f"rank {rank} has heard nothing of {self._neighbour} for {now - self._heard:.0f} s: it was stopped, or its node or "
                    "the network between is gone"
                )

    def _end(self, said: str) -> None:
        sys.stderr.write(f"\nwatchdog: {said}; stacks of its threads:\n")
        faulthandler.dump_traceback(sys.stderr, all_threads=True)
        sys.stderr.flush()
        time.sleep(self._grace_seconds)
        os._exit(HANG_EXIT_CODE)


def longest_stage_seconds(timeout_seconds: float) -> float:
    """Return the longest limit of any stage."""
    return timeout_seconds * max(TIMES.values())


def _limit_text(timeout_seconds: float, stage: str) -> str:
    return f"launch.hang_timeout is {timeout_seconds:g}" + (f", times {TIMES[stage]}" if TIMES[stage] > 1 else "")
