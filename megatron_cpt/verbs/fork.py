"""begin a branch of a run from any kept iteration: a decay to a usable model, or another stage

The checkpoint is verified and protected from retention, the branch's configuration is checked, and the command that starts
it is printed; --submit runs it. Nothing is written into tasks/. NAME is a variant of the task, or any label: then the branch
is the source's variant, with its command-line settings, in a run directory of its own (VARIANT+NAME).

A decay branch of the same data reads on where the run stood, sample by sample; another stage begins at sample 0 of an
order of its own. --data selects one for any branch.

Examples:
  megatron-cpt fork --run runs/ja/8b/50B/main --iteration 10000 --to-variant decay-10k --decay "5B tokens"
  megatron-cpt fork --run runs/ja/8b/50B/main --to-variant stage2 --submit launch.nodes=4
"""

import argparse
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", type=Path, required=True, metavar="DIR", help="run directory of the source")
    parser.add_argument("--iteration", type=int, metavar="N", help="a kept iteration (the newest good checkpoint)")
    parser.add_argument("--to-variant", required=True, metavar="NAME", help="a variant of the task, or a label")
    parser.add_argument("--task", metavar="DIR", help="folder of the task, where it is not tasks/<task>")
    parser.add_argument("--decay", metavar="LENGTH", help="cool down over this: 500, '5B tokens', '1M samples', 0.1")
    parser.add_argument(
        "--load", choices=("full", "weights"), default="full", help="optimizer state too, or weights only (full)"
    )
    parser.add_argument(
        "--data", choices=("continue", "own"), help="read on in the run's order, or in one of its own (see above)"
    )
    parser.add_argument("--submit", action="store_true", help="start it as `megatron-cpt submit train` does")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings of the branch")


def run(arguments: argparse.Namespace) -> int:
    """Print the command, or with --submit run it and return its exit code."""
    from megatron_cpt.checkpoint.torch_dist.retention import read_protected, write_protected
    from megatron_cpt.train.tools.fork import plan_fork
    from megatron_cpt.verbs.dispatch import load_verb

    fork = plan_fork(
        arguments.run,
        arguments.to_variant,
        arguments.overrides,
        iteration=arguments.iteration,
        task=arguments.task,
        decay=arguments.decay,
        load=arguments.load,
        data=arguments.data,
    )
    root = fork.source.parent
    write_protected(root, read_protected(root) | {fork.iteration})
    sys.stdout.write(f"{fork.command}\n")
    sys.stderr.write(f"from {fork.source} (verified, protected) into {fork.target.path}\n")
    if not arguments.submit:
        return 0
    module, parser = load_verb("submit", "megatron-cpt submit")
    code: int = module.run(parser.parse_args(["train", *fork.arguments]))
    return code
