"""The choices of a conversion, in each direction."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_cpt.checkpoint.huggingface.vocabulary import VocabExtension

DEFAULT_SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True, kw_only=True)
class ImportChoices:
    """From Hugging Face to Megatron."""

    dtype: str | None = None
    """fp32, bf16 or fp16; None: unchanged. The router's bias keeps its type."""
    make_vocab_size_divisible_by: int = 128
    """Multiple to which the vocabulary is padded, where no model description says it."""
    extension: VocabExtension | None = None
    """Rows to add to the vocabulary."""
    skip_tensors: Sequence[str] = ()
    """Globs of tensors to leave out; the manifest remembers them."""
    ignore_config: Sequence[str] = ()
    """Keys of config.json that change nothing; the manifest remembers them."""
    drop_mtp: bool = False
    """Whether the layers that predict further tokens are left out; they are not trained."""
    allow_nonfinite: bool = False
    """Whether NaN and infinity pass."""


@dataclass(frozen=True, kw_only=True)
class ExportChoices:
    """From Megatron to Hugging Face."""

    dtype: str | None = None
    """fp32, bf16 or fp16; None: unchanged."""
    tokenizer: Path | None = None
    """A folder, `tokenizer.json` or SentencePiece model to copy; None: the files that the checkpoint kept of its base."""
    max_shard_bytes: int = DEFAULT_SHARD_BYTES
    extra_files: Mapping[str, Any] | None = None
    """File name -> JSON value, written to the same folder."""
    allow_nonfinite: bool = False
    """Whether NaN and infinity pass."""
