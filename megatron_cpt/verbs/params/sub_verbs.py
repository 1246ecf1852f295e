"""Params files: the architecture of a model in Megatron's words.

Example: megatron-cpt params from-hf models/Llama-3.2-1B --output params/NAME.yaml
"""

import argparse

from megatron_cpt.verbs.dispatch import add_sub_verbs, run_sub_verb

SUB_VERBS = {"from-hf": "write the params file of a Hugging Face folder: its architecture"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_sub_verbs(parser, SUB_VERBS)


def run(arguments: argparse.Namespace) -> int | None:
    return run_sub_verb("params", arguments.sub_verb, arguments.rest)
