"""Pack the documents of a token shard into training sequences by best fit, each apart from its neighbours.

Every document of the result is one pack of exactly --seq-length tokens, with a mask that marks starts of documents and
padding. Masked shards (prepare-chat) keep their masks; of others every token is learned. training.seq_length must equal
--seq-length. The same command again keeps what is whole.

Example: megatron-cpt data pack --input tokens/en_text_document --output tokens/en_packed_text_document --seq-length 4096
"""

import argparse
import sys
from pathlib import Path

from megatron_cpt.verbs.tokenize import parse_count_argument


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--input", type=Path, required=True, help="prefix of the shard, without .bin and .idx")
    parser.add_argument("--output", type=Path, required=True, help="prefix of the result, _<key>_document included")
    parser.add_argument("--seq-length", type=parse_count_argument, required=True, help="tokens of a pack")
    parser.add_argument(
        "--overflow",
        choices=("split", "truncate", "drop", "fail"),
        default="split",
        help="documents longer than a pack: split into pieces (default), cut, left out, or an error",
    )
    parser.add_argument(
        "--max-packs",
        type=parse_count_argument,
        help="keep so many, chosen at random over the shard: 7.5M (default: all)",
    )
    parser.add_argument(
        "--window", type=parse_count_argument, default=1 << 18, help="documents packed together (default: 262,144)"
    )
    parser.add_argument("--seed", type=int, default=42, help="order of the packs (default: 42)")


def run(arguments: argparse.Namespace) -> None:
    from megatron_cpt.data.joining.packing import PackOptions, pack_shard  # heavy: numpy

    options = PackOptions(
        seq_length=arguments.seq_length,
        overflow=arguments.overflow,
        max_packs=arguments.max_packs,
        window=arguments.window,
        seed=arguments.seed,
    )
    manifest, is_kept = pack_shard(arguments.input, arguments.output, options)
    packed = manifest["packed"]
    sys.stdout.write(
        f"{arguments.output}: {manifest['documents']:,} packs of {packed['seq_length']:,} tokens, filled to "
        f"{packed['fill']:.2%}{' (complete already)' if is_kept else ''}\n"
        f"  documents longer than a pack: {packed['split_documents']:,} split, {packed['truncated_documents']:,} cut, "
        f"{packed['dropped_documents']:,} left out; tokens left out: {packed['lost_tokens']:,}\n"
    )
