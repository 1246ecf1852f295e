"""Group many small document files into larger ones, folder by folder, without breaking a line.

A second run keeps the files whose sources are unchanged. `megatron-cpt tokenize --shard-tokens` groups by itself.

Example: megatron-cpt data merge-files --input corpora/raw --output-dir corpora/merged --target-bytes 2B
"""

import argparse

from megatron_cpt.verbs.data.rewriting_arguments import add_rewriting_arguments, run_rewriting
from megatron_cpt.verbs.tokenize import parse_count_argument


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_rewriting_arguments(parser)
    parser.add_argument(
        "--target-bytes",
        type=parse_count_argument,
        default=2_000_000_000,
        help="input bytes per output file, about (default: 2B)",
    )


def run(arguments: argparse.Namespace) -> int | None:
    return run_rewriting(arguments, "merge-files", (), "fail", arguments.target_bytes)
