"""The local scheduler: torchrun on this machine, watched until it ends.

`run_local` owns the job from the lock to the ledger: a free port, threads per rank, a log file per rank with rank 0's
shown in the terminal, signals passed to the ranks, restarts after a crash, and the exit code of the rank that
failed first.
"""

import contextlib
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import megatron_cpt
from megatron_cpt.errors import LaunchError
from megatron_cpt.launch.ledger import append_record
from megatron_cpt.launch.lock import run_lock
from megatron_cpt.launch.rank import die_with_parent, rank_log_path
from megatron_cpt.launch.run_dir import RunDir

logger = logging.getLogger(__name__)

PORT_ATTEMPTS = 4
"""Ports tried before a job is given up; another process can take a free port before torchrun binds it."""
SHUTDOWN_SECONDS = 10
"""Time torchrun gives the surviving ranks once one has failed: they wait for a rank that will never answer."""
_FAILED_RANK = re.compile(r"rank\s+: (\d+) \(local_rank: \d+\)\s+exitcode\s+: (-?\d+)")


@dataclass
class _Signals:
    """Signals received while ranks run, newest last."""

    received: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class _Outcome:
    """How one start of torchrun ended."""

    exit_code: int
    failed_rank: int | None = None
    port_taken: bool = False


def run_local(
    run: RunDir,
    arguments: Sequence[str],
    *,
    num_ranks: int,
    max_restarts: int = 0,
    stage: str = "train",
    program: Sequence[str] = ("-m", "megatron_cpt", "train"),
    port: int | None = None,
) -> int:
    """Run `python PROGRAM ARGUMENTS` on `num_ranks` local ranks; return the exit code of the rank that failed first.

    A rank ended by signal N gives 128 + N; 2 means a mistake of the user, which no restart would mend. After any other
    failure the job starts again up to `max_restarts` times and continues from the run's last checkpoint.

    Raises: LaunchError when another job holds the run or no port can be bound.
    """
    job = f"local-{time.strftime('%Y%m%dT%H%M%S')}-{os.getpid()}"
    log_dir = run.logs / job
    with run_lock(run.jobs / "lock.json", job), _caught_signals() as signals:
        log_dir.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, *program, *arguments]
        append_record(
            run.jobs, job, stage=stage, scheduler="local", state="running", command=command, pid=os.getpid(),
            host=socket.gethostname(), ranks=num_ranks, log_dir=str(log_dir),
        )  # fmt: skip
        logger.info("job %s: %d ranks, logs in %s", job, num_ranks, log_dir)
        exit_code, state, restarts = 1, "failed", 0
        try:
            while True:
                outcome = _run_once(command, log_dir, num_ranks, port, signals)
                exit_code = outcome.exit_code
                if exit_code in (0, 2) or signals.received or restarts == max_restarts:
                    break
                restarts += 1
                append_record(run.jobs, job, state="running", restarts=restarts, exit_code=exit_code)
                logger.warning("%s. Restart %d of %d.", _describe(outcome, log_dir), restarts, max_restarts)
            stopped = "cancelled" if exit_code else "stopped"
            state = stopped if signals.received else "failed" if exit_code else "finished"
            if outcome.failed_rank is not None and not signals.received:
                _explain(outcome, log_dir)
        finally:
            append_record(run.jobs, job, state=state, exit_code=exit_code, restarts=restarts)
        return exit_code


def local_environment(environment: Mapping[str, str], num_ranks: int) -> dict[str, str]:
    """Return the environment of the ranks: threads shared out fairly and loopback for gloo, unless set already."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    defaults = {"OMP_NUM_THREADS": str(max(cores // num_ranks, 1)), "PYTHONUNBUFFERED": "1"}
    defaults["MEGATRON_CPT_JOB_START"] = f"{time.time():.0f}"
    if sys.platform == "linux":
        defaults["GLOO_SOCKET_IFNAME"] = "lo"
    checkout = str(Path(megatron_cpt.__file__).parents[1])  # ranks find the package wherever the job was started
    paths = [checkout, *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
    return {**defaults, **environment, "PYTHONPATH": os.pathsep.join(paths)}


def free_port() -> int:
    """Return a TCP port of the loopback interface that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _run_once(command: list[str], log_dir: Path, num_ranks: int, port: int | None, signals: _Signals) -> _Outcome:
    for _ in range(PORT_ATTEMPTS):
        outcome = _run_torchrun(command, log_dir, num_ranks, port or free_port(), signals)
        if not outcome.port_taken:
            return outcome
        if port is not None:
            raise LaunchError(f"port {port}: in use by another process. A free port is needed. Leave the port unset.")
        logger.warning("the rendezvous port was taken by another process; trying another one.")
    raise LaunchError(f"no free port after {PORT_ATTEMPTS} attempts. See {log_dir / 'launcher.log'}.")


