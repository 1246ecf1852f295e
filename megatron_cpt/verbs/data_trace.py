"""Say which file and line a tokenized document came from.

Documents and tokens are counted from 0, lines from 1.

Example: megatron-cpt data trace tokens/D1/a_text_document --document 1234 --tokenizer models/base
"""

import argparse
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prefix", type=Path, help="prefix of the shard (.bin and .idx are left out)")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--document", type=int, nargs="+", help="numbers of documents")
    what.add_argument("--token", type=int, nargs="+", help="positions of tokens in the shard")
    parser.add_argument("--tokenizer", type=Path, help="show the beginning of the text, decoded by this tokenizer")


def run(arguments: argparse.Namespace) -> int | None:
    # numpy and the tokenizer libraries are slow to import; --help must not wait for them
    from megatron_cpt.data.tokenizer import load_tokenizer
    from megatron_cpt.data.trace import trace_documents, trace_token

    tokenizer = load_tokenizer(arguments.tokenizer) if arguments.tokenizer else None
    if arguments.document is not None:
        origins = [origin for number in arguments.document for origin in trace_documents(arguments.prefix, number)]
    else:
        origins = [trace_token(arguments.prefix, position) for position in arguments.token]
    for origin in origins:
        sys.stdout.write(f"{origin}\n")
        if tokenizer:
            sys.stdout.write(f"  {tokenizer.decode(origin.ids[:60])!r}\n")
    return 0
