"""say what a run needs before it is queued: tokens, iterations, memory per rank, disk, time, jobs, node hours

Works on a login node, without a GPU and without torch. The throughput is the one the run has measured already, or the
one that you state.

Example: megatron-cpt plan --task tasks/demo --params demo-5m --size 2M --variant base --tokens-per-second 9000
"""

import argparse
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the run's arguments and what is known of the machine."""
    from megatron_cpt.config.load import add_run_arguments  # yaml is not needed to list the verbs

    parser.add_argument("--tokens-per-second", type=float, metavar="N", help="throughput of the whole job")
    parser.add_argument("--gpu-memory", type=float, metavar="GIB", help="memory of one GPU in GiB")
    add_run_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print the plan; return 1 when the run does not fit."""
    from megatron_cpt.config.load import load_from_arguments
    from megatron_cpt.launch.plan import GIB, plan_run, plan_text

    config = load_from_arguments(arguments).config
    gpu_memory = None if arguments.gpu_memory is None else int(arguments.gpu_memory * GIB)
    is_on_cpu = config.launch.scheduler == "local" and gpu_memory is None and not Path("/dev/nvidiactl").exists()
    plan = plan_run(
        config,
        tokens_per_second=arguments.tokens_per_second,
        gpu_memory_bytes=gpu_memory,
        is_fused=not is_on_cpu,
    )
    sys.stdout.write(plan_text(plan))
    return 1 if plan.fits_memory is False else 0
