"""Take a subset of documents: by field value, by score bucket, a random number of each.

The selection does not depend on the order or number of files, only on a document's hash and the seed. Conditions:
lang=ja, lang!=ja, score>=3.5, conversation_id^=translation_ (starts with), id!^=x (does not). With --score and --edges
each bucket goes to a folder of its own, and --number counts per bucket. The numbers of documents
read, matched and drawn are printed and written to OUTPUT/report.json.

Example: megatron-cpt data sample raw/chat --where 'conversation_id!^=translation_' --number 1M --output chat-1M
"""

import argparse
import sys
from pathlib import Path

from megatron_cpt.config.settings.values import parse_count
from megatron_cpt.errors import DataError
from megatron_cpt.verbs.data.cleaning_arguments import add_output_arguments, print_plan
from megatron_cpt.verbs.vocabulary import add_bad_line_argument, skips_bad_lines


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("inputs", nargs="+", help="files, folders or globs of documents")
    parser.add_argument("--output", type=Path, required=True, help="folder for the subset")
    parser.add_argument("--number", help="documents to draw at random: 1000, 1M (default: all that fit)")
    parser.add_argument("--where", action="append", default=[], metavar="CONDITION", help="all of them must hold")
    parser.add_argument("--score", help="field that chooses the bucket")
    parser.add_argument("--edges", nargs="+", type=float, default=[], help="ascending bounds of the buckets")
    parser.add_argument("--seed", type=int, default=42, help="another seed draws others (default: 42)")
    parser.add_argument("--key", default="text", help="field with the text or the chat messages (default: text)")
    parser.add_argument("--compress", action="store_true", help="write .zst")
    add_output_arguments(parser)
    add_bad_line_argument(parser)


def run(arguments: argparse.Namespace) -> None:
    from megatron_cpt.data.cleaning.sample import SampleOptions, sample
    from megatron_cpt.data.reading.documents import list_sources  # heavy: the readers
    from megatron_cpt.data.reading.record_files import Reading

    try:
        number = None if arguments.number is None else parse_count(arguments.number)
    except ValueError as problem:
        raise DataError(f"--number: {problem}.") from None
    sources = list_sources(arguments.inputs, keep_bad_files=skips_bad_lines(arguments))
    keeps_tables = arguments.output_format == "same"
    if arguments.dry_run:
        print_plan({"": sources}, {"": [arguments.output]}, arguments.compress, keeps_tables)
        return
    report = sample(
        sources,
        arguments.output,
        Reading(key=arguments.key, skip_bad_lines=skips_bad_lines(arguments)),
        SampleOptions(
            number=number,
            conditions=tuple(arguments.where),
            score=arguments.score,
            edges=tuple(arguments.edges),
            seed=arguments.seed,
            is_compressed=arguments.compress,
            keeps_tables=keeps_tables,
        ),
    )
    for name, row in report["buckets"].items():
        sys.stdout.write(f"{arguments.output / name}: {row['drawn']:,} of {row['found']:,} documents\n")
    outside = f", {report['in_no_bucket']:,} of them in no bucket" if report["in_no_bucket"] else ""
    sys.stdout.write(f"{report['documents']:,} documents read, {report['fit']:,} fit{outside}\n")
    for kind, count in report["rejects"].items():
        sys.stdout.write(f"left out {count:,} lines: {kind}\n")
