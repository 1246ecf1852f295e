"""Which conversations go where: duplicate prompts out, validation sets held out, a random subset of the rest.

All decisions depend only on hashes of a conversation's content. A validation set is every conversation whose prompt's
hash is not above a bound. The first run sets the bound so that N are below it; later runs on more data read it, so that
no conversation ever changes sides (a set then grows with its data). A random subset of N are the N smallest draws.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_cpt.data.chat.encode import Survey
from megatron_cpt.errors import DataError
from megatron_cpt.files import read_json_object

DUPLICATE, NOT_DRAWN = -1, -2


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Assignment of the good records to shards."""

    fates: list[np.ndarray]
    """Shard of each good record, per piece: 0 is training, from 1 the validation sets, negative: none of them."""
    sets: list[str]
    """Names of the validation sets, for file names."""
    bounds: dict[str, int]
    """Largest prompt hash of each validation set, by the field's value."""
    duplicates: int = 0
    not_drawn: int = 0


def select(
    surveys: Sequence[Survey],
    *,
    dedup: bool,
    held_out: int,
    held_out_by: str | None,
    known_bounds: dict[str, int],
    number: int | None,
) -> Selection:
    """Return where the records go; completion data always goes to training.

    Raises: DataError when fewer conversations are there than are to be held out or drawn.
    """
    if not surveys:
        return Selection(fates=[], sets=[], bounds={})
    is_chat = np.concatenate([survey.is_chat for survey in surveys])
    prompts = np.concatenate([survey.prompts for survey in surveys])
    draws = np.concatenate([survey.draws for survey in surveys])
    fates = np.zeros(len(is_chat), dtype=np.int32)
    chats = np.flatnonzero(is_chat)
    if dedup:
        _, first = np.unique(np.ascontiguousarray(prompts[chats]).view("V16").ravel(), return_index=True)
        later = np.ones(len(chats), dtype=bool)
        later[first] = False
        fates[chats[later]] = DUPLICATE
    bounds: dict[str, int] = {}
    if held_out:
        values = np.array([value for survey in surveys for value in survey.values], dtype=object)
        bounds = _hold_out(values, prompts[:, 0], is_chat & (fates == 0), fates, held_out, held_out_by, known_bounds)
    if number is not None:
        rest = np.flatnonzero(is_chat & (fates == 0))
        if len(rest) < number:
            raise DataError(
                f"only {len(rest):,} conversations are left to draw from; {number:,} are wanted. Ask for fewer."
            )
        order = rest[np.lexsort((rest, draws[rest]))]
        fates[order[number:]] = NOT_DRAWN
    return Selection(
        fates=np.split(fates, np.cumsum([len(survey.is_chat) for survey in surveys])[:-1]),
        sets=set_names(list(bounds)),
        bounds=bounds,
        duplicates=int(np.count_nonzero(fates == DUPLICATE)),
        not_drawn=int(np.count_nonzero(fates == NOT_DRAWN)),
    )


def read_bounds(path: Path, held_out: int, held_out_by: str | None) -> dict[str, int]:
    """Return the bounds that an earlier run wrote; none where the file does not exist.

    Raises: DataError when it was made for another number or field.
    """
    if not path.exists():
        return {}
    found = read_json_object(path, DataError)
    stated = {"number": held_out, "field": held_out_by}
    if not isinstance(found, dict) or {key: found.get(key) for key in stated} != stated:
        raise DataError(
            f"{path}: holds out {found.get('number')} per {found.get('field')}, not {held_out} per {held_out_by}. "
            "Conversations would change sides. Use the same, or another file."
        )
    return {value: int(bound, 16) for value, bound in found["bounds"].items()}


def bounds_record(bounds: dict[str, int], held_out: int, held_out_by: str | None) -> dict[str, Any]:
    """Return what `read_bounds` reads."""
    written = {value: f"{bound:016x}" for value, bound in bounds.items()}
    return {"number": held_out, "field": held_out_by, "bounds": written}


def set_names(values: Sequence[str]) -> list[str]:
    """Return a file name's part for each value of the field. Raises: DataError when two are alike."""
    names = [re.sub(r"[^\w.-]+", "_", value) for value in values]
    if len(set(names)) < len(names):
        raise DataError(f"validation sets {', '.join(values)}: two have the same file name. Rename a value.")
    return names


def _hold_out(
    values: np.ndarray,
    hashes: np.ndarray,
    candidates: np.ndarray,
    fates: np.ndarray,
    held_out: int,
    by: str | None,
    known: dict[str, int],
) -> dict[str, int]:
    bounds = {}
    found = sorted({*values[candidates], *known} - ({""} if by else set()))
    for number, value in enumerate(found, 1):
        members = np.flatnonzero(candidates & (values == value))
        if value in known:
            bound = known[value]
        elif len(members) <= held_out:
            where = f" with {by}={value}" if by else ""
            raise DataError(
                f"only {len(members):,} conversations{where}; more than the {held_out:,} to hold out are needed. "
                "Hold out fewer, or leave these out with --where or --drop."
            )
        else:
            bound = int(np.partition(hashes[members], held_out - 1)[held_out - 1])
        bounds[value] = bound
        fates[members[hashes[members] <= np.uint64(bound)]] = number
    return bounds
