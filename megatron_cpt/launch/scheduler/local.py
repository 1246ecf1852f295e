"""The local scheduler: torchrun on this machine, watched until it ends.

`run_local` owns the job from the lock to the ledger: a free port, threads per rank, a log file per rank with rank 0's
shown in the terminal, signals passed to the ranks, restarts after a crash, and the exit code of the rank that
failed first.
"""

import codecs
import contextlib
import itertools
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, TextIO

from megatron_cpt.errors import LaunchError
from megatron_cpt.launch.node.processes import (
    SHUTDOWN_SECONDS,
    Outcome,
    Signals,
    caught_signals,
    process_environment,
    run_watched,
    show_failure,
    wait_passing_signals,
)
from megatron_cpt.launch.scheduler.queue import JobState
from megatron_cpt.run.directory import RunDir
from megatron_cpt.run.environment import write_environment
from megatron_cpt.run.ledger import ACTIVE_STATES, append_record
from megatron_cpt.run.lock import run_lock
from megatron_cpt.run.made_of import fingerprint

logger = logging.getLogger(__name__)

_NUMBERS = itertools.count()
PORT_ATTEMPTS = 4
"""Ports tried before a job is given up; another process can take a free port before torchrun binds it."""


def run_local(
    run: RunDir,
    arguments: Sequence[str],
    *,
    num_ranks: int,
    max_restarts: int = 0,
    stage: str = "train",
    program: Sequence[str] = ("-m", "megatron_cpt", "train"),
    port: int | None = None,
    job: str | None = None,
    fields: Mapping[str, object] | None = None,
) -> int:
    """Run `python PROGRAM ARGUMENTS` on `num_ranks` local ranks; return the exit code of the rank that failed first.

    A rank ended by signal N returns 128 + N; 2 means a user error, which a restart cannot fix. After any other failure
    the job starts again up to `max_restarts` times and continues from the run's last checkpoint.

    Raises: LaunchError when another job holds the run or no port can be bound.
    """
    job = job or job_name()
    log_dir = run.logs / job
    with run_lock(run.jobs / "lock.json", job), caught_signals() as signals:
        log_dir.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, *program, *arguments]
        write_environment(log_dir / "environment.json", os.environ)
        append_record(
            run.jobs,
            job,
            stage=stage,
            scheduler="local",
            state="running",
            command=command,
            pid=os.getpid(),
            host=socket.gethostname(),
            ranks=num_ranks,
            log_dir=str(log_dir),
            **(fields or {}),
        )
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
                logger.warning("%s. Restart %d of %d.", outcome.text(log_dir), restarts, max_restarts)
            stopped = "cancelled" if exit_code else "stopped"
            state = stopped if signals.received else "failed" if exit_code else "finished"
            if exit_code and not signals.received:
                show_failure(outcome, log_dir)
        finally:
            append_record(run.jobs, job, state=state, exit_code=exit_code, restarts=restarts)
        return exit_code


def run_once(
    run: RunDir, job: str, stage: str, name: str, words: Sequence[str], reads: Sequence[str], writes: Sequence[str]
) -> int:
    """Run `megatron-cpt WORDS` as a process of this machine, shown here and kept in the job's log; return its exit code.

    The ledger records its inputs (`run/made_of.py`). A signal is passed on to it.
    """
    log_dir = run.logs / job
    log_dir.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "megatron_cpt", *words]
    append_record(
        run.jobs, job, stage=stage, name=name, scheduler="local", state="running", command=command, pid=os.getpid(),
        host=socket.gethostname(), log_dir=str(log_dir), inputs=fingerprint(reads, words),
    )  # fmt: skip
    own = process_environment(os.environ, 1)
    environment = {**own, **os.environ, "PYTHONPATH": own["PYTHONPATH"]}
    code, state = 1, "failed"
    try:
        with caught_signals() as signals, (log_dir / "task_00000.log").open("ab") as log:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
            )
            shown = [
                threading.Thread(target=_copy, args=(pipe, target, log), daemon=True)
                for pipe, target in ((process.stdout, sys.stdout), (process.stderr, sys.stderr))
            ]
            for thread in shown:
                thread.start()
            code = wait_passing_signals(process, signals)
            for thread in shown:
                thread.join()
            state = "cancelled" if code and signals.received else "failed" if code else "finished"
    finally:
        append_record(run.jobs, job, state=state, exit_code=code, outputs=fingerprint(writes))
    return code


