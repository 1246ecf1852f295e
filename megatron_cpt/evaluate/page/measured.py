"""Results of an evaluation, arranged for the page: bits per byte with intervals, and changes on one scale for all
texts."""

from pathlib import Path
from typing import Any

from megatron_cpt.errors import DataError
from megatron_cpt.files import read_json


def measured(path: Path) -> dict[str, Any]:
    """Return the models, texts and rows of a file of `evaluate forgetting` or `evaluate perplexity`.

    A row has the place of its bar and of its interval in percent of the width that all texts share, so that lengths can be
    compared between texts.

    Raises: DataError when the file is something else.
    """
    content = read_json(path, DataError)
    try:
        changes = content.get("changes")
        if changes:
            return _changes(changes)
        rows = [
            {key: result[key] for key in ("model", "text", "bits_per_byte", "low", "high")}
            for result in content["results"]
        ]
    except (KeyError, TypeError, AttributeError):
        raise DataError(f"{path}: not results of an evaluation. Write them with `evaluate forgetting`.") from None
    return {"texts": _distinct(rows, "text"), "reference": None, "rows": rows}


def _changes(changes: list[dict[str, Any]]) -> dict[str, Any]:
    low = min(0.0, *(change["change_low"] for change in changes))
    high = max(0.0, *(change["change_high"] for change in changes))
    width = (high - low) or 1.0

    def place(value: float) -> float:
        return round(100 * (value - low) / width, 3)

    rows = []
    for change in changes:
        left, right = sorted((place(0), place(change["change"])))
        rows.append(
            {
                **change,
                "left": left,
                "width": max(right - left, 0.15),
                "zero": place(0),
                "interval_left": place(change["change_low"]),
                "interval_width": max(place(change["change_high"]) - place(change["change_low"]), 0.15),
            }
        )
    return {"texts": _distinct(rows, "text"), "reference": changes[0]["model"], "rows": rows}


def _distinct(rows: list[dict[str, Any]], key: str) -> list[str]:
    return list(dict.fromkeys(row[key] for row in rows))
