"""Program that a job script runs on the first node: it finds the nodes, starts the processes and writes the ledger.

    python -m megatron_cpt.launch.node.supervisor --run RUN --stage STAGE --log-dir DIR [options] -- PROGRAM [ARGUMENT ...]

Without `--launcher` the program runs once, here, `{array_index}` and `{num_array_tasks}` in its arguments filled in. With
it the program runs on every rank. The rendezvous is the first host of the node list itself, at a port that follows
from the job's id and moves on when it is taken.
"""

import argparse
import contextlib
import json
import logging
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_cpt.config.loading.resolve import read_resolved
from megatron_cpt.errors import CptError, LaunchError
from megatron_cpt.launch.node.chain import BROKEN_EXIT_CODE, NOT_FINISHED_EXIT_CODE, chain_verdict
from megatron_cpt.launch.node.hosts import excluded_hosts, job_hosts, training_hosts, write_hostfile
from megatron_cpt.launch.node.preflight import BAD_NODES_EXIT_CODE, read_excluded
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
from megatron_cpt.log import configure_logging
from megatron_cpt.run.directory import RunDir
from megatron_cpt.run.environment import write_environment
from megatron_cpt.run.ledger import append_record, read_jobs
from megatron_cpt.run.lock import HELD, run_lock
from megatron_cpt.run.made_of import fingerprint
from megatron_cpt.run.progress import last_checkpoint

logger = logging.getLogger(__name__)

FIRST_PORT, NUM_PORTS = 15000, 15000
"""Rendezvous ports are below the system's range of client ports (from 32768)."""
PORT_ATTEMPTS = 4
RECORDED = "recorded"
"""Stands for a length in epochs, which training counts when it starts and writes to the run's config.yaml."""
HOSTFILE = "%hostfile%"
"""Stands for the job's node file in the launcher's command."""
FORWARDED = ("PATH", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "MEGATRON_CPT_JOB_START", HELD)
"""Variables of the job that launchers such as mpirun do not carry to other nodes by themselves."""


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Return the options before `--` and the program after it."""
    parser = argparse.ArgumentParser(prog="python -m megatron_cpt.launch.node.supervisor", description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="run directory")
    parser.add_argument("--stage", required=True)
    parser.add_argument("--log-dir", type=Path, required=True)
    parser.add_argument("--launcher", default="", help="command that starts processes on all nodes")
    parser.add_argument("--processes", choices=("node", "rank"), default="node", help="what the launcher starts")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--gpus-per-node", type=int, default=1)
    parser.add_argument("--forward", default="", help="names of variables to carry to every process, by commas")
    parser.add_argument("--num-array-tasks", type=int, default=1)
    parser.add_argument("--chain", default="", help="name that the links of one chain share")
    parser.add_argument(
        "--train-iters",
        metavar="N",
        help=f"iterations after which the run is finished; {RECORDED}: those in its config.yaml",
    )
    parser.add_argument(
        "--must-finish", action="store_true", help=f"exit {NOT_FINISHED_EXIT_CODE} if it is not finished"
    )
    parser.add_argument("--preflight", action="store_true", help="measure the nodes first; bad ones end the job")
    parser.add_argument("--device", choices=("cuda", "xpu", "cpu"), help="preflight: what every rank must find")
    parser.add_argument("--max-failures", type=int, default=2, help="links without progress that break the chain")
    parser.add_argument("--reads", type=json.loads, default=[], help="what it is made of, for the ledger, as JSON")
    parser.add_argument("--writes", type=json.loads, default=[], help="what it makes, for the ledger, as JSON")
    parser.add_argument("--points", type=Path, default=None, help="sweep: what each array task trains, as JSON")
    options, program = list(argv), []
    if "--" in options:
        split = options.index("--")
        options, program = options[:split], options[split + 1 :]
    arguments = parser.parse_args(options)
    if not program:
        parser.error("no program: give it after --")
    arguments.program = program
    arguments.is_array = arguments.num_array_tasks > 1
    return arguments


def stage_length(arguments: argparse.Namespace, run: RunDir) -> int | None:
    """Return the iterations after which the run is finished; None as long as a length in epochs was not counted."""
    if arguments.train_iters != RECORDED:
        return int(arguments.train_iters)
    return read_resolved(run.config_path).training.train_iters if run.config_path.is_file() else None


def job_id(environment: Mapping[str, str], *, is_array: bool = False) -> str:
    """Return the scheduler's id of this job; an array's for its tasks.

    A job that was submitted from inside an array task inherits that array's variables: only a job that knows itself to be an
    array looks at them.
    """
    array = environment.get("SLURM_ARRAY_JOB_ID") or environment.get("PBS_ARRAY_ID") if is_array else None
    return array or environment.get("SLURM_JOB_ID") or environment.get("PBS_JOBID") or f"by-hand-{os.getpid()}"


def array_index(environment: Mapping[str, str], *, is_array: bool = True) -> int:
    """Return this task's index in its array; 0 outside of one."""
    if not is_array:
        return 0
    return int(environment.get("SLURM_ARRAY_TASK_ID") or environment.get("PBS_ARRAY_INDEX") or 0)


