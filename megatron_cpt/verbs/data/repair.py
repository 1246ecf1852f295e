"""Rewrite documents without the bad lines; what cannot be mended goes to OUTPUT.rejects.

Two objects on one line become two lines; byte-order marks and blank lines go; a missing last newline comes.

Example: megatron-cpt data repair --input corpora/raw --output-dir corpora/clean --compress zst
"""

import argparse

from megatron_cpt.verbs.data.rewriting_arguments import add_rewriting_arguments, run_rewriting


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_rewriting_arguments(parser)
    parser.add_argument(
        "--json-keys",
        nargs="+",
        default=["text"],
        help="keys a record needs; chat records need conversations or messages instead",
    )


def run(arguments: argparse.Namespace) -> int | None:
    return run_rewriting(arguments, "repair", tuple(arguments.json_keys), "skip")
