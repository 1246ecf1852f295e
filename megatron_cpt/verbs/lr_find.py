"""sweep the learning rate once from the stage's start and suggest a peak

A range test (Smith, arXiv:1506.01186): the rate rises exponentially from --lr-min to --lr-max over --iterations steps, from the
weights that the stage would start with. No checkpoint is written and no run is touched: the result is `lr_find/` in the run
directory with `suggestion.json`, `losses.csv` and `losses.png`. `submit lr-find` starts it on every rank that training would
have, here or through PBS or Slurm; by hand torchrun does. The suggestion is the smaller of the rate of steepest descent and a tenth of the rate
with the lowest loss. It is where to begin a sweep, not the end of one: for continual pre-training start at or below it.

Examples:
  megatron-cpt submit lr-find --iterations 200 --task tasks/ja --params 8b --size 50B launch.gpus_per_node=8
  torchrun --nproc-per-node 8 -m megatron_cpt lr-find --task tasks/ja --params 8b --size 50B launch.gpus_per_node=8
"""

import argparse
import os
import sys

from megatron_cpt.config.loading.resolve import add_run_arguments
from megatron_cpt.verbs.run_arguments import load_run


def add_range_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the sweep's arguments."""
    parser.add_argument("--lr-min", type=float, default=1e-7, metavar="LR", help="rate of the first step (1e-7)")
    parser.add_argument("--lr-max", type=float, default=1.0, metavar="LR", help="rate of the last step (1)")
    parser.add_argument("--iterations", type=int, default=100, metavar="N", help="steps (100)")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the run's arguments and the sweep's."""
    add_range_arguments(parser)
    add_run_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run the test; rank 0 prints what it suggests. Return 1 when the loss never fell."""
    loaded = load_run(arguments)
    # imported here: torch and megatron take seconds
    from megatron_cpt.train.tools.lr_finder import find_learning_rate, suggested_rate

    test = find_learning_rate(loaded, arguments.lr_min, arguments.lr_max, arguments.iterations)
    if os.environ.get("RANK", "0") != "0":
        return 0
    try:
        steepest, tenth = suggested_rate(test.rates, test.losses)
    except ValueError as problem:
        sys.stdout.write(f"no suggestion: {problem}; see {test.folder / 'losses.csv'}\n")
        return 1
    sys.stdout.write(
        f"suggested peak learning rate {min(steepest, tenth):.2e} (steepest descent at {steepest:.2e}, a tenth of the rate "
        f"with the lowest loss {tenth:.2e}); see {test.folder / 'losses.png'}\n"
    )
    return 0
