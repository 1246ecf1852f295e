"""Show the formats of data lists that are read and written, with a sample of each.

Example: megatron-cpt blend formats
"""

import argparse
import sys

from megatron_cpt.data.lists.data_list import FORMATS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The sub-verb takes no arguments."""


def run(arguments: argparse.Namespace) -> None:
    for name, entry in FORMATS.items():
        sample = "".join(f"    {line}\n" for line in entry.sample.splitlines())
        sys.stdout.write(f"{name}: {entry.meaning}\n{sample}")
