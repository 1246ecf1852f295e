"""Write a data list in another format; its own format is found from its content.

Numbers keep full precision. A list of weights becomes a list of tokens only where its weights are whole numbers and
--weights-are-tokens says that they count tokens.

Example: megatron-cpt blend convert train_data.all.sh --to yaml --output train_data.yaml
"""

import argparse
import sys
from pathlib import Path

from megatron_cpt.data.lists.data_list import FORMATS, read_data_list, render_data_list, save_data_list
from megatron_cpt.data.lists.entry import weights_as_tokens


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("input", type=Path, help="the list to read")
    parser.add_argument("--to", choices=list(FORMATS), required=True, help="format to write")
    parser.add_argument("--split", default="train", help="part of a per-split JSON file (default: train)")
    parser.add_argument("--weights-are-tokens", action="store_true", help="the list's whole weights count tokens")
    parser.add_argument("--output", type=Path, help="file to write (default: standard output)")
    parser.add_argument("--overwrite", action="store_true", help="replace an output that holds something else")


def run(arguments: argparse.Namespace) -> None:
    entries = read_data_list(arguments.input, arguments.split)
    if arguments.weights_are_tokens:
        entries = weights_as_tokens(entries, str(arguments.input))
    text = render_data_list(entries, arguments.to)
    if arguments.output is None:
        sys.stdout.write(text)
    else:
        save_data_list(arguments.output, text, overwrite=arguments.overwrite)
