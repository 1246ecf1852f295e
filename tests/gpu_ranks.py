"""Run a function on ranks of this machine that see its GPUs, each in a process of its own: CUDA does not survive a fork.

The same functions run on CPU ranks through the fixture `ranks` (`tests/distributed.py`).
"""

import os
import pickle
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.distributed import REPOSITORY, RankFailure, _free_port, _reference, _resolve


def run_on_gpus(function: Callable[..., Any] | str, world_size: int, *args: Any, timeout: float = 300) -> list[Any]:
    """Call `function(*args)` on `world_size` ranks, one GPU each, and return the results in the order of ranks.

    Raises: RankFailure when a rank fails or the time is over.
    """
    port = _free_port()
    with tempfile.TemporaryDirectory(prefix="gpu-ranks-") as folder:
        request = Path(folder) / "request"
        request.write_bytes(pickle.dumps((_reference(function), pickle.dumps(args))))
        processes = [_start(Path(folder), rank, world_size, port) for rank in range(world_size)]
        try:
            for process in processes:
                process.wait(timeout)
        except subprocess.TimeoutExpired as problem:
            raise RankFailure(f"not done after {timeout:g} s\n{_logs(Path(folder), world_size)}") from problem
        finally:
            for process in processes:
                process.kill()
                process.wait()
        results, failures = [], []
        for rank in range(world_size):
            answer = Path(folder) / f"answer-{rank}"
            succeeded, value = pickle.loads(answer.read_bytes()) if answer.exists() else (False, "died")
            (results if succeeded else failures).append(value)
        if failures:
            raise RankFailure("\n".join(map(str, failures)) + _logs(Path(folder), world_size))
        return results


def _start(folder: Path, rank: int, world_size: int, port: int) -> subprocess.Popen[bytes]:
    environment = {
        **os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "PYTHONUNBUFFERED": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    }  # fmt: skip
    with (folder / f"log-{rank}").open("wb") as log:
        command = [sys.executable, "-m", "tests.gpu_ranks", str(folder)]
        return subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=log, stderr=subprocess.STDOUT)


def _logs(folder: Path, world_size: int) -> str:
    tails = ((folder / f"log-{rank}").read_text(errors="replace")[-3000:] for rank in range(world_size))
    return "".join(f"\nrank {rank}:\n{tail}" for rank, tail in enumerate(tails))


def _answer(folder: Path) -> None:
    reference, args = pickle.loads((folder / "request").read_bytes())
    try:
        answer = True, _resolve(*reference)(*pickle.loads(args))
    except BaseException:
        answer = False, traceback.format_exc()
    (folder / f"answer-{os.environ['RANK']}").write_bytes(pickle.dumps(answer))


if __name__ == "__main__":
    _answer(Path(sys.argv[1]))
