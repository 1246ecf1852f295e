"""judge a stage by its metrics and print what the continual pre-training cookbook would do next, with the commands

Is the training loss coming back to where the stage before was heading? Is the old data's held-out loss back at its value
before the first step? Is the new data learned? Where not, the next rung of the ladder is named: more replay, re-warm to
another peak, fork earlier, buffer mix, decay first. The commands start a variant `NAME+LABEL`, a run of its own, with
settings that win over the task's; nothing is edited and nothing is started. docs/cookbook.md explains measure and ladder.

Example: megatron-cpt advise runs/demo/demo-5m/300K/no-replay
"""

import argparse
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory of the stage")
    parser.add_argument("--previous", type=Path, metavar="RUN", help="the stage before (default: from init.from_path)")
    parser.add_argument(
        "--old", action="append", default=[], metavar="CORPUS", help="data not to forget (default: the stage before's)"
    )
    parser.add_argument(
        "--tolerance", type=float, default=0.02, metavar="FRACTION", help="distance that counts as recovered (0.02)"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the numbers as JSON too")


def run(arguments: argparse.Namespace) -> None:
    # imported here: the numbers of a run's data list need numpy
    from megatron_cpt.evaluate.advice.judge import advice_json, advice_text, advise
    from megatron_cpt.files import write_json

    advice = advise(arguments.run, arguments.previous, arguments.old, arguments.tolerance)
    if arguments.output:
        write_json(arguments.output, advice_json(advice))
    sys.stdout.write(advice_text(advice))
