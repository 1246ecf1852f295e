"""Steps of printed commands, and what a recipe checks about their results.

A demonstration is a list of steps. Every command is printed before it runs, as a user would type it; what is done
already is passed over, so that an interrupted list continues where it stopped. `tasks/demo/run.py` and each recipe's
`mini.py` are such lists.
"""

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]

Command = list[str]


@dataclass(frozen=True)
class Step:
    """Commands of which `is_done` says whether they still have to run, and what must hold afterwards."""

    title: str
    commands: list[Command]
    is_done: Callable[[], bool]
    run: Callable[[Command], None]
    check: Callable[[], str] | None = None
    """Looks at the results, whether they were made now or before; says what it found or raises Unexpected."""


class Unexpected(Exception):
    """A result is not what the recipe promises."""


def run_steps(steps: Sequence[Step]) -> None:
    """Run the steps that are not done, and every check; end the program with a message where one fails."""
    for number, step in enumerate(steps, 1):
        done = step.is_done()
        say(f"\n== {number}. {step.title}{' (done already)' if done and step.commands else ''}")
        if not done:
            begun = time.monotonic()
            for command in step.commands:
                step.run(command)
            if step.commands:
                say(f"   {time.monotonic() - begun:.0f} s")
        if step.check is not None:
            try:
                say(f"   checked: {step.check()}")
            except Unexpected as problem:
                sys.exit(f"This failed: {problem}")


def step(
    title: str,
    commands: list[Command],
    is_done: Callable[[], bool],
    run: Callable[[Command], None] | None = None,
    check: Callable[[], str] | None = None,
) -> Step:
    """Return a step; its commands run one after the other unless `run` says how."""
    return Step(title, commands, is_done, run or run_command, check)


def checked(title: str, check: Callable[[], str]) -> Step:
    """Return a step that only looks at results."""
    return Step(title, [], lambda: True, run_command, check)


def refused(title: str, command: Command, message: str, is_done: Callable[[], bool] | None = None) -> Step:
    """Return a step whose command must end with exit code 2 and say `message`."""
    return Step(title, [command], is_done or (lambda: False), lambda words: run_refused(words, message))


def require(condition: bool, problem: str) -> None:
    """Raise Unexpected with `problem` where the condition does not hold."""
    if not condition:
        raise Unexpected(problem)


def cpt(*arguments: object) -> Command:
    """Return a megatron-cpt command."""
    return ["megatron-cpt", *map(str, arguments)]


def python(*arguments: object) -> Command:
    """Return a command for this interpreter."""
    return ["python", *map(str, arguments)]


def exists(*paths: Path) -> Callable[[], bool]:
    """Return a check that all of `paths` exist."""
    return lambda: all(path.exists() for path in paths)


def records(run: Path) -> list[dict]:
    """Return the complete records of a run's metrics, oldest first."""
    path = run / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def has_trained(run: Path, iteration: int) -> bool:
    """Return whether a run ever came to `iteration`."""
    return any(record["kind"] == "train" and record["iteration"] >= iteration for record in records(run))


def is_finished(run: Path) -> bool:
    """Return whether a run wrote that it came to its planned end."""
    return any(record["kind"] == "end" and record["reason"] == "finished" for record in records(run)[-1:])


def run_command(command: Command) -> None:
    """Print and run a command; end the program with its exit code when it fails."""
    code = wait_for(start(command))
    if code:
        sys.exit(f"This stopped: that command ended with exit code {code}. Rerun it to continue.")


def run_refused(command: Command, message: str) -> None:
    """Print and run a command that must be refused with exit code 2 and `message` on standard error."""
    job = start(command, stderr=subprocess.PIPE)
    _, errors = job.communicate()
    said = errors.decode().strip()
    say(said)
    if job.returncode != 2 or message not in said:
        sys.exit(f"This failed: exit code 2 and {message!r} were to be expected, not exit code {job.returncode}.")
    say("   refused with exit code 2, as it must be")


def run_and_kill(command: Command, run: Path, iteration: int) -> None:
    """Run a training command, kill one of its ranks at `iteration`, and check that the whole job ends because of it."""
    job = start(command)
    was_killed = False
    while job.poll() is None:
        trained = [record for record in records(run) if record["kind"] == "train"]
        if trained and trained[-1]["iteration"] >= iteration:
            rank = rank_process(job.pid)
            say(f"+ kill -KILL {rank.pid}   # rank 1 of the job, after iteration {trained[-1]['iteration']}")
            rank.kill()
            was_killed = True
            break
        time.sleep(0.2)
    code = wait_for(job)
    if not was_killed:
        sys.exit(f"This stopped: that command ended with exit code {code}. Rerun it to continue.")
    if code == 0:
        sys.exit("This stopped: a training job that lost a rank ended with exit code 0.")
    say(f"   the job ended with exit code {code}, as it must")


def rank_process(job: int) -> psutil.Process:
    """Return rank 1 among the processes that the job `job` started."""
    return next(child for child in psutil.Process(job).children(recursive=True) if child.environ().get("RANK") == "1")


def start(command: Command, stderr: int | None = None) -> subprocess.Popen:
    """Print a command and start it, with the programs of this interpreter's environment and of the checkout."""
    say(f"+ {shlex.join(command)}")
    known = {"python": [sys.executable], "megatron-cpt": [sys.executable, "-m", "megatron_cpt"]}
    program = known.get(command[0], [str(ROOT / command[0])])
    arguments = command[1:]
    if command[0] == "python":
        arguments = [
            str(ROOT / word) if word.startswith("tasks/") and word.endswith(".py") else word for word in arguments
        ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([*program, *arguments], env=environment, stderr=stderr)


def wait_for(job: subprocess.Popen) -> int:
    """Return a command's exit code; on an interruption, let the command end in order first (Ctrl-C reaches both)."""
    try:
        return job.wait()
    except KeyboardInterrupt:
        job.wait()
        raise


def say(text: str) -> None:
    """Print at once, in order with what the commands print."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
