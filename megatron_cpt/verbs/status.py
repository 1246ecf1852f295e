"""show a run's jobs and progress: states, iteration, tokens, loss, tokens/s, time left, last checkpoint, why a job died

Reads the run's ledger and metrics and asks the scheduler's own commands. Without --task it shows every run below a folder.

Examples:
  megatron-cpt status --task tasks/demo --params demo-5m --size 300K --variant replay --watch
  megatron-cpt status --runs runs
"""

import argparse
import sys
import time
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the run's arguments and how to show it."""
    parser.add_argument("--task", type=Path, metavar="DIR", help="folder of the task, or its name in tasks/")
    parser.add_argument("--params", metavar="NAME", help="params file: a name in params/, or a path")
    parser.add_argument("--size", metavar="SIZE", help="a key of the task's sizes")
    parser.add_argument("--variant", default="main", metavar="NAME", help="a key of the task's variants (main)")
    parser.add_argument("--site", metavar="NAME", help="site file: a name in pbs/sites or slurm/sites, or a path")
    parser.add_argument("--runs", type=Path, default=Path("runs"), metavar="DIR", help="folder of runs (runs)")
    parser.add_argument("--watch", action="store_true", help="show it again every few seconds until interrupted")
    parser.add_argument("--interval", type=float, default=10, metavar="SECONDS", help="between two looks (10)")
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="settings, such as paths.runs_dir=/scratch/runs"
    )


def run(arguments: argparse.Namespace) -> int:
    """Print the table, once or again and again; return 1 when there is no run to show."""
    while True:
        text = _text(arguments)
        if arguments.watch and sys.stdout.isatty():
            sys.stdout.write("\033[H\033[2J")
        sys.stdout.write(text)
        sys.stdout.flush()
        if not arguments.watch:
            return 0 if text else 1
        time.sleep(arguments.interval)


def _text(arguments: argparse.Namespace) -> str:
    from megatron_cpt.config.loading.resolve import read_resolved
    from megatron_cpt.errors import ConfigError, CptError, storage_error
    from megatron_cpt.launch.status import status_text
    from megatron_cpt.run.directory import RunDir, run_dir
    from megatron_cpt.verbs.run_arguments import load_run

    if arguments.task:
        missing = [f"--{name}" for name in ("params", "size") if not getattr(arguments, name)]
        if missing:
            raise ConfigError(f"status: --task without {' and '.join(missing)}. They name the run. Add them.")
        config = load_run(arguments).config
        return status_text(run_dir(config), config)
    parts = []
    for ledger in sorted(arguments.runs.glob("**/jobs/ledger.jsonl")):
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
