"""Copies of the base model's files other than weights: in a converted checkpoint, or one for all checkpoints of a
stage.

<checkpoints>/release/huggingface/     of a converted model, listed in its manifest
<checkpoints>/huggingface/             of the checkpoints of a stage that began with it
"""

import os
import shutil
from pathlib import Path

KEPT = "huggingface"


def kept_companions(checkpoint: Path) -> Path | None:
    """Return the folder with the companions of the model that a checkpoint began with, None where none was kept."""
    places = (checkpoint / KEPT, checkpoint.parent / KEPT)
    return next((place for place in places if place.is_dir()), None)


def share_companions(origin: Path, checkpoints: Path) -> None:
    """Copy what `origin`, the checkpoint that a stage began with, kept to the stage's folder of checkpoints, once."""
    kept = kept_companions(origin)
    if kept is None or (checkpoints / KEPT).exists():
        return
    partial = checkpoints / f".{KEPT}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    checkpoints.mkdir(parents=True, exist_ok=True)
    shutil.copytree(kept, partial)
    os.rename(partial, checkpoints / KEPT)
