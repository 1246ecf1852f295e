"""Program that a launcher starts per rank: it sets the rank, redirects output to the rank's log file, and executes the
training program.

    python -m megatron_cpt.launch.node.rank LOG_DIR PROGRAM [ARGUMENT ...]

The log file `rank_00000.log` exists from the first line on, whichever launcher started the rank. If torchrun did not
set RANK, WORLD_SIZE and LOCAL_RANK, they come from Open MPI, PMI or Slurm. The process is replaced by the program
(exec), and it dies with its parent, so that no rank survives its launcher.
"""

import ctypes
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

_SOURCES = {
    "RANK": ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PALS_RANKID", "SLURM_PROCID"),
    "WORLD_SIZE": ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_NTASKS"),
    "LOCAL_RANK": ("OMPI_COMM_WORLD_LOCAL_RANK", "PMI_LOCAL_RANK", "PALS_LOCAL_RANKID", "SLURM_LOCALID"),
    "LOCAL_WORLD_SIZE": ("OMPI_COMM_WORLD_LOCAL_SIZE", "PMI_LOCAL_SIZE", "PALS_LOCAL_SIZE"),
}
_PR_SET_PDEATHSIG = 1


def rank_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE as the launcher in `environment` states them."""
    found = {}
    for name, sources in _SOURCES.items():
        value = next((environment[key] for key in (name, *sources) if environment.get(key)), None)
        if value is not None:
            found[name] = value
    return found


def rank_log_path(log_dir: Path, rank: int) -> Path:
    """Return the log file of one rank."""
    return log_dir / f"rank_{rank:05d}.log"


def die_with_parent(signal_number: int = signal.SIGKILL) -> None:
    """Ask the kernel to signal this process when its parent ends (Linux; elsewhere nothing happens)."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(signal_number), 0, 0, 0)


def main(argv: list[str]) -> None:
    """Become the program in `argv[1:]` with output in the rank's log file in the folder `argv[0]`."""
    ranks = rank_environment(os.environ)
    os.environ.update(ranks)
    log_dir = Path(argv[0])
    log_dir.mkdir(parents=True, exist_ok=True)
    path = rank_log_path(log_dir, int(ranks.get("RANK", "0")))
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    die_with_parent()
    os.execvp(argv[1], argv[1:])


if __name__ == "__main__":
    main(sys.argv[1:])
