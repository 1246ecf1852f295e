"""How a run is asked to save or to end: signals, the walltime, and files that a person touches."""

import os
import signal
import time
from pathlib import Path

from megatron_cpt.config.schema import LaunchConfig


class Interrupts:
    """Collects requests; `poll` is asked once per iteration on rank 0.

    SIGTERM (PBS, Slurm) and SIGUSR1 (Slurm's `--signal`) end the run after a save, as does the walltime less
    `exit_before_walltime` seconds, counted from `MEGATRON_CPT_JOB_START` (a Unix time the launcher sets) or from here.
    `touch RUN/save_now` saves; `touch RUN/stop_now` saves and ends.
    """

    def __init__(self, launch: LaunchConfig, run_path: Path):
        self._run_path = run_path
        self._signalled = False
        started = float(os.environ.get("MEGATRON_CPT_JOB_START", time.time()))
        self._end = started + launch.walltime - launch.exit_before_walltime
        self._deadline = self._end if launch.exit_before_walltime else None
        self._is_job = "MEGATRON_CPT_JOB_START" in os.environ or self._deadline is not None
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._note)

    def seconds_left(self) -> float | None:
        """Return the seconds until the walltime ends the run; None outside of a job."""
        return round(max(self._end - time.time(), 0.0), 1) if self._is_job else None

    def _note(self, number: int, frame: object) -> None:
        self._signalled = True

    def poll(self) -> str | None:
        """Return `signal`, `walltime`, `stop_now`, `save_now` or None."""
        if self._signalled:
            return "signal"
        if self._deadline is not None and time.time() >= self._deadline:
            return "walltime"
        for name in ("stop_now", "save_now"):
            path = self._run_path / name
            if path.exists():
                path.unlink()
                return name
        return None
