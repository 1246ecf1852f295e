"""A model's result on a set of documents, and the interval of a ratio: the input of reports, without torch."""

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

NUM_RESAMPLES = 1000


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """One model's result on one text set."""

    model: str
    text: str
    bits_per_byte: float
    low: float
    """Lower end of the 95 % interval."""
    high: float
    perplexity: float
    """exp(mean nats per token): comparable between models with the same tokenizer only."""
    documents: int
    tokens: int
    bytes: int
    context: int
    stride: int
    start_token: str
    document_nats: list[float] = field(repr=False)
    """-ln p of each document, in the order of the text set."""
    document_bytes: list[int] = field(repr=False)

    def as_json(self) -> dict[str, Any]:
        """Return the result as JSON values."""
        return asdict(self)


def ratio_interval(
    numerators: np.ndarray, denominators: np.ndarray, num_resamples: int = NUM_RESAMPLES
) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of sum(numerators) / sum(denominators), resampling pairs (documents)."""
    generator = np.random.default_rng(0)
    drawn = generator.integers(len(numerators), size=(num_resamples, len(numerators)))
    ratios = numerators[drawn].sum(1) / denominators[drawn].sum(1)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return float(low), float(high)
