"""Show what a stage takes from each corpus, in tokens, epochs and samples; refuse what cannot be.

The stage's length is the budget. With --write the data list goes to `train_data.yaml` in the run directory.

Example: megatron-cpt blend plan --task tasks/demo --params demo-5m --size 8M --variant replay
"""

import argparse
import sys

from megatron_cpt.config.load import add_run_arguments
from megatron_cpt.data.epochs import load_run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_arguments(parser)
    parser.add_argument("--write", action="store_true", help="write the list into the run directory")


def run(arguments: argparse.Namespace) -> None:
    from megatron_cpt.data.blend import plan_blend  # heavy: numpy
    from megatron_cpt.data.datalist import write_data_list
    from megatron_cpt.launch.parent_order import stage_order
    from megatron_cpt.launch.run_dir import run_dir

    config = load_run(arguments).config
    plan = plan_blend(config, order=stage_order(config))
    sys.stdout.write(plan.table())
    if arguments.write:
        path = run_dir(config).data_list_path
        write_data_list(path, plan.entries)
        sys.stdout.write(f"written: {path}\n")
