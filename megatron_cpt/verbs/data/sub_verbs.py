"""Look after documents and token files: validate, repair, audit, trace, merge and more.

Each sub-verb is a module `megatron_cpt.verbs.data.NAME` with the same two functions as a verb.

Example: megatron-cpt data validate --input 'corpora/**/*.jsonl.zst'
"""

import argparse

from megatron_cpt.verbs.dispatch import add_sub_verbs, run_sub_verb

SUB_VERBS = {
    "validate": "read documents and report every bad line",
    "repair": "rewrite documents without the bad lines",
    "extract": "decompress documents into a mirrored tree",
    "merge-files": "group many small document files into larger ones",
    "audit": "prove that token files hold exactly their source documents",
    "trace": "say which file and line a tokenized document came from",
    "merge": "join token shards into one",
    "adopt": "check token shards of another tool and write their manifests",
    "dedup": "remove exact and near-duplicate documents",
    "decontaminate": "remove documents that hold passages of evaluation sets",
    "languages": "tell the language of every document: statistics, a column, a filter",
    "sample": "take a random subset, by field value or score",
    "prepare-chat": "turn conversations into token shards with masks of what is learned",
    "pack": "pack the documents of a token shard into training sequences by best fit",
    "split": "hold out a fixed validation set by document hash",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_sub_verbs(parser, SUB_VERBS)


def run(arguments: argparse.Namespace) -> int | None:
    return run_sub_verb("data", arguments.sub_verb, arguments.rest)
