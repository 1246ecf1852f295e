"""sweep the learning rate once from the stage's start and suggest a peak

A range test (Smith, arXiv:1506.01186): the rate rises exponentially from --min to --max over --iterations steps, from the
weights that the stage would start with. No checkpoint is written and no run is touched: the result is `lr_find/losses.csv`
and `losses.png` in the run directory. The suggestion is the smaller of the rate of steepest descent and a tenth of the rate
with the lowest loss. It is where to begin a sweep, not the end of one: for continual pre-training start at or below it.

Example:
  torchrun --nproc-per-node 8 -m megatron_cpt lr-find --task tasks/ja --params 8b --size 50B --iterations 200
"""

import argparse
import os
import sys

from megatron_cpt.config.load import add_run_arguments
from megatron_cpt.data.epochs import load_run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the run's arguments and the sweep's."""
    parser.add_argument("--min", type=float, default=1e-7, metavar="LR", help="rate of the first step (1e-7)")
    parser.add_argument("--max", type=float, default=1.0, metavar="LR", help="rate of the last step (1)")
    parser.add_argument("--iterations", type=int, default=100, metavar="N", help="steps (100)")
    add_run_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run the test; rank 0 prints what it suggests. Return 1 when the loss never fell."""
    loaded = load_run(arguments)
    # imported here: torch and megatron take seconds
    from megatron_cpt.train.lr_finder import find_learning_rate, suggested_rate

    test = find_learning_rate(loaded, arguments.min, arguments.max, arguments.iterations)
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
