"""Shared arguments of the verbs that keep or drop documents, and the files that they would write."""

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_cpt.data.reading.documents import Source


def add_output_arguments(parser: argparse.ArgumentParser, *, with_format: bool = True) -> None:
    """Add --dry-run and the output format."""
    if with_format:
        parser.add_argument(
            "--output-format",
            choices=["jsonl", "same"],
            default="jsonl",
            help="tables become JSON lines, or stay Parquet (same) with their schema (default: jsonl)",
        )
    parser.add_argument("--dry-run", action="store_true", help="print what would be written from what; write nothing")


def print_plan(
    corpora: Mapping[str, Sequence["Source"]],
    folders: Mapping[str, Iterable[Path]],
    is_compressed: bool,
    keeps_tables: bool = False,
) -> None:
    """Print the outputs of each corpus's sources below each of its folders."""
    from megatron_cpt.data.reading.record_files import output_paths  # heavy: the readers

    sources = [source for group in corpora.values() for source in group]
    for name, group in corpora.items():
        for folder in folders[name]:
            paths = output_paths(group, folder, is_compressed, sources, keeps_tables)
            for source, path in zip(group, paths, strict=True):
                sys.stdout.write(f"{path}: from {source.path}, {source.size:,} bytes\n")
    sys.stdout.write(f"{len(sources)} files would be read, {sum(source.size for source in sources):,} bytes\n")
