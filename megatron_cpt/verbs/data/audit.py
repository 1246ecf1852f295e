"""Prove that token files hold exactly their source documents; exit code 1 if one does not.

Counts, sums, lines and ends are checked for all documents; ids and text for a sample, by the reference tokenizer. A single
changed token in a document that is not sampled is found with --samples all only, which takes as long as tokenizing with the
reference tokenizer.

Example: megatron-cpt data audit --input tokens/D1 --tokenizer models/base
"""

import argparse
import os
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--input", nargs="+", required=True, help="prefixes of shards, folders or globs of them")
    parser.add_argument("--tokenizer", type=Path, required=True, help="the tokenizer that made them")
    parser.add_argument("--eod-token", help="end-of-document token, as given to tokenize")
    parser.add_argument(
        "--samples",
        type=_samples,
        default=200,
        help="documents per shard that are encoded again: 200, all (default: 200)",
    )


def run(arguments: argparse.Namespace) -> int | None:
    # numpy and the tokenizer libraries are slow to import; --help must not wait for them
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from megatron_cpt.data.audit.shards import audit_all, shard_prefixes
    from megatron_cpt.data.tokenizer.interface import check_reading, load_tokenizer

    tokenizer = load_tokenizer(arguments.tokenizer, arguments.eod_token)
    check_reading(tokenizer)
    audits = audit_all(shard_prefixes(arguments.input), tokenizer, arguments.samples)
    sys.stdout.write("".join(map(str, audits)))
    bad = sum(bool(audit.problems) for audit in audits)
    documents, tokens = sum(audit.documents for audit in audits), sum(audit.tokens for audit in audits)
    sys.stdout.write(f"{len(audits)} shards, {documents:,} documents, {tokens:,} tokens; {bad} shards with problems\n")
    return 1 if bad else 0


def _samples(text: str) -> int | None:
    if text == "all":
        return None
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor all")
    return int(text)
