"""Learning and forgetting of a series of models: bits per byte on every domain, compared with the first model's.

A change below zero is learning, above zero forgetting. Its 95 % interval is a bootstrap over the documents of the
domain, drawn in pairs (the same documents for both models), which is far tighter than the two intervals compared.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_cpt.errors import DataError
from megatron_cpt.evaluate.models.measured import Perplexity, ratio_interval


@dataclass(frozen=True, kw_only=True)
class Change:
    """Bits per byte of one model on one domain, and the difference from the reference model."""

    model: str
    text: str
    bits_per_byte: float
    low: float
    high: float
    change: float
    """Bits per byte minus the reference's; 0 for the reference itself."""
    change_low: float
    change_high: float
    reference: str = ""
    """Model that it is compared with; empty in results of earlier versions: the first."""

    @property
    def verdict(self) -> str:
        """learned, forgot, or unchanged where the interval of the change holds 0."""
        if self.change_high < 0:
            return "learned"
        return "forgot" if self.change_low > 0 else "unchanged"


def compare_with_first(results: Sequence[Perplexity]) -> list[Change]:
    """Return each result with its change from the first model's on the same text set.

    Raises: DataError when a model lacks a domain or two results measured different documents.
    """
    return _compare(results, lambda models, index: models[0])


def compare_with_previous(results: Sequence[Perplexity]) -> list[Change]:
    """Return each result with its change from the previous model: the effect of every stage of a series.

    Raises: as `compare_with_first`.
    """
    return _compare(results, lambda models, index: models[max(index - 1, 0)])


def _compare(results: Sequence[Perplexity], reference: Callable[[list[str], int], str]) -> list[Change]:
    models = list(dict.fromkeys(result.model for result in results))
    by_key = {(result.model, result.text): result for result in results}
    changes = []
    for text in dict.fromkeys(result.text for result in results):
        for model in models:
            if (model, text) not in by_key:
                raise DataError(f"{model}: no result on {text}. Every model is measured on every text set.")
        for index, model in enumerate(models):
            changes.append(_change(by_key[model, text], by_key[reference(models, index), text]))
    return changes


def _change(result: Perplexity, reference: Perplexity) -> Change:
    if result.document_bytes != reference.document_bytes:
        raise DataError(
            f"{result.text}: {result.model} and {reference.model} were measured on different documents. "
            "Measure both on the same file."
        )
    difference = (np.array(result.document_nats) - np.array(reference.document_nats)) / math.log(2)
    low, high = ratio_interval(difference, np.array(result.document_bytes))
    return Change(
        model=result.model,
        text=result.text,
        bits_per_byte=result.bits_per_byte,
        low=result.low,
        high=result.high,
        change=result.bits_per_byte - reference.bits_per_byte,
        change_low=low,
        change_high=high,
        reference=reference.model,
    )


def perplexity_table(results: Sequence[Perplexity]) -> str:
    """Return results as a Markdown table: a row per model and text set."""
    rows = [
        [
            result.model,
            result.text,
            f"{result.bits_per_byte:.4f}",
            f"{result.low:.4f} to {result.high:.4f}",
            f"{result.perplexity:.2f}",
            f"{result.tokens:,}",
            f"{result.bytes:,}",
        ]
        for result in results
    ]
    heads = ["model", "text", "bits per byte", "95 % interval", "perplexity per token", "tokens", "bytes"]
    return markdown_table(heads, rows, num_left=2)


def forgetting_table(changes: Sequence[Change]) -> str:
    """Return changes as a Markdown table: a row per model; per domain its bits per byte and the change in them."""
    models = list(dict.fromkeys(change.model for change in changes))
    texts = list(dict.fromkeys(change.text for change in changes))
    by_key = {(change.model, change.text): change for change in changes}
    heads = ["model"]
    against = _reference_name(changes)
    for text in texts:
        heads += [f"{text} bits per byte", f"change from {against} (95 % interval)", "verdict"]
    rows = []
    for model in models:
        row = [model]
        for text in texts:
            found = by_key[model, text]
            row.append(f"{found.bits_per_byte:.3f}")
            if model == models[0]:
                row += ["", ""]
            else:
                row += [f"{found.change:+.3f} ({found.change_low:+.3f} to {found.change_high:+.3f})", found.verdict]
        rows.append(row)
    return markdown_table(heads, rows, num_left=1)


def _reference_name(changes: Sequence[Change]) -> str:
    """Return the model that all are compared with, or that each is compared with the one before it."""
    references = {change.reference for change in changes}
    return changes[0].model if len(references) == 1 else "the model before"


def markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]], num_left: int) -> str:
    """Return an aligned Markdown table; the first `num_left` columns are flush left, the others right."""
    widths = [max(len(row[column]) for row in [heads, *rows]) for column in range(len(heads))]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if column < num_left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return "| " + " | ".join(padded) + " |"

    rule = ["-" * width if column < num_left else "-" * (width - 1) + ":" for column, width in enumerate(widths)]
    return "\n".join([line(heads), line(rule), *map(line, rows)])


def as_json(results: Sequence[Perplexity], changes: Sequence[Change]) -> dict[str, Any]:
    """Return what `evaluate forgetting` writes: results with their documents, and changes."""
    return {
        "format": 1,
        "results": [result.as_json() for result in results],
        "changes": [{**vars(change), "verdict": change.verdict} for change in changes],
    }


def results_from_json(value: dict[str, Any]) -> list[Perplexity]:
    """Return the results in a file that `evaluate perplexity` or `evaluate forgetting` wrote.

    Raises: DataError when the value is something else.
    """
    try:
        return [Perplexity(**result) for result in value["results"]]
    except (KeyError, TypeError) as problem:
        raise DataError(f"results: not those of an evaluation ({problem}). Write them again.") from None
