"""Run directories from a user's path: a run, a folder of runs, or a task's folder."""

import os
from collections.abc import Sequence
from pathlib import Path

from megatron_cpt.config.loading.sources import find_task, read_yaml
from megatron_cpt.errors import ConfigError

_MARKS = ("metrics.jsonl", "jobs/ledger.jsonl", "config.yaml")
"""Files of which a run directory has at least one."""
_DEPTH = 5
"""Folders between a folder of runs and a run, at most: task, params, size, variant, and one more."""


def find_runs(paths: Sequence[Path], runs_dir: Path | None = None) -> list[Path]:
    """Return the run directories that `paths` name, each once: a run, or every run below a folder or of a task's folder.

    Raises: ConfigError naming where was looked when there are none.
    """
    found: dict[Path, Path] = {}
    for path in paths:
        folder = runs_folder(path, runs_dir)
        runs = [folder] if is_run(folder) else _runs_below(folder)
        if not runs:
            where = folder if folder == path else f"{path}, {folder}"
            raise ConfigError(
                f"{where}: no run in it. A run directory has metrics.jsonl. Check the path, or train first."
            )
        for run in runs:
            found.setdefault(run.absolute(), run)
    return list(found.values())


def runs_folder(path: Path, runs_dir: Path | None = None) -> Path:
    """Return a folder of runs unchanged; for a task's folder (or its name in tasks/), return the folder of the task's
    runs."""
    if path.is_dir() and not (path / "task.yaml").is_file():
        return path
    task = find_task(path)
    stated = (read_yaml(task / "task.yaml").get("paths") or {}).get("runs_dir")
    return Path(runs_dir or stated or "runs") / task.resolve().name


def report_dir(path: Path, runs_dir: Path | None = None) -> Path:
    """Return where the report of a run, a task or a folder goes by default."""
    return runs_folder(path, runs_dir) / "report"


def is_run(path: Path) -> bool:
    """Return whether a folder is a run directory."""
    return any((path / mark).is_file() for mark in _MARKS)


def _runs_below(folder: Path) -> list[Path]:
    """Return the runs below a folder, by name, without searching inside runs."""
    runs: list[Path] = []
    for parent, names, _ in os.walk(folder):
        here = Path(parent)
        names.sort()
        if is_run(here):
            runs.append(here)
        if is_run(here) or len(here.relative_to(folder).parts) >= _DEPTH:
            names.clear()
    return runs
