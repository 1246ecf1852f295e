"""Tell the language of every document: statistics per corpus, a column, and a filter.

Each document is written with the fields `language` (ISO 639) and `language_score` (its probability); --keep writes
those of some languages only, and `data sample --where language=ja` takes a subset later. Below --min-score a language
is `und`. The first 4,096 characters decide. To resume a killed run, run the same command again.

Example: megatron-cpt data languages web=raw/web --output labelled --keep ja en --workers 16
"""

import argparse
import sys
from pathlib import Path

from megatron_cpt.verbs.data.cleaning_arguments import add_output_arguments, print_plan
from megatron_cpt.verbs.vocabulary import add_bad_line_argument, add_workers_argument, skips_bad_lines


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("inputs", nargs="+", metavar="[NAME=]PATH", help="documents, by corpus")
    parser.add_argument("--output", type=Path, required=True, help="folder for the documents with their language")
    parser.add_argument("--key", default="text", help="field with the text or the chat messages (default: text)")
    parser.add_argument("--column", default="language", help="field for the language (default: language)")
    parser.add_argument("--keep", nargs="+", default=[], metavar="CODE", help="write these languages only")
    parser.add_argument("--min-score", type=float, default=0.5, help="less sure is und, undetermined (default: 0.5)")
    parser.add_argument("--compress", action="store_true", help="write .zst")
    add_output_arguments(parser, with_format=False)
    add_bad_line_argument(parser)
    add_workers_argument(parser)


def run(arguments: argparse.Namespace) -> None:
    from megatron_cpt.data.cleaning.languages import LanguageOptions, label_languages, language_table  # heavy: numpy
    from megatron_cpt.data.reading.named_corpora import named_corpora
    from megatron_cpt.data.reading.record_files import Reading

    corpora = named_corpora(arguments.inputs, keep_bad_files=skips_bad_lines(arguments))
    if arguments.dry_run:
        print_plan(corpora, {name: [arguments.output / name] for name in corpora}, arguments.compress)
        return
    report = label_languages(
        corpora,
        arguments.output,
        Reading(key=arguments.key, skip_bad_lines=skips_bad_lines(arguments)),
        LanguageOptions(
            column=arguments.column,
            keep=tuple(arguments.keep),
            min_score=arguments.min_score,
            is_compressed=arguments.compress,
        ),
        arguments.workers,
    )
    sys.stdout.write(language_table(report))
