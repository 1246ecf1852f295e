"""Ids of tokens against rows of a model: the one comparison of a tokenizer, token files or a new vocabulary with a model.

A model has `model.vocab_size` rows that mean a token, padded to `make_vocab_size_divisible_by`; padded rows are never
trained and never exported, so an id in them, or above them, is an error in every place that combines model and
tokenizer: tokenizing's consumers, plans, submission, training, vocabulary extension and export.
"""

from megatron_cpt.config.settings.derived import padded_vocab_size
from megatron_cpt.config.settings.schema import ModelConfig


def vocabulary_problem(whose: str, num_ids: int, model: ModelConfig, remedy: str = "") -> str | None:
    """Return why `num_ids` ids (the largest and one) do not fit a model's rows, None where they do."""
    if num_ids <= model.vocab_size:
        return None
    return rows_problem(whose, num_ids, model.vocab_size, padded_vocab_size(model), remedy)


def rows_problem(whose: str, num_ids: int, rows: int, padded_rows: int | None = None, remedy: str = "") -> str | None:
    """Return why `num_ids` ids do not fit `rows` rows, None where they do; padded rows are named, and do not help."""
    if num_ids <= rows:
        return None
    padded = "" if padded_rows is None else f" ({padded_rows:,} with padding, which is not trained)"
    remedy = remedy or (
        "Name the model's own tokenizer, or grow the model: `megatron-cpt convert hf-to-mcore --extend-vocab "
        f"{num_ids}`, and model.vocab_size with it."
    )
    return f"{whose} has ids up to {num_ids - 1:,}; the model has {rows:,} rows{padded}. Each id needs a row. {remedy}"
