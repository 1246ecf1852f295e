"""Mix data lists by global weights: w' = (w / sum of its list) * (W / sum of all W), with full precision.

If some lists have a corpus in a third column, a list of two columns is one corpus, named after its file.

Example: megatron-cpt blend mix --inputs 0.9 papers.txt 0.1 dolma.txt > mix.txt
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

from megatron_cpt.data.lists.budget import exact
from megatron_cpt.data.lists.data_list import FORMATS, read_data_list, render_data_list
from megatron_cpt.data.lists.entry import DataEntry
from megatron_cpt.data.lists.rescale import mix_lists
from megatron_cpt.errors import DataError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--inputs",
        "--input",
        nargs="+",
        required=True,
        metavar=("WEIGHT", "FILE"),
        help="pairs of a global weight and a data list: 0.3 a.txt 0.7 b.txt",
    )
    parser.add_argument("--format", choices=list(FORMATS), help="format to write (default: columns, as the inputs)")


def run(arguments: argparse.Namespace) -> None:
    words = arguments.inputs
    if len(words) % 2:
        raise DataError(f"--inputs: {len(words)} values. Pairs of a weight and a file are needed.")
    lists = []
    for weight, name in zip(words[::2], words[1::2], strict=True):
        try:
            number = exact(weight)
        except (ValueError, ZeroDivisionError):
            raise DataError(f"--inputs: '{weight}' is not a number. The weight comes before its file.") from None
        if number <= 0:
            raise DataError(f"--inputs: the weight of {name} is {weight}. It must be positive.")
        lists.append((number, read_data_list(Path(name))))
    mixed = mix_lists(lists if arguments.format else with_corpora(lists, words[1::2]))
    with_corpus = [entry.corpus is not None for entry in mixed]
    sys.stdout.write(render_data_list(mixed, arguments.format or ("blendcorpus" if all(with_corpus) else "weights")))


def with_corpora(
    lists: Sequence[tuple[Fraction, Sequence[DataEntry]]], names: Sequence[str]
) -> list[tuple[Fraction, Sequence[DataEntry]]]:
    """Return the lists; if some have corpora in a third column, a list without them becomes the corpus of its file's
    name.

    Raises: DataError when that is a corpus of another list.
    """
    stated = {entry.corpus for _, entries in lists for entry in entries if entry.corpus is not None}
    if not stated:
        return list(lists)
    found: list[tuple[Fraction, Sequence[DataEntry]]] = []
    for (weight, entries), name in zip(lists, names, strict=True):
        corpus = Path(name).stem
        if any(entry.corpus is None for entry in entries) and corpus in stated:
            raise DataError(
                f"{name}: has no third column, and its name is that of a corpus in another list. Write its corpus in a third column."
            )
        found.append((weight, [replace(entry, corpus=entry.corpus or corpus) for entry in entries]))
    return found
