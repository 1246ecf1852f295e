"""draw a one-page report of one or several stages: curves, blend, what was learned and forgotten

Reads the run directories alone (metrics.jsonl, train_data.yaml, config.yaml), so it works on a copy of them, while a
stage still trains, and on a machine without a GPU. A stage that was forked from another one (`init.from_path:
variant:NAME`) is drawn after it. Steps that were trained again after a crash are drawn once.

Example: megatron-cpt report runs/demo/demo-5m/300K/base runs/demo/demo-5m/300K/replay --output report
"""

import argparse
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directories, in the order to show")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for report.md and its charts")
    parser.add_argument("--evaluation", type=Path, metavar="FILE", help="results of `evaluate forgetting`")


def run(arguments: argparse.Namespace) -> None:
    # imported here: matplotlib takes a second to start
    from megatron_cpt.evaluate.report.markdown import write_report

    page = write_report(arguments.runs, arguments.output, arguments.evaluation)
    sys.stdout.write(f"{page}\n")
