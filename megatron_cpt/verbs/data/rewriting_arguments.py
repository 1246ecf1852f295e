"""Arguments and run of the verbs that rewrite document files (repair, extract, merge-files)."""

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_cpt.verbs.tokenize import add_input_arguments, parse_part_argument

if TYPE_CHECKING:
    from megatron_cpt.data.cleaning.rewrite_plan import Grouping


def add_rewriting_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the inputs, the output folder, its compression and the number of workers."""
    add_input_arguments(parser)
    parser.add_argument(
        "--output-dir", type=Path, required=True, help="folder for the files; the input tree is mirrored"
    )
    parser.add_argument("--compress", choices=("none", "gz", "zst"), default="none", help="compression of the outputs")
    parser.add_argument(
        "--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes (default: all cores)"
    )
    parser.add_argument(
        "--part", type=parse_part_argument, metavar="I/N", help="do the i-th of n parts of the work, i from 0 to n-1"
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would be written from what; write nothing")


def run_rewriting(
    arguments: argparse.Namespace,
    label: str,
    keys: tuple[str, ...],
    on_bad_line: str,
    grouping: "Grouping | None" = None,
    encoding: str | None = None,
) -> int:
    """Rewrite the inputs and write one line per file to stdout; return 1 if nothing is left of a file that held lines."""
    # reading documents needs compiled libraries; --help must not wait for them
    from megatron_cpt.data.cleaning.rewrite import rewrite_all
    from megatron_cpt.data.cleaning.rewrite_plan import Grouping, plan_tree_of_files
    from megatron_cpt.data.reading.documents import list_sources

    sources = list_sources(
        arguments.input,
        arguments.include,
        arguments.exclude,
        arguments.format,
        encoding=encoding,
        keep_bad_files=on_bad_line == "skip",
        mixes_splits=grouping is not None,
    )
    work = plan_tree_of_files(
        sources,
        arguments.output_dir,
        grouping or Grouping(),
        arguments.part,
        keys=keys,
        on_bad_line=on_bad_line,
        compression=arguments.compress,
        max_document_bytes=arguments.max_document_bytes,
        txt_documents=arguments.txt_documents,
    )
    if arguments.dry_run:
        for planned in work:
            size = sum(source.size for source in planned.sources)
            cut = f", cut every {planned.part_bytes:,} bytes" if planned.part_bytes else ""
            sys.stdout.write(f"{planned.part(0)}: {len(planned.sources)} files, {size:,} bytes{cut}\n")
        sys.stdout.write(f"{sum(len(planned.sources) for planned in work)} files would become {len(work)}\n")
        return 0
    findings = rewrite_all(work, arguments.workers, label)
    sys.stdout.write("".join(f"{found}\n" for found in findings))
    documents, bad = sum(found.documents for found in findings), sum(found.problems.total() for found in findings)
    sys.stdout.write(f"{len(findings)} files became {len(work)}: {documents:,} documents, {bad:,} rejected lines\n")
    lost = [found.path for found in findings if keys and not found.documents and found.problems]
    for path in lost:
        sys.stdout.write(
            f"{path}: no document could be mended; no file is written. Is it in another encoding (--encoding)?\n"
        )
    return 1 if lost else 0
