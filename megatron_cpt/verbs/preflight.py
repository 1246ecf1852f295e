"""measure every rank of a job in seconds before it trains, and name the nodes that are not fit

Each rank multiplies matrices, writes a file, reads its clock, memory and versions; all of them reduce a tensor. A node
far from the others is named, noted in <run>/jobs/excluded_nodes.txt, and the exit code is 5. Jobs run this first if the
site file contains `preflight: true`; to run it on one machine:

Example: torchrun --nproc-per-node 2 -m megatron_cpt preflight --run-dir runs/demo/demo-5m/300K/base
"""

import argparse
import os
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the output folder and the expected values."""
    parser.add_argument("--run-dir", type=Path, required=True, metavar="DIR", help="run directory")
    parser.add_argument("--gpus-per-node", type=int, default=1, metavar="N", help="GPUs that a node should have (1)")
    parser.add_argument("--device", choices=("cuda", "xpu", "cpu"), help="what every rank must find (launch.device)")


def run(arguments: argparse.Namespace) -> int:
    """Measure; rank 0 prints the table and notes bad nodes; return 5 on every rank when there is one."""
    from megatron_cpt.launch.node.preflight import BAD_NODES_EXIT_CODE, add_excluded, bad_nodes, report_text

    # imported here: torch takes seconds
    from megatron_cpt.train.tools.preflight import run_preflight

    reports, bandwidth = run_preflight(arguments.run_dir)
    bad = bad_nodes(reports, gpus_per_node=arguments.gpus_per_node, device=arguments.device)
    if os.environ.get("RANK", "0") == "0":
        sys.stdout.write(report_text(reports, bandwidth, bad))
        if bad:
            add_excluded(arguments.run_dir / "jobs", bad)
    return BAD_NODES_EXIT_CODE if bad else 0
