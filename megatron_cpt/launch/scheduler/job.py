"""One job model for every scheduler: command, resources, dependencies."""

import re
from dataclasses import dataclass, field
from pathlib import Path

from megatron_cpt.errors import LaunchError

DEPENDENCY_TYPES = {
    "pbs": ("after", "afterok", "afternotok", "afterany"),
    "slurm": ("after", "afterok", "afternotok", "afterany", "aftercorr"),
}
VARIABLE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)
"""An environment variable's name, which a job script exports without quotes."""
_JOB_ID = {
    "pbs": re.compile(r"\d+(?:\[\d*\])?(?:\.[A-Za-z0-9_.-]+)?"),
    "slurm": re.compile(r"\d+(?:_\d+)?"),
}


@dataclass(frozen=True)
class Dependency:
    """Jobs that must have started or ended, in a certain way, before this one can start."""

    kind: str
    ids: tuple[str, ...]

    def __str__(self) -> str:
        return ":".join([self.kind, *self.ids])


@dataclass(frozen=True, kw_only=True)
class Job:
    """A job for a scheduler."""

    name: str
    """Name in the queue."""
    stage: str
    """tokenize, convert, train, ..."""
    command: tuple[str, ...]
    """The program and its arguments, run by `python -m megatron_cpt.launch.node.supervisor` inside the job."""
    work_dir: Path
    """Folder that relative paths of the command start at."""
    log_dir: Path
    """Folder for the job's output; made before submission."""
    walltime: int
    """Seconds."""
    nodes: int = 1
    gpus_per_node: int = 1
    queue: str | None = None
    account: str | None = None
    environment: dict[str, str] = field(default_factory=dict)
    dependencies: tuple[Dependency, ...] = ()
    num_array_tasks: int | None = None
    """Tasks of an array job; None: no array."""
    options: tuple[str, ...] = ()
    """Further directives of the site."""
    select: str = ""
    """PBS: the select statement."""
    tasks_per_node: int = 1
    """Slurm: processes that the job's launcher starts per node."""
    signal_seconds: int | None = None
    """Slurm: seconds before the walltime at which the job gets USR1; None: no signal."""
    may_requeue: bool = False
    """Slurm: whether a preempted job goes back to the queue."""
    modules: tuple[str, ...] = ()
    setup: tuple[str, ...] = ()
    umask: str = "022"


def parse_dependency(text: str, scheduler: str) -> tuple[Dependency, ...]:
    """Return the dependencies in `afterok:ID:ID[,afterany:ID]`.

    Raises: LaunchError for an unknown kind, an id that the scheduler cannot have given, or no id at all.
    """
    dependencies = []
    for part in text.split(","):
        kind, *ids = part.strip().split(":")
        kinds = DEPENDENCY_TYPES[scheduler]
        if kind not in kinds:
            raise LaunchError(f"--depend {text}: {kind!r} is not a kind of dependency. Use one of {', '.join(kinds)}.")
        wrong = [job for job in ids if not _JOB_ID[scheduler].fullmatch(job)]
        if not ids or wrong:
            found = f"{wrong[0]!r} is not a {scheduler} job id" if wrong else "no job id is given"
            example = "afterok:123.pbs1:124.pbs1" if scheduler == "pbs" else "afterok:123:124"
            raise LaunchError(f"--depend {text}: {found}. Job ids are needed, as in {example}.")
        dependencies.append(Dependency(kind, tuple(ids)))
    return tuple(dependencies)


def format_walltime(seconds: int) -> str:
    """Return `HH:MM:SS`, which both schedulers read alike."""
    return f"{seconds // 3600:02d}:{seconds % 3600 // 60:02d}:{seconds % 60:02d}"
