"""Group many small document files into larger ones, folder by folder or across folders, without breaking a line.

--num-files N makes N files of a whole tree; --split cuts files that are larger than the target, behind a line.

A second run keeps the files whose sources are unchanged. `megatron-cpt tokenize --shard-tokens` groups by itself.

Example: megatron-cpt data merge-files --input corpora/raw --output-dir corpora/merged --target-bytes 2B
"""

import argparse

from megatron_cpt.errors import ConfigError
from megatron_cpt.verbs.data.rewriting_arguments import add_rewriting_arguments, run_rewriting
from megatron_cpt.verbs.tokenize import parse_count_argument

_DEFAULT_BYTES = 2_000_000_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_rewriting_arguments(parser)
    parser.add_argument(
        "--target-bytes",
        type=parse_count_argument,
        help="input bytes per output file, about (default: 2B)",
    )
    parser.add_argument(
        "--num-files", type=int, metavar="N", help="instead: N files of similar size of the whole tree (per format)"
    )
    parser.add_argument("--across-folders", action="store_true", help="merge files of different folders too")
    parser.add_argument("--split", action="store_true", help="cut files that are larger than the target")


def run(arguments: argparse.Namespace) -> int | None:
    from megatron_cpt.data.cleaning.rewrite_plan import Grouping  # heavy: the readers

    if arguments.num_files is not None and (arguments.target_bytes or arguments.split):
        raise ConfigError("--num-files: says how many files there will be. Leave out --target-bytes and --split.")
    if arguments.num_files is not None and arguments.num_files < 1:
        raise ConfigError(f"--num-files {arguments.num_files}: a whole number from 1 on is needed.")
    target = None if arguments.num_files else arguments.target_bytes or _DEFAULT_BYTES
    grouping = Grouping(
        target_bytes=target,
        num_files=arguments.num_files,
        is_across_folders=arguments.across_folders,
        is_split=arguments.split,
    )
    return run_rewriting(arguments, "merge-files", (), "fail", grouping)
