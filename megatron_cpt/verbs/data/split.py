"""Hold out a fixed, named validation set of each corpus by document hash.

A document's side depends on its text and the set's name only: it never moves when data is added, and copies of it are on
the same side. `train` and the set lie below OUTPUT/CORPUS/; tokenize them apart.

Example: megatron-cpt data split ja=clean/ja en=clean/en --name validation --fraction 0.001 --output split
"""

import argparse
import sys
from fractions import Fraction
from pathlib import Path

from megatron_cpt.errors import DataError
from megatron_cpt.verbs.data.cleaning_arguments import add_output_arguments, print_plan
from megatron_cpt.verbs.vocabulary import add_bad_line_argument, add_workers_argument, skips_bad_lines


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("inputs", nargs="+", metavar="[NAME=]PATH", help="documents, by corpus")
    parser.add_argument("--output", type=Path, required=True, help="folder for both sides")
    parser.add_argument("--name", default="validation", help="name of the set (default: validation)")
    parser.add_argument("--fraction", type=Fraction, required=True, help="part of the documents: 0.001, 1/1000")
    parser.add_argument("--key", default="text", help="field with the text or the chat messages (default: text)")
    parser.add_argument("--compress", action="store_true", help="write .zst")
    add_output_arguments(parser)
    add_bad_line_argument(parser)
    add_workers_argument(parser)


def run(arguments: argparse.Namespace) -> None:
    from megatron_cpt.data.cleaning.sample import split_validation
    from megatron_cpt.data.reading.named_corpora import named_corpora  # heavy: the readers
    from megatron_cpt.data.reading.record_files import Reading

    if not 0 < arguments.fraction < 1 or arguments.name in ("train", "", ".", "..") or "/" in arguments.name:
        raise DataError(
            f"--fraction {arguments.fraction} --name {arguments.name}: a part between 0 and 1 and a file name other than train are needed."
        )
    corpora = named_corpora(arguments.inputs, keep_bad_files=skips_bad_lines(arguments))
    if arguments.dry_run:
        print_plan(
            corpora,
            {name: [arguments.output / name / side for side in ("train", arguments.name)] for name in corpora},
            arguments.compress,
            arguments.output_format == "same",
        )
        return
    counts = split_validation(
        corpora,
        arguments.output,
        Reading(key=arguments.key, skip_bad_lines=skips_bad_lines(arguments)),
        name=arguments.name,
        fraction=arguments.fraction,
        is_compressed=arguments.compress,
        keeps_tables=arguments.output_format == "same",
        workers=arguments.workers,
    )
    for corpus, row in counts.items():
        total = max(row["documents"], 1)
        held_out = row[arguments.name]
        sys.stdout.write(f"{corpus}: {held_out:,} of {total:,} documents held out ({held_out / total:.3%})\n")
        for kind, count in row["rejects"].items():
            sys.stdout.write(f"  left out {count:,} lines: {kind}\n")
