"""draw a report of a run, a task or a folder of runs: one self-contained page, a Markdown page and its charts

`report.html` opens by double click, without a network: curves with zoom and hover, held-out text, what was learned and
forgotten, blend, jobs, checkpoints, settings with their origins. A run rewrites its own, RUN/report/report.html, at each
evaluation. `report.md` and its PNG charts show the same for print.

Reads the run directories alone (metrics.jsonl, train_data.yaml, config.yaml), so it works on a copy of them, while a
stage still trains, and on a machine without a GPU. A stage that was forked from another one (`init.from_path:
variant:NAME`) is drawn after it. Steps that were trained again after a crash are drawn once.

Examples:
  megatron-cpt report runs/demo/demo-5m/300K/base runs/demo/demo-5m/300K/replay --output report
  megatron-cpt report tasks/demo
  megatron-cpt report runs
"""

import argparse
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="run directories in the order to show, folders of them, or a task's folder (its runs)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="folder for the pages and charts (report, in the run or folder named)",
    )
    parser.add_argument("--evaluation", type=Path, metavar="FILE", help="results of `evaluate forgetting`")
    parser.add_argument(
        "--samples", type=Path, action="append", default=[], metavar="FILE", help="results of `evaluate generate`"
    )
    parser.add_argument(
        "--runs-dir",
        type=Path,
        metavar="DIR",
        help="where the runs of a task's folder are (its paths.runs_dir, or runs)",
    )


def run(arguments: argparse.Namespace) -> None:
    from megatron_cpt.errors import ConfigError
    from megatron_cpt.evaluate.page.build import write_page
    from megatron_cpt.run.find import find_runs, report_dir

    paths = find_runs(arguments.runs, arguments.runs_dir)
    output = arguments.output
    if output is None:
        if len(arguments.runs) > 1:
            raise ConfigError(
                "report: several runs and no --output. A folder for their page is needed. Add --output DIR."
            )
        output = report_dir(arguments.runs[0], arguments.runs_dir)
    # imported here: matplotlib takes a second to start
    from megatron_cpt.evaluate.report.markdown import write_report

    page = write_report(paths, output, arguments.evaluation)
    html = write_page(
        paths, output / "report.html", evaluation_path=arguments.evaluation, sample_paths=arguments.samples
    )
    sys.stdout.write(f"{page}\n{html}\n")
