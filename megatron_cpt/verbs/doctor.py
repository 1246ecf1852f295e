"""Say what is missing or incompatible on this machine.

Looks at Python, package versions, GPU and driver, scheduler, host name, limits and disk, without importing torch. With
--deep it also runs a matrix product, an all-reduce of two ranks, a tokenization and a training step (about a minute).
Exit code 1 when there is a problem.

Example: megatron-cpt doctor --deep
"""

import argparse
import sys
from pathlib import Path

from megatron_cpt.launch.doctor import examine, report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"), metavar="DIR", help="where runs would go (runs)")
    parser.add_argument("--deep", action="store_true", help="also run small computations")


def run(arguments: argparse.Namespace) -> int:
    findings = examine(arguments.runs_dir)
    if arguments.deep and not any(finding.level == "problem" for finding in findings):
        # imported here: torch takes seconds
        from megatron_cpt.train.tools.selftest import run_selftest

        findings += run_selftest()
    sys.stdout.write(report(findings))
    return int(any(finding.level == "problem" for finding in findings))
