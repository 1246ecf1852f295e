"""Train one stage; each rank of a job runs this.

`megatron-cpt submit train` starts it through a scheduler. By hand, on one machine:

Example:
  torchrun --nproc-per-node 2 -m megatron_cpt train --task tasks/demo --params demo-5m --size 2M --variant base \\
      parallel.tensor_model_parallel_size=2 launch.gpus_per_node=2

The run continues from its last checkpoint. SIGTERM or SIGUSR1, `touch RUN/stop_now` and the walltime save and end it.
"""

import argparse

from megatron_cpt.config.loading.resolve import add_run_arguments
from megatron_cpt.verbs.run_arguments import load_run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the run's arguments."""
    add_run_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Train and return 0, also when the run was asked to stop: metrics.jsonl holds the reason."""
    loaded = load_run(arguments)
    # imported here: torch and megatron take seconds
    from megatron_cpt.train.stage.loop import train

    train(loaded)
    return 0
