"""How a shard is to be read in training: with a mask or without, as packs of a length or as a stream of documents.

`data/shards/masked.py` defines the format of masks and packs.
"""

from dataclasses import dataclass
from pathlib import Path

from megatron_cpt.data.shards.indexed import manifest_path
from megatron_cpt.data.shards.masked import has_mask
from megatron_cpt.errors import DataError
from megatron_cpt.files import read_json_object


@dataclass(frozen=True, kw_only=True)
class ShardForm:
    """How a shard is to be read."""

    is_masked: bool = False
    packed_seq_length: int | None = None
    """Tokens of each pack; None: an unpacked shard."""
    marks_prompts: bool = False
    """Whether the mask marks the tokens of prompts."""


def read_shard_form(prefix: Path) -> ShardForm:
    """Return whether a shard is masked and packed, from its manifest and its side files.

    Raises: DataError when the manifest is no JSON, or a packed shard has no mask.
    """
    path = manifest_path(prefix)
    manifest = read_json_object(path, DataError) if path.exists() else {}
    packed = manifest.get("packed")
    is_masked = manifest.get("mask") is not None or has_mask(prefix)
    if packed is not None and not is_masked:
        raise DataError(f"{prefix}: is packed and has no mask, so that its pieces cannot be told apart. Pack it again.")
    return ShardForm(
        is_masked=is_masked,
        packed_seq_length=None if packed is None else int(packed["seq_length"]),
        marks_prompts="prompt" in (manifest.get("mask") or {}),
    )


def prompt_problem(form: ShardForm) -> str | None:
    """Return what is wrong with weighing the prompts of a shard, None where nothing is."""
    if not form.is_masked or form.marks_prompts:
        return None
    return (
        "has a mask that does not say which tokens are a prompt's, for data.prompt_loss_weight. Make it again with "
        "`megatron-cpt data prepare-chat`, or set the weight to 0."
    )


def packing_problem(packed_seq_length: int | None, seq_length: int) -> str | None:
    """Return what is wrong with training at `seq_length` from packs of a length, None where nothing is."""
    if packed_seq_length in (None, seq_length):
        return None
    return (
        f"is packed for sequences of {packed_seq_length:,} tokens; training.seq_length is {seq_length:,}. A pack is one "
        "sample. Pack it for that length, or change training.seq_length."
    )
