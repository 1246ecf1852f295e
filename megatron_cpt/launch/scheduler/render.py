"""A job script from a job: one template per scheduler, whose lines without a value are left out.

The templates are `pbs/job.sh.in` and `slurm/job.sh.in`. A line whose hole has no value disappears, one whose hole has
several becomes several lines. The last line runs the job; the other lines are for the scheduler.
"""

import re
import shlex
from pathlib import Path

from megatron_cpt.config.loading.sources import CHECKOUT
from megatron_cpt.errors import LaunchError
from megatron_cpt.launch.scheduler.job import VARIABLE_NAME, Job, format_walltime

_HOLE = re.compile(r"@([A-Z_]+)@")
_PLAIN = re.compile(r"[^\s\"'\\$`@\x00-\x1f]+")


def template_path(scheduler: str) -> Path:
    """Return the template of a scheduler."""
    return CHECKOUT / scheduler / "job.sh.in"


def render_job(job: Job, scheduler: str) -> str:
    """Return the job script.

    Raises: LaunchError if a value cannot be written in a directive, which has no quoting.
    """
    holes = _directive_values(job, scheduler)
    for name, values in holes.items():
        for value in values:
            parts = value.split() if name == "OPTIONS" else [value]
            if not parts or not all(_PLAIN.fullmatch(part) for part in parts):
                raise LaunchError(
                    f"{job.stage}: {name.lower()} is {value!r}. A scheduler's directive takes no spaces, quotes or "
                    "dollar signs. Choose another name or folder."
                )
    holes |= _shell_values(job)
    lines: list[str] = []
    for line in template_path(scheduler).read_text(encoding="utf-8").splitlines():
        lines += _filled(line, holes)
    return "\n".join(lines) + "\n"


def _directive_values(job: Job, scheduler: str) -> dict[str, list[str]]:
    array = None
    if job.num_array_tasks is not None and job.num_array_tasks > 1:
        array = f"0-{job.num_array_tasks - 1}"
    values: dict[str, object] = {
        "NAME": job.name,
        "ACCOUNT": job.account,
        "QUEUE": job.queue,
        "NODES": job.nodes,
        "SELECT": job.select,
        "TASKS_PER_NODE": job.tasks_per_node,
        "WALLTIME": format_walltime(job.walltime),
        "ARRAY": array,
        "SIGNAL_SECONDS": job.signal_seconds,
        "REQUEUE": "--requeue" if job.may_requeue else "--no-requeue",
        "OUTPUT": job.log_dir / "job.out",
        "UMASK": job.umask,
    }
    filled = {name: [] if value is None else [str(value)] for name, value in values.items()}
    return {**filled, "OPTIONS": list(job.options)}


def _shell_values(job: Job) -> dict[str, list[str]]:
    for name in job.environment:
        if not VARIABLE_NAME.fullmatch(name):
            raise LaunchError(
                f"{job.stage}: environment: {name!r} is not the name of a variable. Mend it in the site file."
            )
    setup = [*job.setup, *(f"module load {shlex.quote(module)}" for module in job.modules)]
    if job.modules:  # modules read unset variables, which `set -u` would take for a mistake
        setup = ["set +u", *setup, "set -u"]
    return {
        "WORK_DIR": [shlex.quote(str(job.work_dir))],
        "SETUP": setup,
        "ENVIRONMENT": [f"export {name}={shlex.quote(value)}" for name, value in job.environment.items()],
        "COMMAND": [" \\\n    ".join(_wrapped(job.command))],
    }


def _filled(line: str, holes: dict[str, list[str]]) -> list[str]:
    names = _HOLE.findall(line)
    if not names:
        return [line]
    name = names[0]
    return [line.replace(f"@{name}@", value) for value in holes[name]]


def _wrapped(command: tuple[str, ...]) -> list[str]:
    """Return the quoted command in lines: the program, then each option with its values."""
    lines: list[str] = []
    for word in map(shlex.quote, command):
        is_program_after_options = bool(lines) and lines[-1] == "--"
        if not lines or is_program_after_options or word.startswith("--"):
            lines.append(word)
        else:
            lines[-1] += f" {word}"
    return lines
