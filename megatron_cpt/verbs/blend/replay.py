"""Show a replay buffer, plan a stage from data lists and the buffer, or append a finished stage to it.

`show` lists what the buffer holds and how far each shard is drawn. `plan` mixes lists of available tokens by shares of
a budget: a list named after a corpus of the mix (D0.yaml) is that corpus's, other lists go by the corpora in them. The
share named `buffer` is drawn from the buffer, continuing where earlier stages stopped. `append` enters a stage that has
ended (training with `data.buffer` does this itself).

Example: megatron-cpt blend replay plan buffer.yaml --mix D0=0.05 D2=0.48 buffer=0.47 --lists D0.yaml D2.yaml \\
    --tokens 50B --output stage3.yaml
"""

import argparse
import sys
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

from megatron_cpt.data.lists.budget import exact
from megatron_cpt.data.lists.entry import DataEntry
from megatron_cpt.errors import DataError
from megatron_cpt.verbs.blend.rescale import positive_fraction, positive_int, token_budget


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=["show", "plan", "append"], help="what to do")
    parser.add_argument("buffer", type=Path, help="the buffer's YAML file; plan and show take a missing one as empty")
    parser.add_argument("--mix", nargs="+", default=[], metavar="CORPUS=SHARE", help="plan: shares of the budget")
    parser.add_argument(
        "--lists", nargs="+", type=Path, default=[], help="plan: lists of available tokens; D0.yaml is corpus D0's"
    )
    parser.add_argument("--tokens", help="plan: the budget: 50B, 1.5T, 8000000")
    parser.add_argument(
        "--max-epochs", type=positive_fraction, default=Fraction(4), help="plan: refuse more (default: 4)"
    )
    parser.add_argument("--seq-length", type=positive_int, default=4096, help="tokens per sample (default: 4096)")
    parser.add_argument("--output", type=Path, help="plan: the stage's list, for data.train_data_path")
    parser.add_argument("--overwrite", action="store_true", help="plan: replace an output that holds something else")
    parser.add_argument("--stage", help="append: the stage's name, entered once")
    parser.add_argument("--list", type=Path, help="append: the list that the stage has drawn")


def run(arguments: argparse.Namespace) -> None:
    {"show": _show, "plan": _plan, "append": _append}[arguments.action](arguments)


def _show(arguments: argparse.Namespace) -> None:
    from megatron_cpt.data.blend.replay import read_buffer
    from megatron_cpt.data.blend.table import align  # heavy: numpy
    from megatron_cpt.data.shards.discovery import read_shard

    buffer = read_buffer(arguments.buffer)
    rows = [("shard", "corpus", "added by", "tokens", "drawn", "epochs")]
    for shard in buffer.shards.values():
        tokens = read_shard(shard.prefix).tokens
        epochs = f"{shard.drawn_tokens / tokens:.4g}" if tokens else "-"
        rows.append((shard.prefix, shard.corpus, shard.added_by, f"{tokens:,}", f"{shard.drawn_tokens:,}", epochs))
    sys.stdout.write("\n".join([*align(rows), f"stages: {', '.join(buffer.stages) or 'none'}"]) + "\n")


def _plan(arguments: argparse.Namespace) -> None:
    from megatron_cpt.data.blend.replay import CORPUS, read_buffer
    from megatron_cpt.data.blend.rescale_table import rescale_table
    from megatron_cpt.data.lists.data_list import render_data_list, save_data_list  # heavy: numpy
    from megatron_cpt.data.lists.entry import shard_path
    from megatron_cpt.data.lists.rescale import Rule, rescale
    from megatron_cpt.data.shards.discovery import read_shard

    if arguments.tokens is None:
        raise DataError("--tokens: not given. A plan needs a budget, such as 50B.")
    shares = {corpus: _share(value, text) for text in arguments.mix for corpus, _, value in [text.rpartition("=")]}
    if sum(shares.values(), Fraction(0)) != 1:
        raise DataError(f"--mix: the shares sum to {float(sum(shares.values(), Fraction(0))):g}. They must sum to 1.")
    held = read_buffer(arguments.buffer).shards
    available = [entry for path in arguments.lists for entry in _listed(path, shares) if shares.get(entry.corpus or "")]
    named = set(shares)
    listed = {shard_path(entry.prefix) for entry in available}
    for shard in held.values():
        if shares.get(CORPUS) and shard.corpus not in named and shard_path(shard.prefix) not in listed:
            available.append(DataEntry(prefix=shard.prefix, tokens=read_shard(shard.prefix).tokens, corpus=CORPUS))
    missing = [corpus for corpus, share in shares.items() if share and corpus not in {e.corpus for e in available}]
    if missing:
        raise DataError(f"--mix: no shard of {', '.join(missing)} in the lists or the buffer. Name its list.")
    rules = [
        Rule(pattern=corpus, kind="share", value=share, is_corpus=True) for corpus, share in shares.items() if share
    ]
    budget = token_budget(arguments.tokens)
    drawn = rescale(available, rules, budget)
    batch = {"seq_length": arguments.seq_length, "global_batch_size": 1}
    sys.stdout.write(rescale_table(available, drawn, drawn, budget, max_epochs=arguments.max_epochs, **batch))
    if arguments.output is not None:
        placed = [
            DataEntry(
                prefix=entry.prefix,
                tokens=entry.tokens,
                corpus=entry.corpus,
                first_sample=held[entry.prefix].first_sample(arguments.seq_length) if entry.prefix in held else None,
            )
            for entry in drawn
        ]
        save_data_list(arguments.output, render_data_list(placed), overwrite=arguments.overwrite)
        sys.stdout.write(f"written: {arguments.output}\n")


def _listed(path: Path, shares: dict[str, Fraction]) -> list[DataEntry]:
    """Return the entries of a list of available tokens, all of the corpus that its file is named after, if it is one."""
    from megatron_cpt.data.lists.data_list import read_data_list  # heavy: numpy
    from megatron_cpt.data.lists.entry import weights_as_tokens

    entries = weights_as_tokens(read_data_list(path), str(path))
    return [replace(entry, corpus=path.stem) for entry in entries] if path.stem in shares else entries


def _append(arguments: argparse.Namespace) -> None:
    from megatron_cpt.data.blend.replay import append_stage
    from megatron_cpt.data.lists.budget import spread_samples  # heavy: numpy
    from megatron_cpt.data.lists.data_list import read_data_list
    from megatron_cpt.data.lists.entry import weights_as_tokens

    if arguments.stage is None or arguments.list is None:
        raise DataError("append: --stage and --list are needed: the stage's name and the list that it has drawn.")
    entries = weights_as_tokens(read_data_list(arguments.list), str(arguments.list))
    tokens = [entry.tokens or 0 for entry in entries]
    samples = spread_samples(tokens, sum(tokens) // arguments.seq_length)
    changed = append_stage(arguments.buffer, arguments.stage, entries, samples, arguments.seq_length)
    sys.stdout.write(f"{arguments.buffer}: {arguments.stage} {'appended' if changed else 'was there already'}\n")


def _share(value: str, text: str) -> Fraction:
    try:
        return exact(value)
    except (ValueError, ZeroDivisionError):
        raise DataError(f"--mix: '{text}' is not CORPUS=SHARE, such as D0=0.05.") from None
