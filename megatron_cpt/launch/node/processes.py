"""Processes of a job on this node: started, shown, watched; signals become requests; the first failing rank is named."""

import contextlib
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import megatron_cpt
from megatron_cpt.launch.node.rank import die_with_parent, rank_log_path

logger = logging.getLogger(__name__)

HANG_EXIT_CODE = 85
"""Exit code of a rank that its watchdog ended."""
SHUTDOWN_SECONDS = 10
"""Grace period of torchrun for the surviving ranks after one has failed: they wait for a rank that will never
answer."""
_FAILED_RANK = re.compile(r"rank\s+: (\d+) \(local_rank: \d+\)\s+exitcode\s+: (-?\d+)")
_LAUNCHER_SAYS = (  # (rank, exit code) in the words of srun, Open MPI and PALS, where they start the ranks themselves
    re.compile(r"srun: error: \S+: tasks? (\d+)\S*: Exited with exit code (\d+)"),
    re.compile(r"Process name: \[\[\d+,\d+\],\s*(\d+)\]\s+Exit code:\s+(\d+)"),
    re.compile(r"rank (\d+) exited with code (\d+)"),
)
_PORT_TAKEN = re.compile(r"EADDRINUSE|address already in use", re.I)


@dataclass
class Signals:
    """Signals received while processes run, newest last."""

    received: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Outcome:
    """How one start of the processes ended."""

    exit_code: int
    """That of the rank that failed first; 128 + N for signal N."""
    failed_rank: int | None = None
    port_taken: bool = False

    def text(self, log_dir: Path) -> str:
        """Return which rank failed first, how, and where to look."""
        if self.failed_rank is None:
            return f"the launcher ended with exit code {self.exit_code}, see {log_dir / 'launcher.log'}"
        how = f"with exit code {self.exit_code}"
        if self.exit_code > 128:
            with contextlib.suppress(ValueError):
                how = f"by {signal.Signals(self.exit_code - 128).name}"
        return f"rank {self.failed_rank} ended first, {how}, see {rank_log_path(log_dir, self.failed_rank)}"


@contextlib.contextmanager
def caught_signals() -> Iterator[Signals]:
    """Collect SIGINT, SIGTERM, SIGHUP and SIGUSR1 instead of dying of them."""
    signals = Signals()
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    before = {number: signal.signal(number, lambda got, _frame: signals.received.append(got)) for number in numbers}
    try:
        yield signals
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def wait_passing_signals(process: subprocess.Popen[bytes], signals: Signals) -> int:
    """Wait for a process, ending it by SIGTERM once a signal is there; return its exit code, 128 + N for signal N."""
    while True:
        try:
            code = process.wait(timeout=0.5)
            return code if code >= 0 else 128 - code
        except subprocess.TimeoutExpired:
            if signals.received:
                process.terminate()


def process_environment(environment: Mapping[str, str], ranks_on_node: int) -> dict[str, str]:
    """Return variables that every rank needs and nobody else sets: threads shared out fairly, the package, the clock."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    checkout = str(Path(megatron_cpt.__file__).parents[1])  # ranks find the package wherever the job was started
    paths = [checkout, *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
    return {
        "OMP_NUM_THREADS": str(max(cores // ranks_on_node, 1)),
        "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)),
        "MEGATRON_CPT_JOB_START": f"{time.time():.0f}",
    }


def run_watched(
    command: Sequence[str],
    log_dir: Path,
    environment: Mapping[str, str],
    signals: Signals,
    ask_to_end: Callable[[int, int], bool],
    grace_seconds: float | None = None,
) -> Outcome:
    """Run a launcher's command, its output in `launcher.log`, rank 0's shown here; return how it ended.

    The first signal asks the ranks to save and end (`ask_to_end(pid, signal)` returns whether there was anybody to ask);
    a second one, or `grace_seconds` without an end, ends them at once.
    """
    log_path = log_dir / "launcher.log"
    with log_path.open("a", encoding="utf-8") as log:
        start = log.tell()
        log.write(f"$ {' '.join(command)}\n")
        log.flush()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            env=dict(environment),
            preexec_fn=lambda: die_with_parent(signal.SIGTERM),
        )
    with _shown(rank_log_path(log_dir, 0)):
        exit_code = _wait(process, signals, ask_to_end, grace_seconds)
    with log_path.open(encoding="utf-8", errors="replace") as log:
        log.seek(start)
        return _outcome(exit_code, log.read())


def _wait(
    process: subprocess.Popen[bytes],
    signals: Signals,
    ask_to_end: Callable[[int, int], bool],
    grace_seconds: float | None,
) -> int:
    passed_on, deadline = 0, None
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(timeout=0.2)
        if deadline is not None and time.monotonic() > deadline:
            process.terminate()
            deadline = None
        while passed_on < len(signals.received):
            number = signals.received[passed_on]
            passed_on += 1
            if passed_on == 1 and ask_to_end(process.pid, number):
                name = signal.Signals(number).name
                logger.warning("%s: the ranks were asked to save and end; once more ends them at once.", name)
                deadline = None if grace_seconds is None else time.monotonic() + grace_seconds
            else:
                process.terminate()


def _outcome(exit_code: int, log: str) -> Outcome:
    """Read from the launcher's own summary which rank failed first and how; its exit code has less information."""
    if exit_code == 0:
        return Outcome(0)
    failed = _FAILED_RANK.search(log, max(log.find("Root Cause"), 0))
    matches = list(_FAILED_RANK.finditer(log))
    # a rank that was killed says nothing, and its peers' "connection closed" may be seen first
    killed = (match for match in matches if int(match[2]) < 0 and int(match[2]) != -signal.SIGTERM)
    # but where a watchdog ended one, the rank that stalled may be killed because it does not hear the request to end
    hung = (match for match in matches if int(match[2]) == HANG_EXIT_CODE)
    failed = next(hung, None) or next(killed, failed)
    if failed is None and "torch.distributed.run" not in log and "megatron_cpt.launch.node.torchrun" not in log:
        failed = next(filter(None, (pattern.search(log) for pattern in _LAUNCHER_SAYS)), None)
    if failed:
        code = int(failed[2])
        return Outcome(code if code > 0 else 128 - code, failed_rank=int(failed[1]))
    return Outcome(exit_code if exit_code > 0 else 128 - exit_code, port_taken=bool(_PORT_TAKEN.search(log)))


def show_failure(outcome: Outcome, log_dir: Path) -> None:
    """Log which rank failed; show the end of its log where the terminal has not shown it already."""
    logger.error("%s.", outcome.text(log_dir))
    if outcome.failed_rank:
        with contextlib.suppress(FileNotFoundError):
            lines = rank_log_path(log_dir, outcome.failed_rank).read_text(errors="replace").splitlines()
            sys.stderr.write("".join(f"[rank {outcome.failed_rank}] {line}\n" for line in lines[-5:]))


@contextlib.contextmanager
def _shown(path: Path) -> Iterator[None]:
    """Copy what is appended to `path` to stderr while the block runs."""
    start = path.stat().st_size if path.exists() else 0
    ended = threading.Event()

    def follow() -> None:
        position, last = start, False
        while not last:
            last = ended.wait(0.1)
            with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
                file.seek(position)
                text = file.read()
                position += len(text)
                sys.stderr.write(text.decode("utf-8", errors="replace"))
                sys.stderr.flush()

    follower = threading.Thread(target=follow, daemon=True)
    follower.start()
    try:
        yield
    finally:
        ended.set()
        follower.join()
