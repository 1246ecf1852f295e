"""Plan what a stage reads: lists, budgets, mixes, replay and index caches.

Each sub-verb is a module `megatron_cpt.verbs.blend_NAME` with the same two functions as a verb.

Example: megatron-cpt blend plan --task tasks/demo --params demo-5m --size 8M
"""

import argparse
import importlib

SUB_VERBS = {
    "plan": "show what a stage takes from each corpus, in tokens, epochs and samples",
    "list": "list the token shards below folders, with their exact token counts",
    "convert": "write a data list in another format",
    "rescale": "turn available tokens and a budget into the list a run draws, by rules",
    "mix": "mix data lists by global weights, as AuroraGPT's mix_datasets.py, exactly",
    "replay": "show a replay buffer, plan a stage from it, or append a finished stage",
    "build-index": "build the index cache of a stage ahead of training",
    "formats": "show the formats of data lists",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = "sub-verbs:\n" + "\n".join(f"  {name:<20} {text}" for name, text in SUB_VERBS.items())
    parser.add_argument("sub_verb", choices=list(SUB_VERBS), metavar="SUB_VERB", help="what to do")
    parser.add_argument("rest", nargs=argparse.REMAINDER, help="arguments of the sub-verb")


def run(arguments: argparse.Namespace) -> int | None:
    name = arguments.sub_verb
    module = importlib.import_module(f"megatron_cpt.verbs.blend_{name.replace('-', '_')}")
    summary, _, description = (module.__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        prog=f"megatron-cpt blend {name}",
        description=f"{summary}\n{description}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    return module.run(parser.parse_args(arguments.rest))
