"""start a run on this machine, PBS or Slurm, after checking everything that can be checked beforehand

The scheduler is `launch.scheduler`: local (torchrun on this machine, the default), pbs or slurm (set by a site file).

Example: megatron-cpt submit train --task tasks/demo --params demo-5m --size 2M --variant base launch.gpus_per_node=2
"""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add one sub-command per stage."""
    from megatron_cpt.config.load import add_run_arguments  # yaml is not needed to list the verbs

    stages = parser.add_subparsers(dest="stage", required=True, metavar="STAGE")
    train = stages.add_parser("train", help="train one stage, or continue it from its last checkpoint")
    add_run_arguments(train)


def run(arguments: argparse.Namespace) -> int:
    """Submit the stage; return its exit code (local) or 0 once it is queued."""
    from megatron_cpt.config.load import load_from_arguments
    from megatron_cpt.launch.submit import submit_train

    return submit_train(load_from_arguments(arguments), arguments)