def job_name() -> str:
    """Return the id of a new job of this machine."""
    return f"local-{time.strftime('%Y%m%dT%H%M%S')}-{os.getpid()}-{next(_NUMBERS)}"


def job_state(record: Mapping[str, Any]) -> JobState:
    """Return the state of a local job from its ledger records and the existence of its process."""
    state = str(record.get("state", "unknown"))
    if state not in ACTIVE_STATES:
        ended = {"stopped": "finished"}.get(state, state)
        return JobState(ended, str(record.get("reason", "")), record.get("exit_code"))
    if record.get("host") != socket.gethostname():
        return JobState("running", f"on {record.get('host')}, not seen from here")
    return JobState("running") if _is_alive(record) else JobState("gone", "its process is gone")


def end_job(record: Mapping[str, Any]) -> None:
    """Ask a local job of this machine to save and end."""
    if record.get("state") == "running" and record.get("host") == socket.gethostname() and _is_alive(record):
        os.kill(int(record["pid"]), signal.SIGTERM)


def _is_alive(record: Mapping[str, Any]) -> bool:
    try:
        os.kill(int(record["pid"]), 0)
    except (ProcessLookupError, KeyError):
        return False
    except PermissionError:
        return True
    return True


def _copy(pipe: IO[bytes], target: TextIO, log: IO[bytes]) -> None:
    """Copy a pipe to the terminal and to the log as it comes; a closed terminal does not end the job."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")  # a chunk may end inside a character
    while chunk := os.read(pipe.fileno(), 1 << 16):
        log.write(chunk)
        log.flush()
        with contextlib.suppress(OSError, ValueError):
            target.write(decoder.decode(chunk))
            target.flush()


def local_environment(environment: Mapping[str, str], num_ranks: int) -> dict[str, str]:
    """Return the environment of the ranks; the user's values are kept, and the package stays importable."""
    defaults = process_environment(environment, num_ranks)
    if sys.platform == "linux":
        defaults["GLOO_SOCKET_IFNAME"] = "lo"  # a machine's own name need not resolve
    return {**defaults, **environment, "PYTHONPATH": defaults["PYTHONPATH"]}


def free_port() -> int:
    """Return a TCP port of the loopback interface that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _run_once(command: list[str], log_dir: Path, num_ranks: int, port: int | None, signals: Signals) -> Outcome:
    environment = local_environment(os.environ, num_ranks)
    for _ in range(PORT_ATTEMPTS):
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1", f"--nproc-per-node={num_ranks}"]
        torchrun += ["--master-addr=127.0.0.1", f"--master-port={port or free_port()}"]
        torchrun += [f"--shutdown-timeout={SHUTDOWN_SECONDS}", "--no-python", "--"]
        torchrun += [sys.executable, "-m", "megatron_cpt.launch.node.rank", str(log_dir), *command]
        outcome = run_watched(torchrun, log_dir, environment, signals, _signal_ranks)
        if not outcome.port_taken:
            return outcome
        if port is not None:
            raise LaunchError(f"port {port}: in use by another process. A free port is needed. Leave the port unset.")
        logger.warning("the rendezvous port was taken by another process; trying another one.")
    raise LaunchError(f"no free port after {PORT_ATTEMPTS} attempts. See {log_dir / 'launcher.log'}.")


def _signal_ranks(torchrun_pid: int, number: int) -> bool:
    """Send SIGTERM (or SIGUSR1 unchanged) to the ranks, not to torchrun, which would kill them after half a minute."""
    import psutil  # only here: a light module stays light

    ranks = []
    with contextlib.suppress(psutil.NoSuchProcess):
        ranks = psutil.Process(torchrun_pid).children()
    for rank in ranks:
        with contextlib.suppress(psutil.NoSuchProcess):
            rank.send_signal(number if number == signal.SIGUSR1 else signal.SIGTERM)
    return bool(ranks)
