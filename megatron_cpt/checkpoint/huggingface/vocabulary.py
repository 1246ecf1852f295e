"""More rows for a vocabulary during conversion: old rows are unchanged, so that old tokens' logits do not change.

A new row is the mean of the old ones; or that mean plus noise of their covariance (scaled by 1e-5), which keeps the new
tokens apart; or the mean of the rows of the old tokens that spell the new token.

Source: J. Hewitt, "Initializing New Word Embeddings for Pretrained Language Models" (2021) for the first two.
"""

import json
import logging
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from megatron_cpt.checkpoint.huggingface.folder import HFFolder
from megatron_cpt.checkpoint.huggingface.read_config import family_of_config
from megatron_cpt.config.checks.vocabulary import rows_problem
from megatron_cpt.data.tokenizer.interface import (
    SentencePieceTokenizer,
    Tokenizer,
    load_tokenizer,
)
from megatron_cpt.errors import CheckpointError, DataError
from megatron_cpt.files import read_json, text_hash

logger = logging.getLogger(__name__)

NOISE_SCALE = 1e-5
_BLOCK_VALUES = 1 << 22


@dataclass(frozen=True, kw_only=True)
class VocabExtension:
    """How a vocabulary grows."""

    vocab_size: int
    """Rows afterwards."""
    method: Literal["mean", "noise", "subtokens"] = "mean"
    """mean of all old rows, that plus noise, or mean of the old sub-tokens' rows."""
    subtokens: Mapping[int, list[int]] = field(default_factory=dict)
    """New id -> old ids (subtokens); a new id that is not in it gets the mean."""
    num_old_ids: int | None = None
    """Ids of the old tokenizer: rows from there on were never trained (Qwen2.5 has 152,064 rows and 151,665 ids) and are
    initialised like those that are added. None: every old row was trained."""
    seed: int = 0
    """Of the noise."""
    tokenizer: Path | None = None
    """The tokenizer with the new tokens, stored with the checkpoint instead of the base's; None: the base's."""

    def trained_rows(self, rows: int) -> int:
        """Return how many of `rows` old rows belong to old tokens."""
        return rows if self.num_old_ids is None else min(self.num_old_ids, rows)

    def new_rows(self, weight: torch.Tensor, name: str) -> torch.Tensor:
        """Return the rows `[v_new - v_trained, h]` in fp32 that follow the trained ones of `weight` `[v_old, h]`."""
        first = self.trained_rows(len(weight))
        old = weight[:first]
        mean = old.mean(0, dtype=torch.float32)
        count = self.vocab_size - first
        rows = mean.repeat(count, 1)
        if self.method == "noise" and count:
            rows += NOISE_SCALE**0.5 * self._noise(old, mean, count, name) / first**0.5
        elif self.method == "subtokens":
            for new, parts in self.subtokens.items():
                if first <= new < self.vocab_size and parts:
                    rows[new - first] = old[parts].mean(0, dtype=torch.float32)
        return rows

    def _noise(self, old: torch.Tensor, mean: torch.Tensor, count: int, name: str) -> torch.Tensor:
        """Return `z @ (old - mean)` `[count, h]`, z ~ N(0, 1): over sqrt(v) it has the covariance of the old rows.

        In blocks of old rows, so that neither z nor a copy of the old rows is in memory as a whole.
        """
        generator = torch.Generator().manual_seed(self.seed + zlib.crc32(name.encode()))
        block = max(_BLOCK_VALUES // max(count, old.shape[1]), 1)
        noise = torch.zeros(count, old.shape[1])
        for start in range(0, len(old), block):
            part = old[start : start + block].float() - mean
            noise += torch.randn(count, len(part), generator=generator) @ part
        return noise


class ExtendedFolder(HFFolder):
    """A Hugging Face folder that reads as if its vocabulary had been extended."""

    def __init__(self, path: Path, extension: VocabExtension):
        super().__init__(path)
        old = self.config["vocab_size"]
        if extension.vocab_size < old:
            raise CheckpointError(
                f"{path}: vocabulary of {old}, asked for {extension.vocab_size}. A vocabulary only grows. Use a larger size."
            )
        problem = rows_problem(f"{path}: its tokenizer", extension.num_old_ids or 0, old)
        if problem:
            raise CheckpointError(problem)
        self.extension = extension
        self.config = {**self.config, "vocab_size": extension.vocab_size}
        family = family_of_config(self.config, str(path / "config.json"))
        self._extended = {family.embedding[0].hf[0], family.output_layer[0].hf[0]}

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape after the extension."""
        shape = super().shape(name)
        return (self.extension.vocab_size, *shape[1:]) if name in self._extended else shape

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor after the extension."""
        values = super().read(name)
        if name not in self._extended:
            return values
        kept = values[: self.extension.trained_rows(len(values))]
        return torch.cat((kept, self.extension.new_rows(values, name).to(values.dtype)))

    def fingerprint(self) -> dict[str, Any]:
        """Return the folder's fingerprint and the extension."""
        extension = self.extension
        subtokens = text_hash(json.dumps(sorted(extension.subtokens.items())))
        entry = [extension.vocab_size, extension.method, subtokens, extension.seed]
        return super().fingerprint() | {
            "extension": entry if extension.num_old_ids is None else [*entry, extension.num_old_ids]
        }


def extension_for(
    folder: Path,
    new_tokenizer: Path | None,
    *,
    rows: int | None,
    multiple: int = 1,
    method: Literal["mean", "noise", "subtokens"] = "mean",
) -> VocabExtension:
    """Return the extension of the model in `folder` to `rows` (None: one for each id of `new_tokenizer`), rounded up to a
    multiple of `multiple`.

    Raises: CheckpointError when an id would have no row, or an old token has another id in the new tokenizer.
    """
    config = read_json(folder / "config.json", CheckpointError)
    old_rows = config.get("vocab_size") if isinstance(config, dict) else None
    if not isinstance(old_rows, int):
        raise CheckpointError(f"{folder / 'config.json'}: vocab_size is {old_rows!r}. A whole number is needed.")
    old_ids = num_ids(folder)
    if old_ids is None:
        logger.warning("%s: no tokenizer that can be read; each of its %d rows counts as trained", folder, old_rows)
    new_ids = None if new_tokenizer is None else num_ids(new_tokenizer)
    if rows is None and new_ids is None:
        raise CheckpointError("--extend-vocab auto: a row for each id of the new tokenizer. Give --new-tokenizer.")
    wanted = max(old_rows, new_ids or 0) if rows is None else rows
    wanted = -(-wanted // multiple) * multiple
    if new_tokenizer is not None:
        check_new_tokenizer(new_tokenizer, wanted)
    subtokens = {}
    if method == "subtokens":
        if new_tokenizer is None:
            raise CheckpointError("--extend-method subtokens: spells new tokens with old ones. Give --new-tokenizer.")
        subtokens = subtokens_of_new_tokens(folder, new_tokenizer, old_rows if old_ids is None else old_ids)
    elif new_tokenizer is not None and old_ids is not None:
        _check_old_ids(_opened(folder), _opened(new_tokenizer), old_ids, (folder, new_tokenizer))
    return VocabExtension(
        vocab_size=wanted, method=method, subtokens=subtokens, num_old_ids=old_ids, tokenizer=new_tokenizer
    )


def check_new_tokenizer(new_tokenizer: Path, num_rows: int) -> None:
    """Refuse a tokenizer that has ids beyond the rows that a vocabulary will have.

    Raises: CheckpointError.
    """
    new_ids = _opened(new_tokenizer).vocab_size
    if problem := rows_problem(str(new_tokenizer), new_ids, num_rows, remedy=f"Give --extend-vocab {new_ids}."):
        raise CheckpointError(problem)


def num_ids(tokenizer: Path) -> int | None:
    """Return the largest id of a tokenizer and one, None where there is none that can be read."""
    try:
        return load_tokenizer(tokenizer, needs_eod=False).vocab_size
    except DataError:
        return None


def subtokens_of_new_tokens(old_tokenizer: Path, new_tokenizer: Path, num_old_ids: int) -> dict[int, list[int]]:
    """Return new id -> the old ids that spell its text, for every id from `num_old_ids` on.

    A folder of either kind: `tokenizer.json` or a SentencePiece model.

    Raises: CheckpointError when an old token has another id in the new tokenizer.
    """
    old, new = _opened(old_tokenizer), _opened(new_tokenizer)
    _check_old_ids(old, new, num_old_ids, (old_tokenizer, new_tokenizer))
    return {
        number: old.encode_batch([_text(new, number)])[0]
        for number in sorted(_vocabulary(new).values())
        if number >= num_old_ids
    }


def _opened(path: Path) -> Tokenizer:
    try:
        return load_tokenizer(path, needs_eod=False)
    except DataError as problem:
        raise CheckpointError(str(problem)) from None


def _check_old_ids(old: Tokenizer, new: Tokenizer, num_old_ids: int, paths: tuple[Path, Path]) -> None:
    vocabulary = _vocabulary(new)
    for token, number in _vocabulary(old).items():
        if number < num_old_ids and vocabulary.get(token, number) != number:
            raise CheckpointError(
                f"{paths[1]}: token {token!r} has id {vocabulary[token]}, {number} in {paths[0]}. "
                "Old tokens must keep their ids. Append new tokens instead."
            )


def _vocabulary(tokenizer: Tokenizer) -> dict[str, int]:
    backend: Any = getattr(tokenizer, "backend")  # noqa: B009
    if isinstance(tokenizer, SentencePieceTokenizer):
        return {backend.id_to_piece(number): number for number in range(backend.get_piece_size())}
    return dict(backend.get_vocab(with_added_tokens=True))


def _text(tokenizer: Tokenizer, number: int) -> str:
    backend: Any = getattr(tokenizer, "backend")  # noqa: B009
    if isinstance(tokenizer, SentencePieceTokenizer):
        return str(backend.decode([number]))
    return str(backend.decode([number], skip_special_tokens=False))