def job_name(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the job's unique name for the ledger, by which a submission whose answer was lost is found again."""
    name = environment.get("SLURM_JOB_NAME") or environment.get("PBS_JOBNAME")
    return {"job_name": name} if name else {}


def rendezvous_port(job: str, attempt: int, task: int = 0) -> int:
    """Return a port that all nodes derive alike from the job's id; later attempts and array tasks move far away."""
    digits = re.match(r"\D*(\d+)", job)
    return FIRST_PORT + (int(digits[1] if digits else 0) * 7 + attempt * 1009 + task * 211) % NUM_PORTS


def process_command(arguments: argparse.Namespace, host: str, port: int, environment: Mapping[str, str]) -> list[str]:
    """Return the launcher's command, every variable carried by `env` so that no launcher can lose it."""
    nodes, gpus = arguments.nodes, arguments.gpus_per_node
    launcher = [word.replace(HOSTFILE, environment.get("PBS_NODEFILE", "")) for word in shlex.split(arguments.launcher)]
    forwarded = [*FORWARDED, *filter(None, arguments.forward.split(","))]
    variables = {name: environment[name] for name in forwarded if environment.get(name)}
    variables = {**process_environment(environment, gpus), "MASTER_ADDR": host, "MASTER_PORT": str(port), **variables}
    rank = [sys.executable, "-m", "megatron_cpt.launch.node.rank", str(arguments.log_dir), *arguments.program]
    if arguments.processes == "node":
        node = [
            sys.executable,
            "-m",
            "megatron_cpt.launch.node.torchrun",
            f"--nnodes={nodes}",
            f"--nproc-per-node={gpus}",
        ]
        node += [f"--master-addr={host}", f"--master-port={port}", f"--shutdown-timeout={SHUTDOWN_SECONDS}"]
        rank = [*node, "--no-python", "--", *rank]  # else torchrun takes `--max` of the program for its own, cut short
    return [*launcher, "env", *(f"{name}={value}" for name, value in variables.items()), *rank]


def main(argv: Sequence[str]) -> int:
    """Run the job; return its exit code."""
    arguments = parse_arguments(argv)
    configure_logging()
    os.environ["MEGATRON_CPT_JOB_START"] = f"{time.time():.0f}"  # the walltime counts from here, not from the training
    arguments.log_dir.mkdir(parents=True, exist_ok=True)
    try:
        if arguments.points is not None:
            _take_point(arguments)
        with caught_signals() as signals:
            _record_environment(arguments)
            if not arguments.launcher:
                return _run_once(arguments, signals)
            return _run_ranks(arguments, signals)
    except CptError as error:
        sys.stderr.write(f"{arguments.stage}: {error}\n")
        # 2 would say that every next link fails alike; what goes wrong in launching may go right on other nodes
        code = 1 if isinstance(error, LaunchError) else 2
        append_record(arguments.run / "jobs", _record_id(arguments), state="failed", exit_code=code, reason=str(error))
        return code


def _record_environment(arguments: argparse.Namespace) -> None:
    """Write the environment of this job's first node next to its log; errors of a full disk are left to later
    writes."""
    index = f"_{array_index(os.environ):05d}" if arguments.is_array else ""
    with contextlib.suppress(OSError):
        write_environment(
            arguments.log_dir / f"environment{index}.json", os.environ, tuple(arguments.forward.split(","))
        )


def _take_point(arguments: argparse.Namespace) -> None:
    """Let this array task work on its point of a sweep: another run directory, log folder, length and program."""
    points = json.loads(arguments.points.read_text(encoding="utf-8"))
    arguments.is_array = len(points) > 1
    point = points[array_index(os.environ, is_array=arguments.is_array)]
    arguments.run, arguments.log_dir = Path(point["run"]), Path(point["log_dir"])
    arguments.train_iters, arguments.program = point["train_iters"], [*arguments.program, *point["arguments"]]
    arguments.log_dir.mkdir(parents=True, exist_ok=True)


def _record_id(arguments: argparse.Namespace) -> str:
    """Return what the ledger calls this job: a sweep's points are tasks of one array."""
    if arguments.points is None:
        return job_id(os.environ)
    is_array = arguments.is_array
    return f"{job_id(os.environ, is_array=is_array)}/{array_index(os.environ, is_array=is_array)}"


def _run_ranks(arguments: argparse.Namespace, signals: Signals) -> int:
    run, job = RunDir(arguments.run), _record_id(arguments)
    with contextlib.ExitStack() as stack:
        code = _verdict(arguments, run, job)
        if code is not None:  # also while another link holds the run: nothing is to be done
            return code
        if not _take_lock(stack, run, job, signals):
            append_record(run.jobs, job, state="stopped", exit_code=0, reason="ended while another job held the run")
            return NOT_FINISHED_EXIT_CODE if arguments.must_finish else 0
        code = _verdict(arguments, run, job)  # the job that held the run may have finished it
        return _train(arguments, run, job, signals) if code is None else code


def _verdict(arguments: argparse.Namespace, run: RunDir, job: str) -> int | None:
    """Return the exit code of a link that has nothing to train, None for one that trains."""
    if arguments.train_iters is None:
        return None
    # Only links that came to train have `iteration_start`. One that waited or was refused says nothing about
    # progress.
    links = [
        link
        for link in read_jobs(run.jobs).values()
        if arguments.chain and link.get("chain") == arguments.chain and "iteration_start" in link
    ]
    verdict, reason = chain_verdict(
        [link for link in links if link["job"] != job],
        iteration=last_checkpoint(run),
        train_iters=stage_length(arguments, run),
        run_path=run.path,
        max_failures=arguments.max_failures,
    )
    logger.info("%s: %s", verdict, reason)
    if verdict == "run":
        return None
    code = {"finished": 0, "broken": BROKEN_EXIT_CODE}.get(verdict, NOT_FINISHED_EXIT_CODE)
    state = "failed" if verdict == "broken" else verdict
    append_record(run.jobs, job, state=state, exit_code=code, reason=reason, **job_name(os.environ))
    return code


def _take_lock(stack: contextlib.ExitStack, run: RunDir, job: str, signals: Signals) -> bool:
    """Hold the run until the stack closes, waiting for a job that works on it; return False when a signal ends the wait.

    A link never fails because another one works: its dependent jobs would be cancelled. A dead holder's lock expires.
    """
    # The wait is inside the allocation: only Slurm requeues, and on PBS an owner may not qrerun.
    while not signals.received:
        try:
            stack.enter_context(run_lock(run.jobs / "lock.json", f"job {job}"))
            return True
        except LaunchError as held:
            logger.info("waiting: %s", held)
            for _ in range(20):
                if not signals.received:
                    time.sleep(0.5)
    return False


def _train(arguments: argparse.Namespace, run: RunDir, job: str, signals: Signals) -> int:
    iteration = last_checkpoint(run)
    nodefile = os.environ.get("PBS_NODEFILE")
    all_hosts = job_hosts(os.environ)
    hosts = _choose_hosts(arguments, run, all_hosts, nodefile)
    (run.path / "stop_now").unlink(missing_ok=True)  # meant for a job that has ended before it looked
    append_record(
        run.jobs, job, state="running", hosts=hosts, iteration_start=iteration, stage=arguments.stage,
        chain=arguments.chain, log_dir=str(arguments.log_dir),
        restarts=int(os.environ.get("SLURM_RESTART_COUNT", "0")), **job_name(os.environ),
    )  # fmt: skip
    if arguments.preflight:
        hosts, code, reason = _good_hosts(arguments, run, job, signals, hosts, all_hosts, nodefile)
        if code or signals.received:
            state = "failed" if code else "stopped"
            logger.error("%s", reason)
            append_record(run.jobs, job, state=state, exit_code=code, iteration_end=iteration, reason=reason)
            return code
    outcome = _start(arguments, run, job, hosts[0], signals)
    iteration = last_checkpoint(run)
    code = outcome.exit_code
    state = ("stopped" if signals.received else "finished") if code == 0 else "failed"
    if code:
        show_failure(outcome, arguments.log_dir)
    elif arguments.must_finish and arguments.train_iters is not None:
        length = stage_length(arguments, run)
        if length is not None and iteration < length:
            code = NOT_FINISHED_EXIT_CODE
            logger.warning("iteration %d of %d: the chain needs more links.", iteration, length)
    # This record counts more than the scheduler's: PBS reports -29 for a run that saved at its walltime.
    append_record(run.jobs, job, state=state, exit_code=code, iteration_end=iteration)
    return code


def _good_hosts(
    arguments: argparse.Namespace,
    run: RunDir,
    job: str,
    signals: Signals,
    hosts: list[str],
    all_hosts: list[str],
    nodefile: str | None,
) -> tuple[list[str], int, str]:
    """Measure the hosts; bad ones give their place to spare ones. Return the hosts, an exit code and the problem.

    Every round must find a host that was not known to be bad, so there are at most as many rounds as hosts.
    """
    for _ in all_hosts:
        known = set(excluded_hosts(all_hosts, read_excluded(run.jobs)))
        code, reason = _preflight(arguments, run, job, hosts[0], signals)
        bad = excluded_hosts(all_hosts, read_excluded(run.jobs))
        is_over = code != BAD_NODES_EXIT_CODE or signals.received
        if is_over or not set(bad) - known or len(all_hosts) - len(bad) < arguments.nodes:
            return hosts, code, reason
        logger.warning("%s; spare nodes take their place", reason)
        hosts = _choose_hosts(arguments, run, all_hosts, nodefile)
        append_record(run.jobs, job, hosts=hosts)
    return hosts, code, reason


def _choose_hosts(arguments: argparse.Namespace, run: RunDir, hosts: list[str], nodefile: str | None) -> list[str]:
    """Return the hosts that train; a launcher with a host file gets one that names only them."""
    chosen = training_hosts(hosts, read_excluded(run.jobs), arguments.nodes)
    if nodefile and len(hosts) > arguments.nodes:
        hostfile = arguments.log_dir / "hostfile"
        write_hostfile(hostfile, chosen, Path(nodefile))
        os.environ["PBS_NODEFILE"] = str(hostfile)
    return chosen


def _start(arguments: argparse.Namespace, run: RunDir, job: str, host: str, signals: Signals) -> Outcome:
    def ask_to_end(_pid: int, _number: int) -> bool:
        (run.path / "stop_now").touch()  # reaches the ranks on every node, whatever launcher is between
        return True

    for attempt in range(PORT_ATTEMPTS):
        if signals.received:
            return Outcome(128 + signals.received[-1])
        is_array = arguments.is_array
        own, task = job_id(os.environ, is_array=is_array), array_index(os.environ, is_array=is_array)
        port = rendezvous_port(own, attempt, task)
        command = process_command(arguments, host, port, os.environ)
        outcome = run_watched(command, arguments.log_dir, os.environ, signals, ask_to_end)
        # Whether a port is free shows only when the ranks start: another job on the host can take it in between.
        if not outcome.port_taken:
            return outcome
        logger.warning("port %d on %s is in use; trying another one.", port, host)
    raise LaunchError(f"{host}: {PORT_ATTEMPTS} ports were in use. See {arguments.log_dir / 'launcher.log'}.")


def _preflight(arguments: argparse.Namespace, run: RunDir, job: str, host: str, signals: Signals) -> tuple[int, str]:
    """Measure the nodes with the job's own launcher; return 0, or an exit code and the problem.

    Bad nodes are kept from the chain's next links, where the scheduler can (Slurm).
    """
    program = [arguments.program[0], "-m", "megatron_cpt", "preflight", "--run-dir", str(run.path)]
    program += ["--gpus-per-node", str(arguments.gpus_per_node)]
    program += ["--device", arguments.device] if arguments.device else []
    measured = argparse.Namespace(**{**vars(arguments), "program": program, "log_dir": arguments.log_dir / "preflight"})
    measured.log_dir.mkdir(parents=True, exist_ok=True)
    before = read_excluded(run.jobs)
    outcome = _start(measured, run, job, host, signals)
    if outcome.exit_code != BAD_NODES_EXIT_CODE:
        return outcome.exit_code, f"preflight: {outcome.text(measured.log_dir)}"
    excluded = read_excluded(run.jobs)
    for other, record in read_jobs(run.jobs).items():
        if os.environ.get("SLURM_JOB_ID") and record.get("chain") == arguments.chain and other != job:
            if record.get("state") == "submitted":
                command = ["scontrol", "update", f"jobid={other}", f"excnodelist={','.join(excluded)}"]
                subprocess.run(command, check=False)
    bad = [node for node in excluded if node not in before]
    return BAD_NODES_EXIT_CODE, f"preflight: bad nodes: {', '.join(bad) or 'those listed already'}"


def _run_once(arguments: argparse.Namespace, signals: Signals) -> int:
    """Run the program here, its output in the task's own log."""
    is_array = arguments.is_array
    run, index = RunDir(arguments.run), array_index(os.environ, is_array=is_array)
    job = job_id(os.environ, is_array=is_array)
    record, task = (f"{job}/{index}", {"task": index}) if is_array else (job, {})
    words = (
        arguments.program[arguments.program.index("megatron_cpt") + 1 :] if "megatron_cpt" in arguments.program else ()
    )
    append_record(
        run.jobs, record, state="running", stage=arguments.stage, inputs=fingerprint(arguments.reads, words), **task,
        **job_name(os.environ),
    )  # fmt: skip
    holes = {"{array_index}": str(index), "{num_array_tasks}": str(arguments.num_array_tasks)}
    program = [re.sub("|".join(map(re.escape, holes)), lambda hole: holes[hole[0]], word) for word in arguments.program]
    environment = {**os.environ, **process_environment(os.environ, 1)}
    log_path = arguments.log_dir / f"task_{index:05d}.log"
    with log_path.open("a", encoding="utf-8") as log:
        log.write(f"$ {shlex.join(program)}\n")
        log.flush()
        process = subprocess.Popen(program, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)
        code = wait_passing_signals(process, signals)
    state = "failed" if code else "finished"
    append_record(run.jobs, record, state=state, exit_code=code, outputs=fingerprint(arguments.writes))
    if code:
        logger.error("%s ended with exit code %d, see %s", arguments.stage, code, log_path)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
