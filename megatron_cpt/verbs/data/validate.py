"""Read documents and report every bad line; exit code 1 if there are any.

Example: megatron-cpt data validate --input 'corpora/**/*.jsonl.zst'
"""

import argparse
import sys

from megatron_cpt.verbs.tokenize import add_input_arguments
from megatron_cpt.verbs.vocabulary import add_keys_argument, add_workers_argument, keys_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_input_arguments(parser)
    add_keys_argument(parser, "key a record needs; chat records need conversations or messages instead")
    add_workers_argument(parser)


def run(arguments: argparse.Namespace) -> int | None:
    # reading documents needs compiled libraries; --help must not wait for them
    from megatron_cpt.data.cleaning.rewrite import Rewriting, rewrite_all
    from megatron_cpt.data.reading.documents import list_sources

    sources = list_sources(
        arguments.input,
        arguments.include,
        arguments.exclude,
        arguments.format,
        keep_bad_files=True,
        mixes_splits=False,
    )
    work = [
        Rewriting(
            sources=(source,),
            output=None,
            keys=keys_of(arguments),
            max_document_bytes=arguments.max_document_bytes,
            txt_documents=arguments.txt_documents,
        )
        for source in sources
    ]
    findings = rewrite_all(work, arguments.workers, "validate")
    sys.stdout.write("".join(f"{found}\n" for found in findings))
    bad = sum(found.problems.total() for found in findings)
    documents = sum(found.documents for found in findings)
    sys.stdout.write(f"{len(findings)} files, {documents:,} documents, {bad:,} bad lines\n")
    return 1 if bad else 0
