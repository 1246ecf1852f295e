"""Join token shards into one: indexes are rewritten, bytes are moved by the kernel.

Without --input the parts `<name>-00000-of-00008_<key>_document` of `tokenize --shard I/N` are taken, all of them. To
resume a killed merge, run the command again; a finished merge is unchanged.

Example: megatron-cpt data merge --output-prefix tokens/D1_text_document
"""

import argparse
import sys
from pathlib import Path

from megatron_cpt.errors import DataError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output-prefix", type=Path, required=True, help="prefix of the result, _<key>_document included"
    )
    parser.add_argument("--input", nargs="+", help="prefixes of shards, folders or globs of them, in this order")
    parser.add_argument(
        "--remove-inputs", action="store_true", help="remove the joined shards when the result is whole"
    )
    parser.add_argument("--replace", action="store_true", help="let an older result of other documents give way")


def run(arguments: argparse.Namespace) -> int | None:
    # numpy is slow to import; --help must not wait for it
    from megatron_cpt.data.audit.shards import shard_prefixes
    from megatron_cpt.data.joining.merge import find_parts, merge_shards, remove_shards
    from megatron_cpt.data.shards.indexed import manifest_path, read_shard_manifest

    output = arguments.output_prefix
    try:
        prefixes = shard_prefixes(arguments.input) if arguments.input else find_parts(output)
    except DataError:
        if not (arguments.remove_inputs and manifest_path(output).exists()):
            raise
        prefixes = []  # removed by the same command before
    manifest = merge_shards(prefixes, output, replace=arguments.replace) if prefixes else read_shard_manifest(output)
    if arguments.remove_inputs:
        remove_shards(prefixes)
    sys.stdout.write(
        f"{output}: {len(prefixes)} shards, {manifest['documents']:,} documents, {manifest['tokens']:,} tokens\n"
    )
    return 0
