"""Calls of a batch scheduler's own commands: submit, find by name, the states of jobs, cancel.

A job's state is `queued`, `held`, `running`, `finished`, `failed` or `cancelled`; `gone` where the scheduler answers that it
has no such job (any more); `unknown` where it did not answer. The last two are different things: a job that is gone can be
submitted again, one that nobody can ask about now must not be. `reason` is the scheduler's own word for why.

Facts that shape this module: Slurm takes a dependency on an unknown id and runs at once, and leaves a job whose parent
failed pending for ever without `--kill-on-invalid-dep`; PBS takes both and deletes the job later without a word. So parents
are looked up before submission.
"""

import abc
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_cpt.errors import LaunchError
from megatron_cpt.launch.scheduler.job import Dependency

TIMEOUT_SECONDS = 60
NO_ANSWER = 124
"""Exit code of a command that did not end within its time, as `timeout` has it."""
_LOST = re.compile(r"timed out|time-?out|cannot connect|unable to contact|connection (refused|reset)|end of file", re.I)
"""Words of a submit command that lost its server in the middle: the scheduler can still have accepted the job."""
ALIVE = ("queued", "held", "running")
"""States of a job that can still run."""


@dataclass(frozen=True)
class JobState:
    """The scheduler's state of one job."""

    state: str
    reason: str = ""
    exit_code: int | None = None


class Scheduler(abc.ABC):
    """A batch scheduler, by its commands."""

    name: str
    commands: tuple[str, ...]
    """Programs that must be on PATH."""
    consequence: str
    """Behaviour of a job whose parent is unknown."""

    def check_commands(self) -> None:
        """Raise LaunchError unless the scheduler's commands are on PATH."""
        missing = [name for name in self.commands if shutil.which(name) is None]
        if missing:
            raise LaunchError(
                f"launch.scheduler: {self.name}, but {', '.join(missing)} is not on PATH. A login node of the site is "
                "needed. Log in there, or use launch.scheduler=local, or --dry-run."
            )

    @abc.abstractmethod
    def submit_command(self, script: Path, dependencies: Sequence[Dependency]) -> list[str]:
        """Return the command that submits a job script after other jobs."""

    @abc.abstractmethod
    def job_name(self, wanted: str, unique: str) -> str:
        """Return a name that the scheduler takes and that no other job has: of `wanted` what fits, then `unique`."""

    @abc.abstractmethod
    def printed_id(self, output: str) -> str | None:
        """Return the id of a new job from the submit command's output, which can also contain a site's notices."""

    @abc.abstractmethod
    def named(self, name: str) -> list[str] | None:
        """Return the ids of this user's jobs of a name; None where the scheduler did not answer."""

    @abc.abstractmethod
    def states(self, ids: Iterable[str]) -> dict[str, JobState]:
        """Return the state of every id, asked for all at once."""

    @abc.abstractmethod
    def cancel(self, ids: Sequence[str]) -> None:
        """Cancel jobs; one that has ended already is no error."""

    def submit(self, script: Path, dependencies: Sequence[Dependency], name: str) -> str:
        """Submit a job script whose job has the unique `name`; return the job's id.

        A scheduler can accept a job and lose its answer (a time-out, a notice instead of the id); the job's name
        identifies it.

        Raises: LaunchError with the scheduler's own message, or NotKnown where nobody can tell whether it took the job.
        """
        command = self.submit_command(script, dependencies)
        result = ask(command)
        job = self.printed_id(result.stdout)
        if result.returncode == 0 and job is not None:
            return job
        found = self.named(name)
        if found:
            return found[-1]
        said = one_line(result.stderr or result.stdout) or "nothing"
        if found is None or result.returncode == NO_ANSWER or _LOST.search(said):
            raise NotKnown(
                f"{command[0]}: exit code {result.returncode}: {said}. The scheduler may have taken the job {name} and does "
                "not answer now. Give the same command again later: it looks the job up before it submits anything."
            )
        if result.returncode == 0:
            raise LaunchError(
                f"{command[0]}: printed {said}, and no job is called {name}. A job id is needed. Look at the queue by hand."
            )
        raise LaunchError(
            f"{' '.join(command)}: exit code {result.returncode}: {said}. The scheduler refused the job. Correct the site "
            "file or the options and submit again."
        )

    def check_dependencies(self, dependencies: Sequence[Dependency]) -> None:
        """Raise LaunchError for a parent that is unknown, or that can no longer satisfy its dependency."""
        for dependency in dependencies:
            for job, state in self.states(dependency.ids).items():
                if state.state == "unknown":
                    raise NotKnown(
                        f"--depend {dependency}: {self.name} does not answer about job {job} ({state.reason}). Whether "
                        "the job exists must be known. Try again later."
                    )
                if state.state == "gone":
                    raise LaunchError(
                        f"--depend {dependency}: {self.name} knows no job {job}. {self.consequence} "
                        "Name a job that is queued, running or finished."
                    )
                hopeless = {"afterok": ("failed", "cancelled"), "afternotok": ("finished",)}.get(dependency.kind, ())
                if state.state in hopeless:
                    raise LaunchError(
                        f"--depend {dependency}: job {job} has {state.state} already, so this job could never start. "
                        "Repair that job first, or depend on another one."
                    )


class NotKnown(LaunchError):
    """The scheduler did not answer, so the states of jobs are unknown."""


def ask(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a scheduler's command; after a timeout, return exit code NO_ANSWER and the output so far.

    Raises: LaunchError when the command is not there.
    """
    try:
        return subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=TIMEOUT_SECONDS, check=False
        )
    except FileNotFoundError:
        raise LaunchError(
            f"{command[0]}: not on PATH. The scheduler's commands are needed. Use a login node."
        ) from None
    except subprocess.TimeoutExpired as expired:
        said = expired.stdout.decode(errors="replace") if isinstance(expired.stdout, bytes) else expired.stdout or ""
        late = f"no answer within {TIMEOUT_SECONDS} s"
        return subprocess.CompletedProcess(command, NO_ANSWER, said, late)


def joined_state(states: Sequence[JobState]) -> JobState:
    """Return the state of an array from its tasks': alive while one is, failed when one did."""
    for name in ("running", "queued", "held", "failed", "cancelled"):
        for state in states:
            if state.state == name:
                return state
    return states[0] if states else JobState("gone")


def checked_name(wanted: str, unique: str, longest: int) -> str:
    """Return `wanted-unique` in letters, digits, `-`, `_` and `.`, from a letter on; of `wanted` as much as fits."""
    plain = re.sub(r"[^A-Za-z0-9_.-]+", "_", wanted)
    plain = plain if plain[:1].isalpha() else f"j{plain}"
    return f"{plain[: longest - len(unique) - 1]}-{unique}"


def one_line(text: str) -> str:
    """Return a text without its line breaks."""
    return " ".join(text.split())


def unanswered(ids: Iterable[str], result: subprocess.CompletedProcess[str]) -> dict[str, JobState]:
    """Return `unknown` for every id, with the command's output."""
    said = one_line(result.stderr or result.stdout) or f"exit code {result.returncode}"
    return dict.fromkeys(ids, JobState("unknown", said))


def with_gone(found: Mapping[str, JobState], ids: Iterable[str], reason: str = "") -> dict[str, JobState]:
    """Return a state for every id: the reported one, or `gone`."""
    return {job: found.get(job, JobState("gone", reason)) for job in ids}
