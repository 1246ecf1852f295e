"""Remove exact and near-duplicate documents (MinHash), over all corpora or within each.

Inputs are files, folders or globs; NAME=PATH puts them into a corpus of that name, else each input is a corpus of its
own. The first document of a cluster stays, in the order of the inputs (or the longest). To resume a killed run, run the
same command again. The report (clusters, share per corpus, examples) is printed and written to report.json.

Example: megatron-cpt data dedup news=raw/news web='raw/web/*.jsonl.zst' --output clean --workers 16
"""

import argparse
import sys
from pathlib import Path

from megatron_cpt.verbs.data.cleaning_arguments import add_output_arguments, print_plan
from megatron_cpt.verbs.tokenize import parse_part_argument
from megatron_cpt.verbs.vocabulary import add_bad_line_argument, add_workers_argument, skips_bad_lines


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("inputs", nargs="+", metavar="[NAME=]PATH", help="documents, by corpus")
    parser.add_argument("--output", type=Path, required=True, help="folder for what stays")
    parser.add_argument("--key", default="text", help="field with the text or the chat messages (default: text)")
    parser.add_argument("--scope", choices=["all", "corpus"], default="all", help="over all corpora or within each")
    parser.add_argument("--keep", choices=["first", "longest"], default="first", help="which of a cluster stays")
    parser.add_argument("--exact", action="store_true", help="equal texts only")
    parser.add_argument("--prompts", action="store_true", help="chats with the same prompt (before the first answer)")
    parser.add_argument("--ngram", type=int, default=5, help="words per shingle (default: 5)")
    parser.add_argument("--num-perm", type=int, default=64, help="hash functions of a signature (default: 64)")
    parser.add_argument("--threshold", type=float, default=0.85, help="similarity of duplicates (default: 0.85)")
    parser.add_argument(
        "--verify", action="store_true", help="compare candidates by their exact similarity, which reads them again"
    )
    parser.add_argument(
        "--similar-to",
        choices=["cluster", "kept"],
        default="cluster",
        help="what goes is like some document of its cluster, or like one that stays (default: cluster)",
    )
    parser.add_argument("--seed", type=int, default=42, help="seed of the hash functions (default: 42)")
    parser.add_argument("--compress", action="store_true", help="write .zst")
    add_output_arguments(parser)
    parser.add_argument(
        "--part",
        type=parse_part_argument,
        metavar="I/N",
        help="make the signatures of the i-th of n parts, for a job array; the command without --part then does the rest",
    )
    add_bad_line_argument(parser)
    add_workers_argument(parser)
    parser.add_argument("--memory-gb", type=float, default=1.0, help="memory for sorting (default: 1)")
    parser.add_argument("--work", type=Path, help="folder for what is spilled (default: next to the output)")


def run(arguments: argparse.Namespace) -> None:
    from megatron_cpt.data.cleaning.dedup import DedupOptions, deduplicate, report_table
    from megatron_cpt.data.cleaning.signatures import MinHashOptions
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
    minhash = MinHashOptions(
        ngram=arguments.ngram,
        num_perm=arguments.num_perm,
        threshold=arguments.threshold,
        seed=arguments.seed,
        is_exact_only=arguments.exact,
        is_prompt=arguments.prompts,
    )
    report = deduplicate(
        corpora,
        arguments.output,
        Reading(key=arguments.key, skip_bad_lines=skips_bad_lines(arguments)),
        DedupOptions(
            minhash=minhash,
            scope=arguments.scope,
            keep=arguments.keep,
            is_verified=arguments.verify,
            similar_to=arguments.similar_to,
            is_compressed=arguments.compress,
            keeps_tables=arguments.output_format == "same",
        ),
        work=arguments.work,
        workers=arguments.workers,
        memory_bytes=int(arguments.memory_gb * (1 << 30)),
        part=arguments.part,
    )
    sys.stdout.write(report_table(report) if report else "the signatures of this part are there\n")
