"""say what a run needs before it is queued: tokens, iterations, memory per rank, disk, time, jobs, node hours

Works on a login node, without a GPU and without torch. The throughput is the one the run has measured already, or the
one that you state.

--search proposes TP, PP, CP, EP, micro-batch and recomputation for the run's nodes, the likely fastest first.

Example: megatron-cpt plan --task tasks/demo --params demo-5m --size 2M --variant base --tokens-per-second 9000
"""

import argparse
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the run's arguments and the properties of the machine."""
    from megatron_cpt.config.loading.resolve import add_run_arguments  # yaml is not needed to list the verbs

    parser.add_argument("--search", action="store_true", help="propose layouts for the run's nodes instead")
    parser.add_argument("--tokens-per-second", type=float, metavar="N", help="throughput of the whole job")
    parser.add_argument("--gpu-memory", type=float, metavar="GIB", help="memory of one GPU in GiB")
    add_run_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print the plan; return 1 when the run does not fit."""
    from megatron_cpt.data.blend.plan import check_tokenizer_rows  # numpy and the tokenizer's library
    from megatron_cpt.errors import LaunchError
    from megatron_cpt.launch.planning.plan import GIB, plan_run, plan_text
    from megatron_cpt.launch.planning.search import hardware_of, search_text
    from megatron_cpt.launch.scheduler.site import read_site
    from megatron_cpt.verbs.run_arguments import load_planned

    loaded, estimate = load_planned(arguments)
    config = loaded.config
    check_tokenizer_rows(config)
    site = read_site(arguments.site)
    gib = arguments.gpu_memory or site.gpu_memory_gib
    gpu_memory = None if gib is None else int(gib * GIB)
    if arguments.search:
        if gpu_memory is None:
            raise LaunchError("plan --search: no GPU memory. Give --gpu-memory GIB or site.gpu_memory_gib.")
        sys.stdout.write(search_text(config, gpu_memory, hardware=hardware_of(site)))
        return 0
    is_on_cpu = config.launch.scheduler == "local" and gpu_memory is None and not Path("/dev/nvidiactl").exists()
    plan = plan_run(
        config,
        tokens_per_second=arguments.tokens_per_second,
        gpu_memory_bytes=gpu_memory,
        is_fused=not is_on_cpu,
    )
    sys.stdout.write(plan_text(plan, estimate))
    return 1 if plan.fits_memory is False else 0
