"""List the token shards below folders, with their exact token counts from the index.

Folders, prefixes and globs are searched for `.bin/.idx` pairs; an incomplete shard is refused by name, and a validation set
that prepare-chat held out is left out unless its prefix is given; so is, with a warning, a shard without a token. A shard's
corpus is the first folder below the one given, or its own name where it lies directly in it.

Example: megatron-cpt blend list data/tokens --format llm-jp --output train_data.all.sh
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_cpt.data.lists.data_list import FORMATS, DataEntry, render_data_list, save_data_list
from megatron_cpt.data.lists.entry import shard_path
from megatron_cpt.errors import DataError

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("inputs", nargs="+", help="folders, prefixes or globs of .bin/.idx pairs")
    parser.add_argument("--format", choices=list(FORMATS), default="yaml", help="format of the list (default: yaml)")
    parser.add_argument("--output", type=Path, help="file to write (default: standard output)")
    parser.add_argument("--overwrite", action="store_true", help="replace an output that holds something else")


def run(arguments: argparse.Namespace) -> None:
    from megatron_cpt.data.shards.discovery import find_shards, read_shards  # heavy: numpy

    entries, problems = [], []
    for source in arguments.inputs:
        prefixes, missing = find_shards([source], Path())
        shards, incomplete = read_shards(prefixes)
        problems += missing + incomplete
        if prefixes != [source]:
            for shard in (shard for shard in shards if shard.is_held_out):
                logger.warning("%s: left out; it is a validation set. Name it to list it", shard.prefix)
            shards = [shard for shard in shards if not shard.is_held_out]
        for shard in shards:
            if not shard.tokens:
                logger.warning("%s: left out; it holds no token", shard.prefix)
        entries += [
            DataEntry(prefix=shard.prefix, tokens=shard.tokens, corpus=_corpus(Path(shard.prefix), Path(source)))
            for shard in shards
            if shard.tokens
        ]
    if problems:
        raise DataError(f"{len(problems)} problems, nothing written:" + "".join(f"\n  - {text}" for text in problems))
    entries = _once(entries)
    if not entries:
        raise DataError(f"{', '.join(arguments.inputs)}: no shard with a token. Tokenize documents first.")
    text = render_data_list(entries, arguments.format)
    if arguments.output is None:
        sys.stdout.write(text)
        return
    save_data_list(arguments.output, text, overwrite=arguments.overwrite)
    tokens = sum(entry.tokens or 0 for entry in entries)
    sys.stdout.write(f"{arguments.output}: {len(entries):,} shards, {tokens:,} tokens\n")


def _once(entries: Sequence[DataEntry]) -> list[DataEntry]:
    """Return the entries without those of shards that an earlier input has given already."""
    return list({shard_path(entry.prefix): entry for entry in reversed(entries)}.values())[::-1]


def _corpus(prefix: Path, source: Path) -> str:
    inside = prefix.relative_to(source) if source.is_dir() else Path(prefix.name)
    return inside.parts[0].removesuffix("_text_document").removesuffix("_chat_document")
