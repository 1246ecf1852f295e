"""How a run is asked to save or to end: signals, the walltime, and files that a person touches."""

import os
import signal
import time
from pathlib import Path

import torch

from megatron_cpt.config.settings.schema import LaunchConfig

URGENCY = (None, "save_now", "stop_now", "walltime", "signal")
"""Possible requests; the last of several requests applies."""


class Interrupts:
    """Collects requests; all ranks ask `agreed` once per iteration.

    SIGTERM (PBS, Slurm) and SIGUSR1 (Slurm's `--signal`) end the run after a save, as does the walltime less
    `exit_before_walltime` seconds, counted from `MEGATRON_CPT_JOB_START` (a Unix time the launcher sets) or from here.
    A signal can reach any rank; rank 0 checks the walltime and files. `touch RUN/save_now` saves; `touch RUN/stop_now`
    saves and ends.
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

    def agreed(self) -> str | None:
        """Return the most urgent request of any rank: `signal`, `walltime`, `stop_now`, `save_now` or None. Collective."""
        own = self.poll() if torch.distributed.get_rank() == 0 else "signal" if self._signalled else None
        urgency = torch.tensor(URGENCY.index(own), device=torch.cuda.current_device())
        torch.distributed.all_reduce(urgency, torch.distributed.ReduceOp.MAX)
        return URGENCY[int(urgency)]

    def poll(self) -> str | None:
        """Return this process's own request."""
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
