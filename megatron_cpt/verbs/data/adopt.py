"""Adopt token shards that another tool wrote: check them and write the manifest a blend asks for.

Checked are the sizes, that no id lies outside of the tokenizer's vocabulary, and that every document ends with the
end-of-document id. --count-bytes decodes every document, which bits per byte of validation sets need.

Example: megatron-cpt data adopt tokenized/ --tokenizer tokenizers/llm-jp-v3
"""

import argparse
import sys
from pathlib import Path

from megatron_cpt.errors import DataError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("inputs", nargs="+", help="folders, prefixes or globs of .bin/.idx pairs")
    parser.add_argument("--tokenizer", type=Path, required=True, help="the tokenizer that made them")
    parser.add_argument("--eod-token", help="end-of-document token, where the tokenizer's eos_token is not the one")
    parser.add_argument("--count-bytes", action="store_true", help="decode every document to count its bytes")
    parser.add_argument("--without-eod", action="store_true", help="accept documents without an end-of-document id")


def run(arguments: argparse.Namespace) -> None:
    from megatron_cpt.data.shards.adopt import adopt, check_adopted  # heavy: numpy and the tokenizer library
    from megatron_cpt.data.shards.discovery import find_shards
    from megatron_cpt.data.shards.indexed import manifest_path
    from megatron_cpt.data.tokenizer.interface import check_reading, load_tokenizer

    prefixes, problems = find_shards(arguments.inputs, Path())
    if problems:
        raise DataError(" ".join(problems))
    tokenizer = load_tokenizer(arguments.tokenizer, arguments.eod_token)
    check_reading(tokenizer)
    for prefix in map(Path, prefixes):
        if manifest_path(prefix).exists():
            check_adopted(prefix, tokenizer)
            sys.stdout.write(f"{prefix}: has its manifest already\n")
            continue
        found = adopt(prefix, tokenizer, count_bytes=arguments.count_bytes, needs_eod=not arguments.without_eod)
        sys.stdout.write(f"{prefix}: {found['documents']:,} documents, {found['tokens']:,} tokens\n")
