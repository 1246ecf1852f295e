"""Ends a rank that makes no step for too long, so that a hang does not burn node hours until the walltime."""

import faulthandler
import os
import sys
import threading
import time

from megatron_cpt.launch.node.processes import HANG_EXIT_CODE


class Watchdog:
    """A thread that wants to hear `beat()` at least every `timeout_seconds`; 0 turns it off.

    When it does not, it writes the stack of every thread to stderr (each rank's own log), waits `grace_seconds` (None:
    half the time-out, a minute at most) and ends the process with `HANG_EXIT_CODE`; the launcher then ends the other
    ranks. They wait for the one that stalls in the same step, at most a step's time later, and the grace lets them write
    their stacks too. A context: leaving it ends the watch.
    """

    def __init__(self, timeout_seconds: float, grace_seconds: float | None = None):
        self._timeout_seconds = timeout_seconds
        self._grace_seconds = min(timeout_seconds / 2, 60) if grace_seconds is None else grace_seconds
        self._last = time.monotonic()
        self._stopped = threading.Event()
        if timeout_seconds:
            threading.Thread(target=self._watch, daemon=True, name="watchdog").start()

    def beat(self) -> None:
        """Say that there was progress."""
        self._last = time.monotonic()

    def stop(self) -> None:
        """End the watch."""
        self._stopped.set()

    def __enter__(self) -> "Watchdog":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _watch(self) -> None:
        while not self._stopped.wait(min(self._timeout_seconds / 4, 10)):
            silent = time.monotonic() - self._last
            if silent > self._timeout_seconds:
                sys.stderr.write(
                    f"\nwatchdog: rank {os.environ.get('RANK', '0')} has made no step for {silent:.0f} s "
                    f"(launch.hang_timeout is {self._timeout_seconds:g}); stacks of its threads:\n"
                )
                faulthandler.dump_traceback(sys.stderr, all_threads=True)
                sys.stderr.flush()
                time.sleep(self._grace_seconds)
                os._exit(HANG_EXIT_CODE)
