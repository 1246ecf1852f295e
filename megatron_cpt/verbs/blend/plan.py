"""Show what a stage takes from each corpus, in tokens, epochs and samples; refuse what cannot be.

The stage's length is the budget. With --write the data list goes to `train_data.yaml` in the run directory.

Example: megatron-cpt blend plan --task tasks/demo --params demo-5m --size 8M --variant replay
"""

import argparse
import sys

from megatron_cpt.config.loading.resolve import add_run_arguments
from megatron_cpt.errors import DataError
from megatron_cpt.verbs.run_arguments import load_run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_arguments(parser)
    parser.add_argument("--write", action="store_true", help="write the list into the run directory")


def run(arguments: argparse.Namespace) -> None:
    from megatron_cpt.data.blend.plan import plan_blend  # heavy: numpy
    from megatron_cpt.data.blend.start_position import continued_order
    from megatron_cpt.data.lists.data_list import read_data_list, write_data_list
    from megatron_cpt.run.directory import run_dir
    from megatron_cpt.run.progress import last_checkpoint

    config = load_run(arguments).config
    run = run_dir(config)
    path = run.data_list_path
    plan = plan_blend(config, path, continued_order(config))
    sys.stdout.write(plan.table())
    if not arguments.write:
        return
    if path.exists() and last_checkpoint(run) and list(read_data_list(path)) != list(plan.entries):
        raise DataError(
            f"{path}: the run has begun with this list, and the plan is another one. Give the plan another --variant."
        )
    write_data_list(path, plan.entries)
    sys.stdout.write(f"written: {path}\n")
