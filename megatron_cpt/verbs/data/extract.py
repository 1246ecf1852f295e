"""Decompress documents into a mirrored tree of plain files, in parallel; tables become JSON lines.

A second run keeps the files whose sources are unchanged. `megatron-cpt tokenize` reads compressed files itself.

Example: megatron-cpt data extract --input corpora/raw --output-dir corpora/plain
"""

import argparse

from megatron_cpt.verbs.data.rewriting_arguments import add_rewriting_arguments, run_rewriting


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_rewriting_arguments(parser)


def run(arguments: argparse.Namespace) -> int | None:
    return run_rewriting(arguments, "extract", (), "fail")
