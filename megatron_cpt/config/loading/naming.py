"""Which run a command line means: --task --params --size --variant, what of them is left out, or a run directory.

A word without `=` names the task or the run where --task is absent. Params and size are optional if there is only one.
"""

import argparse
from pathlib import Path

from megatron_cpt.config.loading.sources import find_task, read_yaml, shown
from megatron_cpt.errors import ConfigError

RESOLVED = "config.yaml"
"""A run's own configuration, in its directory."""


def name_run(arguments: argparse.Namespace) -> None:
    """State in `arguments` what names the run: task, params, size and variant.

    Raises: ConfigError when something is missing and there is not exactly one to choose.
    """
    words = [word for word in arguments.overrides if "=" not in word]
    if arguments.task is None:
        if len(words) != 1:
            found = f"{' '.join(words)}: {len(words)} words" if words else "the command line names no task"
            raise ConfigError(f"{found}. One task's folder or run directory is needed. Add --task DIR.")
        arguments.task = Path(words[0])
        arguments.overrides = [word for word in arguments.overrides if word is not words[0]]
    if is_run_directory(arguments.task):
        own = read_yaml(arguments.task / RESOLVED)
        for name in ("params", "size", "variant", "site"):
            if getattr(arguments, name) not in (None, own.get(name)):
                raise ConfigError(
                    f"{arguments.task}: a run directory, and --{name}. The run has its own. Leave it out."
                )
            setattr(arguments, name, own.get(name))
        return
    task = find_task(arguments.task)
    arguments.params = arguments.params or _only_params(task)
    arguments.size = arguments.size or _only_size(task)
    arguments.variant = arguments.variant or "main"


def is_run_directory(path: Path) -> bool:
    """Return whether a path is a run's directory: it has the run's configuration and no task file."""
    return (path / RESOLVED).is_file() and not (path / "task.yaml").is_file()


def _only_params(task: Path) -> str:
    known = sorted(path.stem for path in (task / "params").glob("*.yaml"))
    if len(known) != 1:
        found = (
            f"{shown(task)}/params has {', '.join(known)}" if known else f"{shown(task)} has no params file of its own"
        )
        raise ConfigError(f"--params: not given, and {found}. Name one: --params NAME.")
    return known[0]


def _only_size(task: Path) -> str:
    sizes = read_yaml(task / "task.yaml").get("sizes") or {}
    known = [str(name) for name in sizes] if isinstance(sizes, dict) else []
    if len(known) != 1:
        raise ConfigError(
            f"--size: not given, and {shown(task / 'task.yaml')} has the sizes {', '.join(known) or '(none)'}. "
            "Name one: --size SIZE."
        )
    return known[0]
