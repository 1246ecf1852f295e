"""show a run's jobs and progress: states, iteration, tokens, loss, tokens/s, time left, last checkpoint, why a job died

Reads the run's ledger and metrics and asks the scheduler's own commands. Without --task it shows every run below a folder.

Examples:
  megatron-cpt status --task tasks/demo --params demo-5m --size 300K --variant replay --watch
  megatron-cpt status runs/demo/demo-5m/300K/replay
  megatron-cpt status --runs runs
"""

import argparse
import sys
import time
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the run's arguments and how to show it."""
    from megatron_cpt.config.loading.resolve import add_run_arguments  # yaml is not needed to list the verbs

    add_run_arguments(parser)
    parser.add_argument("--runs", type=Path, metavar="DIR", help="folder of runs to show, without a task (runs)")
    parser.add_argument("--watch", action="store_true", help="show it again every few seconds until interrupted")
    parser.add_argument("--interval", type=float, default=10, metavar="SECONDS", help="between two looks (10)")


def run(arguments: argparse.Namespace) -> int:
    """Print the table, once or again and again; return 1 when there is no run to show."""
    while True:
        text = _text(arguments)
        if arguments.watch and sys.stdout.isatty():
            sys.stdout.write("\033[H\033[2J")
        sys.stdout.write(text)
        sys.stdout.flush()
        if not text:
            sys.stderr.write(
                f"megatron-cpt status: no run below {_folder(arguments)}. Train first, or name --runs DIR.\n"
            )
        if not arguments.watch:
            return 0 if text else 1
        time.sleep(arguments.interval)


def _folder(arguments: argparse.Namespace) -> Path | None:
    """Return the folder whose runs are shown; None where one run is named."""
    from megatron_cpt.config.loading.naming import is_run_directory

    words = [word for word in arguments.overrides if "=" not in word]
    if arguments.runs is None and len(words) == 1 and arguments.task is None:
        path = Path(words[0])
        is_folder = path.is_dir() and not is_run_directory(path) and not (path / "task.yaml").is_file()
        return path if is_folder else None
    return None if arguments.task else arguments.runs or Path("runs")


def _text(arguments: argparse.Namespace) -> str:
    from megatron_cpt.config.loading.resolve import read_resolved
    from megatron_cpt.errors import CptError, storage_error
    from megatron_cpt.launch.status import status_text
    from megatron_cpt.run.directory import RunDir, run_dir
    from megatron_cpt.verbs.run_arguments import load_run

    folder = _folder(arguments)
    if folder is None:
        config = load_run(arguments).config
        return status_text(run_dir(config), config)
    parts = []
    for ledger in sorted(folder.glob("**/jobs/ledger.jsonl")):
        run = RunDir(ledger.parents[1])
        try:
            known = read_resolved(run.config_path)
        except (CptError, OSError):  # no job has trained yet
            known = None
        try:
            parts.append(status_text(run, known))
        except (CptError, OSError) as problem:  # of one run, which must not hide the others
            said = storage_error(problem) if isinstance(problem, OSError) else problem
            parts.append(f"{run.path}\nits state cannot be told: {said}\n")
    return "\n".join(parts)
