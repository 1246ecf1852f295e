"""Plan what a stage reads: lists, budgets, mixes, replay and index caches.

Each sub-verb is a module `megatron_cpt.verbs.blend.NAME` with the same two functions as a verb.

Example: megatron-cpt blend plan --task tasks/demo --params demo-5m --size 8M
"""

import argparse

from megatron_cpt.verbs.dispatch import add_sub_verbs, run_sub_verb

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
    add_sub_verbs(parser, SUB_VERBS)


def run(arguments: argparse.Namespace) -> int | None:
    return run_sub_verb("blend", arguments.sub_verb, arguments.rest)
