"""Write a data list in another format; its own format is found from its content.

Numbers keep full precision. A list of weights becomes a list of tokens only if its weights are integers and
--weights-are-tokens states that they count tokens. A shell list that computes (arrays of arrays,
arithmetic, loops) is refused unless --evaluate-shell lets bash read it, in a sandbox: no network, nothing writable, no other processes, 20 seconds.

Example: megatron-cpt blend convert train_data.all.sh --to yaml --output train_data.yaml
"""

import argparse
import sys
from pathlib import Path

from megatron_cpt.data.lists.data_list import (
    FORMATS,
    is_shell_list,
    read_data_list,
    render_data_list,
    save_data_list,
)
from megatron_cpt.data.lists.entry import DataEntry, weights_as_tokens
from megatron_cpt.data.lists.evaluated import evaluate_shell_list
from megatron_cpt.errors import DataError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("input", type=Path, help="the list to read")
    parser.add_argument("--to", choices=list(FORMATS), required=True, help="format to write")
    parser.add_argument("--split", default="train", help="part of a per-split JSON file (default: train)")
    parser.add_argument("--weights-are-tokens", action="store_true", help="the list's whole weights count tokens")
    parser.add_argument(
        "--evaluate-shell",
        action="store_true",
        help="let bash evaluate an LLM-jp list, without network, without rights to write, for 20 seconds at most",
    )
    parser.add_argument("--array", metavar="NAME", help="with --evaluate-shell: the variable that holds the list")
    parser.add_argument("--output", type=Path, help="file to write (default: standard output)")
    parser.add_argument("--overwrite", action="store_true", help="replace an output that holds something else")


def run(arguments: argparse.Namespace) -> None:
    if arguments.array and not arguments.evaluate_shell:
        raise DataError(f"--array {arguments.array}: needs --evaluate-shell, which reads one of several arrays.")
    entries = _read(arguments)
    if arguments.weights_are_tokens:
        entries = weights_as_tokens(entries, str(arguments.input))
    text = render_data_list(entries, arguments.to)
    if arguments.output is None:
        sys.stdout.write(text)
    else:
        save_data_list(arguments.output, text, overwrite=arguments.overwrite)


def _read(arguments: argparse.Namespace) -> list[DataEntry]:
    if arguments.evaluate_shell:
        return evaluate_shell_list(arguments.input, arguments.array)
    try:
        return read_data_list(arguments.input, arguments.split)
    except DataError as problem:
        if arguments.input.is_file() and is_shell_list(arguments.input.read_text(errors="replace")):
            raise DataError(f"{problem} Or let bash evaluate the list, in a sandbox: --evaluate-shell.") from None
        raise
