"""Samples drawn by a rescaled list, as a table per corpus; refuses too many epochs and warns about unusual values."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

from megatron_cpt.data.blend.table import align
from megatron_cpt.data.lists.entry import DataEntry
from megatron_cpt.errors import DataError
from megatron_cpt.log import format_count


def rescale_table(
    available: Sequence[DataEntry],
    requested: Sequence[DataEntry],
    drawn: Sequence[DataEntry],
    budget: int | None,
    *,
    max_epochs: Fraction,
    seq_length: int,
    global_batch_size: int,
) -> str:
    """Return the table: per corpus the available, requested and drawn tokens, epochs, share; then the totals.

    `requested` is the amount set by the rules before a cap moves tokens to other shards.

    Raises: DataError naming each shard that would be read more than `max_epochs` times.
    """
    tokens = {entry.prefix: entry.tokens or 0 for entry in drawn}
    wanted = {entry.prefix: entry.tokens or 0 for entry in requested}
    often = [
        f"{entry.prefix} ({tokens[entry.prefix] / entry.tokens:.4g})"
        for entry in available
        if entry.tokens and tokens.get(entry.prefix, 0) > -(-max_epochs * entry.tokens // 1)
    ]
    if often:
        raise DataError(
            f"{len(often)} shards would be read more than {float(max_epochs):g} times: {', '.join(often[:5])}. "
            "Lower the budget, cap the epochs (--cap) or raise --max-epochs."
        )
    total = sum(tokens.values())
    groups: dict[str, list[DataEntry]] = {}
    for entry in available:
        groups.setdefault(entry.corpus or Path(entry.prefix).parent.name or entry.prefix, []).append(entry)
    rows = [("corpus", "shards", "available", "requested", "taken", "epochs", "share")]
    for corpus, group in groups.items():
        has = sum(entry.tokens or 0 for entry in group)
        taken = sum(tokens.get(entry.prefix, 0) for entry in group)
        asked = sum(wanted.get(entry.prefix, 0) for entry in group)
        share = f"{taken / total if total else 0.0:.4%}"
        rows.append(
            (
                corpus,
                f"{len(group):,}",
                f"{has:,}",
                f"{asked:,}",
                f"{taken:,}",
                f"{taken / has if has else 0.0:.4g}",
                share,
            )
        )
    lines = align(rows)
    iterations = -(-total // (seq_length * global_batch_size))
    lines.append(
        f"total {total:,} tokens ({format_count(total)})"
        + (f", budget {budget:,}" if budget is not None else "")
        + f": {iterations:,} iterations, {iterations * global_batch_size:,} samples of {seq_length:,}"
    )
    unused = [entry.prefix for entry in available if entry.prefix not in tokens]
    if unused:
        lines.append(f"note: {len(unused)} shards give no token: {', '.join(unused[:3])}")
    small = [corpus for corpus, group in groups.items() if sum(entry.tokens or 0 for entry in group) <= seq_length]
    if small:
        lines.append(f"note: smaller than one sequence: {', '.join(small)}")
    return "\n".join(lines) + "\n"
