"""Turn a list of available tokens and a budget into the list a run draws, by rules per corpus or path pattern.

A shard follows the first rule that names it: a corpus's name, a glob, or a part of the path. Shares are parts of the
budget; ratios multiply a shard's tokens (rounded up; proportions with a budget); epochs are exact and independent of
the budget; weights divide the rest. `--base PATTERN --base-ratio 0.4` makes two pools. Without rules every shard counts
by its size.

Example: megatron-cpt blend rescale train_data.all.sh 50B --ratio flan=0.5 --ratio '*=1' --output train_data_50B.sh
"""

import argparse
import functools
import sys
from fractions import Fraction
from pathlib import Path

from megatron_cpt.config.settings.values import parse_count
from megatron_cpt.data.blend.rescale_table import rescale_table
from megatron_cpt.data.lists.budget import exact
from megatron_cpt.data.lists.data_list import FORMATS, read_data_list, render_data_list, save_data_list
from megatron_cpt.data.lists.entry import weights_as_tokens
from megatron_cpt.data.lists.rescale import Rule, rescale
from megatron_cpt.errors import DataError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("list", type=Path, help="list of available tokens, in any format")
    parser.add_argument("budget", nargs="?", help="tokens to draw: 50B, 1.5T, 8000000 (default: what the rules give)")
    for kind, text in (
        ("ratio", "multiple of each shard's tokens"),
        ("epochs", "passes over the shards, fixed"),
        ("share", "part of the budget, 0 to 1"),
        ("weight", "parts of what epochs and shares leave"),
    ):
        parser.add_argument(
            f"--{kind}",
            dest="rules",
            action="append",
            default=[],
            metavar="PATTERN=NUMBER",
            type=functools.partial(_rule, kind=kind),
            help=text,
        )
    parser.add_argument("--base", help="corpus or pattern of the base pool")
    parser.add_argument("--base-ratio", type=positive_fraction, help="part of the budget that the base pool gets")
    parser.add_argument(
        "--cap", type=positive_fraction, help="most epochs of a shard; the others of its pool make up for it"
    )
    parser.add_argument(
        "--max-epochs", type=positive_fraction, default=Fraction(4), help="refuse more epochs (default: 4)"
    )
    parser.add_argument("--seq-length", type=positive_int, default=4096, help="tokens per sample (default: 4096)")
    parser.add_argument(
        "--global-batch-size", type=positive_int, default=512, help="samples per iteration (default: 512)"
    )
    parser.add_argument("--format", choices=list(FORMATS), default="llm-jp", help="format to write (default: llm-jp)")
    parser.add_argument("--output", type=Path, help="file to write (default: none, only the table is shown)")
    parser.add_argument("--overwrite", action="store_true", help="replace an output that holds something else")


def run(arguments: argparse.Namespace) -> None:
    available = weights_as_tokens(read_data_list(arguments.list), str(arguments.list))
    budget = None if arguments.budget is None else token_budget(arguments.budget)
    pools = {"base": arguments.base, "base_ratio": arguments.base_ratio}
    requested = rescale(available, arguments.rules, budget, **pools)
    drawn = (
        requested if arguments.cap is None else rescale(available, arguments.rules, budget, cap=arguments.cap, **pools)
    )
    table = rescale_table(
        available,
        requested,
        drawn,
        budget,
        max_epochs=arguments.max_epochs,
        seq_length=arguments.seq_length,
        global_batch_size=arguments.global_batch_size,
    )
    sys.stdout.write(table)
    if arguments.output is not None:
        save_data_list(arguments.output, render_data_list(drawn, arguments.format), overwrite=arguments.overwrite)
        sys.stdout.write(f"written: {arguments.output}\n")


def positive_fraction(text: str) -> Fraction:
    """Return an exact number above 0 from 4, 0.4 or 1/3, for argparse."""
    try:
        number = exact(text)
    except (ValueError, ZeroDivisionError):
        number = Fraction(0)
    if number <= 0:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number above 0")
    return number


def positive_int(text: str) -> int:
    """Return a whole number above 0, for argparse."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number above 0")
    return int(text)


def token_budget(text: str) -> int:
    """Return a budget of tokens.

    Raises: DataError when it is no count.
    """
    try:
        return parse_count(text)
    except ValueError as problem:
        raise DataError(f"budget: {problem}.") from None


def _rule(text: str, kind: str) -> Rule:
    pattern, equals, number = text.rpartition("=")
    if not equals or not pattern:
        raise argparse.ArgumentTypeError(f"'{text}' is not PATTERN=NUMBER")
    try:
        return Rule(pattern=pattern, kind=kind, value=exact(number))  # type: ignore[arg-type]
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(f"'{number}' in '{text}' is not a number") from None
