"""Options that mean the same in every verb have one name, here; the names of earlier versions are taken too and not shown."""

import argparse
import os


def add_bad_line_argument(parser: argparse.ArgumentParser) -> None:
    """Add --on-bad-line fail|skip; `--skip-bad-lines` is its earlier name. Read it with `skips_bad_lines`."""
    parser.add_argument(
        "--on-bad-line",
        choices=("fail", "skip"),
        default="fail",
        help="fail (default): stop at the first line that holds no document; skip: leave such lines out, counted",
    )
    parser.add_argument(
        "--skip-bad-lines", dest="on_bad_line", action="store_const", const="skip", help=argparse.SUPPRESS
    )


def skips_bad_lines(arguments: argparse.Namespace) -> bool:
    """Return whether lines that hold no document are left out."""
    return bool(arguments.on_bad_line == "skip")


def add_keys_argument(parser: argparse.ArgumentParser, meaning: str) -> None:
    """Add --key, which can be repeated; `--json-keys` is its earlier name. Read them with `keys_of`."""
    parser.add_argument("--key", action="append", dest="keys", metavar="KEY", help=f"{meaning}; repeat for more (text)")
    parser.add_argument("--json-keys", nargs="+", dest="keys", help=argparse.SUPPRESS)


def keys_of(arguments: argparse.Namespace) -> tuple[str, ...]:
    """Return the keys that hold text."""
    return tuple(arguments.keys or ("text",))


def add_workers_argument(parser: argparse.ArgumentParser) -> None:
    """Add --workers; the default is the number of cores available to the process."""
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--workers", type=int, default=cores, metavar="N", help="processes (all cores)")
