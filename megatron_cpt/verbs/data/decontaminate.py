"""Remove training documents that share a passage of 13 words with an evaluation set.

NAME=PATH names a corpus or an evaluation set; several inputs of a name belong together. Case, punctuation and Unicode's
spellings of a character make no difference. The report (also in OUTPUT/report.json) lists the number of documents that
each evaluation set removed, with examples. To resume a killed run, run the same command again.

Example: megatron-cpt data decontaminate web=clean/web --against gsm8k=eval/gsm8k.jsonl --output decontaminated
"""

import argparse
import sys
from pathlib import Path

from megatron_cpt.verbs.data.cleaning_arguments import add_output_arguments, print_plan
from megatron_cpt.verbs.vocabulary import add_bad_line_argument, add_workers_argument, skips_bad_lines


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("inputs", nargs="+", metavar="[NAME=]PATH", help="training documents, by corpus")
    parser.add_argument("--against", nargs="+", required=True, metavar="[NAME=]PATH", help="evaluation sets")
    parser.add_argument("--output", type=Path, required=True, help="folder for the clean documents")
    parser.add_argument("--key", default="text", help="field of the training documents (default: text)")
    parser.add_argument("--against-key", default="text", help="field of the evaluation sets (default: text)")
    parser.add_argument("--ngram", type=int, default=13, help="words of a passage (default: 13)")
    parser.add_argument("--min-words", type=int, default=8, help="shortest evaluation text looked for (default: 8)")
    parser.add_argument("--min-matches", type=int, default=1, help="passages from which a document goes (default: 1)")
    parser.add_argument("--compress", action="store_true", help="write .zst")
    add_output_arguments(parser)
    add_bad_line_argument(parser)
    add_workers_argument(parser)


def run(arguments: argparse.Namespace) -> None:
    from megatron_cpt.data.cleaning.decontaminate import DecontaminationOptions, decontaminate, read_passages
    from megatron_cpt.data.reading.named_corpora import named_corpora  # heavy: numpy
    from megatron_cpt.data.reading.record_files import Reading

    corpora = named_corpora(arguments.inputs, keep_bad_files=skips_bad_lines(arguments))
    if arguments.dry_run:
        print_plan(
            corpora,
            {name: [arguments.output / name] for name in corpora},
            arguments.compress,
            arguments.output_format == "same",
        )
        return
    options = DecontaminationOptions(
        ngram=arguments.ngram,
        min_words=arguments.min_words,
        min_matches=arguments.min_matches,
        is_compressed=arguments.compress,
        keeps_tables=arguments.output_format == "same",
    )
    passages = read_passages(named_corpora(arguments.against), Reading(key=arguments.against_key), options)
    reading = Reading(key=arguments.key, skip_bad_lines=skips_bad_lines(arguments))
    report = decontaminate(
        corpora,
        passages,
        arguments.output,
        reading,
        options,
        arguments.workers,
    )
    for corpus, row in report["corpora"].items():
        sys.stdout.write(f"{corpus}: {row['removed']:,} of {row['documents']:,} removed ({row['removed_share']:.2%})\n")
        for kind, count in row["rejects"].items():
            sys.stdout.write(f"  left out {count:,} lines: {kind}\n")
    for name, removed in report["removed_by_evaluation"].items():
        short = report["too_short"][name]
        note = f"; {short:,} texts too short to be looked for" if short else ""
        sys.stdout.write(f"  because of {name}: {removed:,}{note}\n")
