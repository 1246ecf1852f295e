"""Which checkpoints are kept: a pure decision, and a deletion that never removes the only good one."""

import logging
import os
import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from megatron_cpt.checkpoint.torch_dist.mcore import (
    VerifyMode,
    checkpoint_bytes,
    checkpoint_dir,
    list_checkpoints,
    read_tracker,
    verify_checkpoint,
)
from megatron_cpt.errors import CheckpointError
from megatron_cpt.files import sync_dir, write_text

logger = logging.getLogger(__name__)

PROTECTED = "protected_iterations.txt"


def superseded_iterations(
    iterations: Sequence[int],
    *,
    keep_last: int | None,
    keep_every: int | None = None,
    protected: Collection[int] = (),
    sizes: Mapping[int, int] | None = None,
    quota_bytes: int | None = None,
) -> list[int]:
    """Return the iterations to delete, oldest first, of `iterations` that are known to be good.

    Kept are the newest `keep_last` (None: all), multiples of `keep_every` and `protected` ones. When the kept ones
    exceed `quota_bytes` together (by `sizes`), the oldest unprotected ones go too, multiples of `keep_every` last. The newest
    always stays.
    """
    if keep_last is not None and keep_last < 1:
        raise CheckpointError(f"keep_last is {keep_last}. At least 1 checkpoint must be kept. Use 1 or more.")
    ordered = sorted(iterations)
    fixed = {*protected, *ordered[-1:]}
    newest = set(ordered if keep_last is None else ordered[-keep_last:])
    kept = [i for i in ordered if i in fixed or i in newest or (keep_every and i % keep_every == 0)]
    if quota_bytes is not None:
        sizes = sizes or {}
        total = sum(sizes[iteration] for iteration in kept)
        by_worth = sorted(kept, key=lambda i: (bool(keep_every) and i % (keep_every or 1) == 0, i))
        for iteration in [i for i in by_worth if i not in fixed]:
            if total <= quota_bytes:
                break
            kept.remove(iteration)
            total -= sizes[iteration]
    return [iteration for iteration in ordered if iteration not in kept]


def prune(
    root: Path,
    keep_last: int | None = None,
    keep_every: int | None = None,
    protected: Collection[int] = (),
    quota: int | None = None,
    *,
    mode: VerifyMode = "size",
    dry_run: bool = False,
) -> list[Path]:
    """Delete superseded checkpoints of `root`; return the folders that were (with `dry_run`: would be) deleted.

    Only checkpoints that verify in `mode` count as kept, so a damaged newer one never costs an older good one; damaged
    ones are reported and left alone. The tracker's iteration, `release` and those in `protected_iterations.txt` stay.
    `quota` is in bytes.
    """
    iterations = [iteration for iteration in list_checkpoints(root) if isinstance(iteration, int)]
    good = [iteration for iteration in iterations if _is_good(checkpoint_dir(root, iteration), mode)]
    tracked = read_tracker(root)
    stay = {*protected, *read_protected(root), *([tracked] if isinstance(tracked, int) else [])}
    doomed = superseded_iterations(
        good,
        keep_last=keep_last,
        keep_every=keep_every,
        protected=stay,
        sizes={iteration: checkpoint_bytes(checkpoint_dir(root, iteration)) for iteration in good},
        quota_bytes=quota,
    )
    directories = [checkpoint_dir(root, iteration) for iteration in doomed]
    for directory in [] if dry_run else directories:
        delete_checkpoint(directory)
        logger.info("%s: deleted, newer checkpoints are verified", directory)
    return directories


def delete_checkpoint(directory: Path) -> None:
    """Delete a checkpoint folder so that a killed deletion never leaves half a checkpoint under its name."""
    doomed = directory.with_name(f".{directory.name}.deleted")
    if doomed.exists():
        shutil.rmtree(doomed)
    os.rename(directory, doomed)
    sync_dir(directory.parent)
    shutil.rmtree(doomed)


def read_protected(root: Path) -> set[int]:
    """Return the iterations in `<root>/protected_iterations.txt`, one per line."""
    try:
        return {int(line) for line in (root / PROTECTED).read_text(encoding="utf-8").split()}
    except FileNotFoundError:
        return set()
    except ValueError as problem:
        raise CheckpointError(f"{root / PROTECTED}: {problem}. One iteration per line is needed. Mend it.") from None


def write_protected(root: Path, iterations: Collection[int]) -> None:
    """Protect exactly `iterations` of `root` from deletion."""
    write_text(root / PROTECTED, "".join(f"{iteration}\n" for iteration in sorted(iterations)))


def _is_good(directory: Path, mode: VerifyMode) -> bool:
    try:
        verify_checkpoint(directory, mode)
    except CheckpointError as problem:
        logger.warning("not counted as kept, not deleted: %s", problem)
        return False
    return True
