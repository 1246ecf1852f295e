"""Splits of a data set, recognised by the names of folders and files: training data next to data to hold out."""

import re
from collections.abc import Sequence
from pathlib import PurePosixPath

from megatron_cpt.errors import DataError

_SPLIT = re.compile(r"(?P<split>train|test|validation|valid|val|dev|eval)(?:ing|uation)?(?=[-._\d]|$)", re.IGNORECASE)


def check_splits(item: str, files: Sequence[PurePosixPath]) -> None:
    """Raise DataError where a folder of an input has training data and a held-out split side by side.

    A split is a folder or file whose name is `train`, `test`, `validation`, `valid`, `val`, `dev` or `eval`, or begins
    with one of them followed by a digit or `-._`, as in `train-00000-of-00002.parquet`.
    """
    found: dict[PurePosixPath, dict[str, str]] = {}
    for file in dict.fromkeys(files):
        for parent, name in zip(file.parents, reversed(file.parts), strict=False):
            if match := _SPLIT.match(name):
                found.setdefault(parent, {}).setdefault(match["split"].lower(), name)
    for parent, names in found.items():
        if "train" in names and len(names) > 1:
            held_out = next(name for split, name in names.items() if split != "train")
            folder = item if parent == PurePosixPath() else f"{item} ({parent})"
            raise DataError(
                f"{folder}: holds {names['train']} and {held_out} side by side. What is held out would be read with the rest. "
                f"Name {names['train']} alone (with --exclude '{held_out}*' where the verb has it), or name both as inputs."
            )
