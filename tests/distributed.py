"""Start gloo ranks on this machine, run a function on each, and collect what they return or why they failed.

    def total(offset):                                  # at module level of the test's file
        torch.distributed.init_process_group("gloo")    # the pool has set RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT
        ...

    def test_the_sum_is_the_same_on_every_rank(ranks):
        assert ranks.run(total, 2, 10) == [21, 21]

Importing torch and megatron-core takes seconds, so each rank is a process that has imported what earlier calls used and
forks for every call: a call finds fresh modules, and what it leaves behind (gloo's threads, above all, which a process
keeps when it destroys its groups) ends with it. A rank that exceeds the time-out ends the pool's processes; the next call
starts fresh ones. Arguments and results travel by pickle; functions by file and name.
"""

import contextlib
import ctypes
import dataclasses
import faulthandler
import importlib
import importlib.util
import os
import pickle
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
GRACE_SECONDS = 3.0
_PR_SET_PDEATHSIG = 1
PRELOAD = ("torch", "transformers", "megatron.core.models.gpt", "megatron_cpt.train.stage.loop")
"""Modules that are slow to import; once a call has used one, ranks import it before they fork."""


class RankFailure(AssertionError):
    """At least one rank failed; the message shows the tracebacks, the first failure first."""


@dataclasses.dataclass
class Rank:
    """One process of the pool."""

    process: subprocess.Popen[bytes]
    connection: Connection
    log: Path

    def log_tail(self) -> str:
        """Return the end of what the process wrote."""
        return self.log.read_text(errors="replace")[-4000:]

    def kill(self) -> None:
        """End the process and all that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.connection.close()


class RankPool:
    """Processes that run functions as ranks of a process group. Close it at the end (it is a context manager)."""

    def __init__(self) -> None:
        self._ranks: list[Rank] = []
        self._logs = tempfile.TemporaryDirectory(prefix="ranks-")
        self._started = 0
        self._preload: set[str] = set()

    def __enter__(self) -> "RankPool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, function: Callable[..., Any] | str, world_size: int, *args: Any, timeout: float = 120) -> list[Any]:
        """Call `function(*args)` on `world_size` ranks and return the results in the order of ranks.

        `function` stands at the top level of a module; "package.module:function" names it too.

        Raises: RankFailure when a rank raises, dies, or is not done after `timeout` seconds.
        """
        while len(self._ranks) < world_size:
            self._ranks.append(self._start())
        ranks = self._ranks[:world_size]
        port = _free_port()
        for rank, member in enumerate(ranks):
            environment = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world_size),
                "LOCAL_WORLD_SIZE": str(world_size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
            request = (sorted(self._preload), _reference(function), environment, pickle.dumps(args))
            member.connection.send_bytes(pickle.dumps(request))
        return self._collect(ranks, timeout)

    def close(self) -> None:
        """End all processes."""
        for rank in self._ranks:
            rank.kill()
        self._ranks.clear()

    def _start(self) -> Rank:
        self._started += 1
        log = Path(self._logs.name) / f"{self._started}.log"
        ours, theirs = Pipe()
        environment = {"OMP_NUM_THREADS": "1", **os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1"}
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.distributed", str(theirs.fileno())],
                cwd=REPOSITORY,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        theirs.close()
        return Rank(process, ours, log)

    def _collect(self, ranks: list[Rank], timeout: float) -> list[Any]:
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        deadline = time.monotonic() + timeout
        pending = {rank.connection: number for number, rank in enumerate(ranks)}
        intact = True
        while pending and (ready := wait(list(pending), max(deadline - time.monotonic(), 0))):
            for connection in ready:
                number = pending.pop(connection)  # type: ignore[call-overload]
                try:
                    succeeded, value, loaded = pickle.loads(connection.recv_bytes())  # type: ignore[union-attr]
                    self._preload.update(loaded)
                except (EOFError, ConnectionResetError):
                    intact, succeeded = False, False
                    value = f"died with exit code {ranks[number].process.wait()}\n{ranks[number].log_tail()}"
                if succeeded:
                    results[number] = value
                else:
                    failures[number] = value
            if failures:  # the others may wait for it in a collective operation for ever
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        for number in pending.values():
            failures[number] = _stacks(ranks[number], f"not done after {timeout:g} s" if not failures else "waiting")
        if pending or not intact:
            self.close()
        if failures:
            raise RankFailure("\n".join(f"rank {number}: {text}" for number, text in failures.items()))
        return [results[number] for number in range(len(ranks))]


def run_ranks(target: Callable[..., Any] | str, world_size: int, *args: Any, timeout: float = 120) -> list[Any]:
    """Run `target` once on fresh processes; see `RankPool.run`."""
    with RankPool() as pool:
        return pool.run(target, world_size, *args, timeout=timeout)


def _stacks(rank: Rank, state: str) -> str:
    """Return what the rank is doing: the Python stack of each of its threads."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(rank.process.pid, signal.SIGUSR1)  # the process and the call it forked
    time.sleep(0.3)
    return f"{state}; its log and stacks:\n{rank.log_tail()}"


def _reference(function: Callable[..., Any] | str) -> tuple[str, str, str | None]:
    if isinstance(function, str):
        module, _, name = function.partition(":")
        return module, name, None
    if "<locals>" in function.__qualname__ or "<lambda>" in function.__qualname__:
        raise ValueError(f"{function.__qualname__}: ranks can only call functions at the top level of a module")
    return function.__module__, function.__qualname__, function.__code__.co_filename


def _free_port() -> int:
    """Return a port below the range from which the system takes the ports of outgoing connections."""
    while True:
        port = random.randrange(15000, 32000)
        with socket.socket() as listener:
            try:
                listener.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port


def _serve(connection: Connection) -> None:
    """Be a rank: fork for each call that the pool sends, until it closes the connection."""
    _die_with_parent()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    while True:
        try:
            preload, reference, environment, args = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        for name in preload:
            importlib.import_module(name)
        child = os.fork()
        if child == 0:
            _die_with_parent()
            os.environ.update(environment)
            _answer(connection, reference, args)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status:
            code = os.waitstatus_to_exitcode(status)
            connection.send_bytes(pickle.dumps((False, f"died with exit code {code}", [])))


def _answer(connection: Connection, reference: tuple[str, str, str | None], args: bytes) -> None:
    try:
        with _sums():
            result = True, _resolve(*reference)(*pickle.loads(args))
    except BaseException:
        result = False, traceback.format_exc()
    connection.send_bytes(pickle.dumps((*result, [name for name in PRELOAD if name in sys.modules])))
    sys.stdout.flush()
    sys.stderr.flush()


def _sums() -> contextlib.AbstractContextManager[Any]:
    """Return what a call runs in: nothing, or with `SHUFFLED_SUMS=1` another processor's order of sums."""
    if os.environ.get("SHUFFLED_SUMS") != "1":
        return contextlib.nullcontext()
    from tests.shuffled_sums import ShuffledSums  # imports torch

    return ShuffledSums()


def _die_with_parent() -> None:
    """Do not outlive the test run."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _resolve(module_name: str, qualified_name: str, path: str | None) -> Any:
    if path is None:
        module = importlib.import_module(module_name)
    elif module_name in sys.modules and getattr(sys.modules[module_name], "__file__", None) == path:
        module = sys.modules[module_name]
    else:
        spec = importlib.util.spec_from_file_location(module_name, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module
        spec.loader.exec_module(module)
    value: Any = module
    for name in qualified_name.split("."):
        value = getattr(value, name)
    return value


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])))
