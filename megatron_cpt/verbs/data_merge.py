"""Join token shards into one: indexes are rewritten, bytes are moved by the kernel.

Without --input the parts `<name>-00000-of-00008_<key>_document` of `tokenize --shard I/N` are taken, all of them.

Example: megatron-cpt data merge --output-prefix tokens/D1_text_document
"""

import argparse
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output-prefix", type=Path, required=True, help="prefix of the result, _<key>_document included"
    )
    parser.add_argument("--input", nargs="+", help="prefixes of shards, folders or globs of them, in this order")


def run(arguments: argparse.Namespace) -> int | None:
    # numpy is slow to import; --help must not wait for it
    from megatron_cpt.data.audit import shard_prefixes
    from megatron_cpt.data.merge import find_parts, merge_shards

    prefixes = shard_prefixes(arguments.input) if arguments.input else find_parts(arguments.output_prefix)
    manifest = merge_shards(prefixes, arguments.output_prefix)
    sys.stdout.write(
        f"{arguments.output_prefix}: {len(prefixes)} shards, {manifest['documents']:,} documents, "
        f"{manifest['tokens']:,} tokens\n"
    )
    return 0
