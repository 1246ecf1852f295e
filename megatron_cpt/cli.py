"""The one command, `megatron-cpt VERB ...`: a table of verbs, each a module in `megatron_cpt.verbs`.

A verb module has `add_arguments(parser)` and `run(arguments) -> int | None`; its docstring's first line is
the verb's help and the rest, with an example, its description. Only the chosen verb's module is imported, and
verb modules import their library function inside `run`, so that `--help` stays instant and needs no torch.
"""

import argparse
import logging
import os
import sys

from megatron_cpt import __version__
from megatron_cpt.errors import CptError, storage_error
from megatron_cpt.log import configure_logging
from megatron_cpt.verbs.dispatch import Parser, load_verb, parse_words

VERBS = {
    "init": "write a task from a model, some text and a number of tokens",
    "params": "write the params file of a Hugging Face model",
    "doctor": "say what is missing or incompatible on this machine",
    "train": "train one stage; what each rank of a job runs (see submit)",
    "plan": "say what a run needs before it is queued: tokens, iterations, memory per rank, disk, time, node hours",
    "preflight": "measure every rank of a job in seconds before it trains, and name the nodes that are not fit",
    "submit": "start a run on this machine, PBS or Slurm, after checking everything that can be checked beforehand",
    "lr-find": "sweep the learning rate once from the stage's start and suggest a peak",
    "fork": "begin a branch of a run from any kept iteration: a decay to a usable model, or another stage",
    "status": "show a run's jobs and progress, and why a job waits or died",
    "tokenize": "turn documents into .bin/.idx token files, restartable, with a manifest for each",
    "data": "validate, repair, audit, trace, merge, deduplicate, sample and decontaminate documents",
    "convert": "convert models between Hugging Face folders and Megatron checkpoints, on a CPU, and prove it",
    "soup": "merge models: a run's last checkpoints, several runs, or any Hugging Face folders",
    "checkpoint": "list, verify, inspect, compare, prune, protect, copy, adopt checkpoints",
    "hub": "push models to the Hugging Face Hub, fetch models and data sets, resumable",
    "evaluate": "bits per byte, learned and forgotten, samples, weight divergence of models",
    "analyze": "statistics of every tensor of a model",
    "advise": "judge a stage by its metrics and say what the CPT cookbook would do next",
    "report": "draw a one-page report of one or several stages",
    "completion": "write the completion script of bash, zsh or fish",
    "show-config": "print the resolved configuration of a run, where each value comes from, or Megatron-LM flags",
    "blend": "plan what a stage reads: lists, budgets, mixes, replay and index caches",
}


def main(argv: list[str] | None = None) -> None:
    """Run one verb and leave with its exit code: 0 done, 2 an error the user can fix, 130 interrupted."""
    argv = sys.argv[1:] if argv is None else argv
    parser = Parser(
        prog="megatron-cpt",
        description="Continual pre-training on Megatron-Core.",
        epilog="verbs:\n"
        + "\n".join(f"  {verb:<20} {text}" for verb, text in VERBS.items())
        + "\n\nmegatron-cpt VERB --help explains a verb and shows an example.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"megatron-cpt {__version__}")
    parser.add_argument("verb", choices=list(VERBS), metavar="VERB", help="what to do")
    arguments = parser.parse_args(argv[:1])
    sys.exit(_run_verb(arguments.verb, argv[1:]))


def _run_verb(verb: str, argv: list[str]) -> int:
    module, parser = load_verb(verb, f"megatron-cpt {verb}")
    arguments = parse_words(parser, argv)
    configure_logging(logging.WARNING if arguments.quiet else logging.INFO)
    try:
        return module.run(arguments) or 0
    except CptError as error:
        sys.stderr.write(f"megatron-cpt {verb}: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write(f"megatron-cpt {verb}: interrupted\n")
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as problem:
        sys.stderr.write(f"megatron-cpt {verb}: {storage_error(problem)}\n")
        return 2
