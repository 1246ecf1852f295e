"""Rewrite documents without the bad lines; lines that cannot be repaired go to OUTPUT.rejects.

Two objects on one line become two lines; byte-order marks and blank lines go; a missing last newline comes; a lone surrogate
becomes U+FFFD. A file in another encoding becomes UTF-8: UTF-16 and UTF-32 are told by their byte-order mark, others need
--encoding. Exit code 1 if nothing of a file could be repaired; no empty file is written.

Example: megatron-cpt data repair --input corpora/raw --output-dir corpora/clean --compress zst
"""

import argparse

from megatron_cpt.errors import ConfigError
from megatron_cpt.verbs.data.rewriting_arguments import add_rewriting_arguments, run_rewriting
from megatron_cpt.verbs.vocabulary import add_keys_argument, keys_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_rewriting_arguments(parser)
    add_keys_argument(parser, "key a record needs; chat records need conversations or messages instead")
    parser.add_argument(
        "--encoding",
        default="auto",
        help="encoding of text files: latin-1, cp1252, utf-16, ... (default: UTF-8, or by its mark)",
    )


def run(arguments: argparse.Namespace) -> int | None:
    check_encoding(arguments.encoding)
    return run_rewriting(arguments, "repair", keys_of(arguments), "skip", encoding=arguments.encoding)


def check_encoding(name: str) -> None:
    """Raise ConfigError unless Python knows the encoding and it is one of text."""
    try:
        "a".encode("utf-8" if name == "auto" else name)
    except (LookupError, UnicodeError):
        raise ConfigError(
            f"--encoding {name}: not an encoding of text. Name one such as latin-1, cp1252, shift_jis, utf-16, or auto."
        ) from None
