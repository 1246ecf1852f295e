"""Mix data lists by global weights: w' = (w / sum of its list) * (W / sum of all W), with full precision.

Example: megatron-cpt blend mix --inputs 0.9 papers.txt 0.1 dolma.txt > mix.txt
"""

import argparse
import sys
from pathlib import Path

from megatron_cpt.data.lists.budget import exact
from megatron_cpt.data.lists.data_list import FORMATS, read_data_list, render_data_list
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
    mixed = mix_lists(lists)
    with_corpus = [entry.corpus is not None for entry in mixed]
    if any(with_corpus) and not all(with_corpus) and arguments.format is None:
        raise DataError("--inputs: some lists name a corpus in a third column and some do not. All or none are needed.")
    sys.stdout.write(render_data_list(mixed, arguments.format or ("blendcorpus" if all(with_corpus) else "weights")))
