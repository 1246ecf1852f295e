"""More rows for a vocabulary during conversion: old rows stay as they are, so that old tokens' logits do not change.

A new row is the mean of the old ones; or that mean plus noise of their covariance (scaled by 1e-5), which keeps the new
tokens apart; or the mean of the rows of the old tokens that spell the new token.

Source: J. Hewitt, "Initializing New Word Embeddings for Pretrained Language Models" (2021) for the first two.
"""

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from megatron_cpt.checkpoint.huggingface.folder import HFFolder
from megatron_cpt.config.checks.vocabulary import rows_problem
from megatron_cpt.data.tokenizer.folder import save_remedy
from megatron_cpt.data.tokenizer.interface import HuggingFaceTokenizer, load_tokenizer
from megatron_cpt.errors import CheckpointError
from megatron_cpt.files import text_hash

EXTENDED_TENSORS = ("model.embed_tokens.weight", "lm_head.weight")
NOISE_SCALE = 1e-5


@dataclass(frozen=True, kw_only=True)
class VocabExtension:
    """How a vocabulary grows."""

    vocab_size: int
    """Rows afterwards."""
    method: Literal["mean", "noise", "subtokens"] = "mean"
    """mean of all old rows, that plus noise, or mean of the old sub-tokens' rows."""
    subtokens: Mapping[int, list[int]] = field(default_factory=dict)
    """New id -> old ids (subtokens); a new id that is not in it gets the mean."""
    seed: int = 0
    """Of the noise."""

    def new_rows(self, weight: torch.Tensor, name: str) -> torch.Tensor:
        """Return the rows `[v_new - v_old, h]` in fp32 that follow `weight` `[v_old, h]`."""
        old = weight.float()
        mean = old.mean(0)
        count = self.vocab_size - len(old)
        rows = mean.repeat(count, 1)
        if self.method == "noise":
            generator = torch.Generator().manual_seed(self.seed + zlib.crc32(name.encode()))
            # (x - mean) @ z / sqrt(v) with z ~ N(0, 1) over old rows has the old rows' covariance
            draws = torch.randn(count, len(old), generator=generator)
            rows += NOISE_SCALE**0.5 * (draws @ (old - mean)) / len(old) ** 0.5
        elif self.method == "subtokens":
            for new, parts in self.subtokens.items():
                if len(old) <= new < self.vocab_size and parts:
                    rows[new - len(old)] = old[parts].mean(0)
        return rows


class ExtendedFolder(HFFolder):
    """A Hugging Face folder that reads as if its vocabulary had been extended."""

    def __init__(self, path: Path, extension: VocabExtension):
        super().__init__(path)
        old = self.config["vocab_size"]
        if extension.vocab_size < old:
            raise CheckpointError(
                f"{path}: vocabulary of {old}, asked for {extension.vocab_size}. A vocabulary only grows. Use a larger size."
            )
        self.extension = extension
        self.config = {**self.config, "vocab_size": extension.vocab_size}

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape after the extension."""
        shape = super().shape(name)
        return (self.extension.vocab_size, *shape[1:]) if name in EXTENDED_TENSORS else shape

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor after the extension."""
        values = super().read(name)
        if name not in EXTENDED_TENSORS:
            return values
        return torch.cat((values, self.extension.new_rows(values, name).to(values.dtype)))

    def fingerprint(self) -> dict[str, Any]:
        """Return the folder's fingerprint and the extension."""
        extension = self.extension
        subtokens = text_hash(json.dumps(sorted(extension.subtokens.items())))
        return super().fingerprint() | {
            "extension": [extension.vocab_size, extension.method, subtokens, extension.seed]
        }


def subtokens_of_new_tokens(old_tokenizer: Path, new_tokenizer: Path, old_vocab_size: int) -> dict[int, list[int]]:
    """Return new id -> the old ids that spell its text, for every id from `old_vocab_size` on.

    Raises: CheckpointError when an old token has another id in the new tokenizer.
    """
    old, new = (_backend(path) for path in (old_tokenizer, new_tokenizer))
    vocabulary = new.get_vocab(with_added_tokens=True)
    for token, number in old.get_vocab(with_added_tokens=True).items():
        if number < old_vocab_size and vocabulary.get(token, number) != number:
            raise CheckpointError(
                f"{new_tokenizer}: token {token!r} has id {vocabulary[token]}, {number} in {old_tokenizer}. "
                "Old tokens must keep their ids. Append new tokens instead."
            )
    return {
        number: old.encode(new.decode([number], skip_special_tokens=False), add_special_tokens=False).ids
        for number in sorted(vocabulary.values())
        if number >= old_vocab_size
    }


def check_new_tokenizer(new_tokenizer: Path, num_rows: int) -> None:
    """Refuse a tokenizer that has ids beyond the rows that a vocabulary will have.

    Raises: CheckpointError.
    """
    num_ids = load_tokenizer(new_tokenizer, needs_eod=False).vocab_size
    remedy = f"Give --extend-vocab {num_ids}."
    if problem := rows_problem(str(new_tokenizer), num_ids, num_rows, remedy=remedy):
        raise CheckpointError(problem)


def _backend(path: Path) -> Any:
    tokenizer = load_tokenizer(path, needs_eod=False)
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        raise CheckpointError(
            f"{path}: is a SentencePiece model. New tokens are spelled with a tokenizer.json. {save_remedy(path)}"
        )
    return tokenizer.backend
