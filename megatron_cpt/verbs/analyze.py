"""look into weights: minimum, maximum, mean and norm of every tensor

  stats   a row per tensor of a Hugging Face folder or Megatron checkpoint

How far weights moved from a base model is `megatron-cpt evaluate divergence`.

Example: megatron-cpt analyze stats runs/ja/8b/80B/main/checkpoints
"""

import argparse
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    subparsers = parser.add_subparsers(dest="analysis", required=True, metavar="ANALYSIS")
    stats = subparsers.add_parser("stats", help="a row per tensor")
    stats.add_argument("model", type=Path, metavar="MODEL", help="Hugging Face folder or Megatron checkpoint")
    stats.add_argument("--output", type=Path, metavar="FILE", help="write the statistics as JSON")


def run(arguments: argparse.Namespace) -> None:
    # imported here: torch takes seconds to start
    from megatron_cpt.evaluate.models.weights import stats_table, tensor_stats
    from megatron_cpt.files import write_json

    stats = tensor_stats(arguments.model)
    if arguments.output:
        write_json(arguments.output, {"format": 1, "tensors": [vars(found) for found in stats]})
    sys.stdout.write(stats_table(stats) + "\n")