def _run_torchrun(command: list[str], log_dir: Path, num_ranks: int, port: int, signals: _Signals) -> _Outcome:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1", f"--nproc-per-node={num_ranks}"]
    torchrun += ["--master-addr=127.0.0.1", f"--master-port={port}", f"--shutdown-timeout={SHUTDOWN_SECONDS}"]
    torchrun += ["--no-python", sys.executable, "-m", "megatron_cpt.launch.rank", str(log_dir), *command]
    log_path = log_dir / "launcher.log"
    with log_path.open("a", encoding="utf-8") as log:
        start = log.tell()
        log.write(f"$ {' '.join(torchrun)}\n")
        log.flush()
        process = subprocess.Popen(
            torchrun, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            env=local_environment(os.environ, num_ranks), preexec_fn=lambda: die_with_parent(signal.SIGTERM),
        )  # fmt: skip
    with _shown(rank_log_path(log_dir, 0)):
        exit_code = _wait(process, signals)
    with log_path.open(encoding="utf-8", errors="replace") as log:
        log.seek(start)
        text = log.read()
    return _outcome(exit_code, text)


def _wait(process: subprocess.Popen[bytes], signals: _Signals) -> int:
    """Wait for torchrun; the first signal goes to the ranks, which save and end, the second one ends them at once."""
    passed_on = 0
    while True:
        try:
            return process.wait(timeout=0.2)
        except subprocess.TimeoutExpired:
            pass
        while passed_on < len(signals.received):
            passed_on += 1
            ranks = _rank_processes(process.pid)
            number = signals.received[passed_on - 1]
            if passed_on == 1 and ranks:
                logger.warning(
                    "%s: asking the ranks to save and end; once more to end them at once.", signal.Signals(number).name
                )
                for pid in ranks:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGTERM if number == signal.SIGINT else number)
            else:
                process.terminate()


def _rank_processes(torchrun_pid: int) -> list[int]:
    import psutil  # only here: a light module stays light

    with contextlib.suppress(psutil.NoSuchProcess):
        return [child.pid for child in psutil.Process(torchrun_pid).children()]
    return []


def _outcome(exit_code: int, log: str) -> _Outcome:
    """Read from torchrun's own summary which rank failed first and how; torchrun itself always exits 1."""
    if exit_code == 0:
        return _Outcome(0)
    failed = _FAILED_RANK.search(log, max(log.find("Root Cause"), 0))
    if failed:
        code = int(failed[2])
        return _Outcome(code if code > 0 else 128 - code, failed_rank=int(failed[1]))
    port_taken = "EADDRINUSE" in log or "address already in use" in log.lower()
    return _Outcome(exit_code if exit_code > 0 else 128 - exit_code, port_taken=port_taken)


def _describe(outcome: _Outcome, log_dir: Path) -> str:
    if outcome.failed_rank is None:
        return f"torchrun ended with exit code {outcome.exit_code}, see {log_dir / 'launcher.log'}"
    how = f"with exit code {outcome.exit_code}"
    if outcome.exit_code > 128:
        with contextlib.suppress(ValueError):
            how = f"by {signal.Signals(outcome.exit_code - 128).name}"
    return f"rank {outcome.failed_rank} ended first, {how}, see {rank_log_path(log_dir, outcome.failed_rank)}"


def _explain(outcome: _Outcome, log_dir: Path) -> None:
    """Log which rank failed; show the end of its log where the terminal has not shown it already."""
    logger.error("%s.", _describe(outcome, log_dir))
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


@contextlib.contextmanager
def _caught_signals() -> Iterator[_Signals]:
    """Collect SIGINT, SIGTERM, SIGHUP and SIGUSR1 instead of dying of them."""
    signals = _Signals()
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
