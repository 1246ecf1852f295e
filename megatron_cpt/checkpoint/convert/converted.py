"""Checkpoints that no training wrote (converted, averaged): their manifest, and whether one exists already."""

import json
from pathlib import Path
from typing import Any

from megatron_cpt.checkpoint.huggingface.read_config import TRAINING_FIELDS, differing_fields
from megatron_cpt.checkpoint.torch_dist import mcore
from megatron_cpt.config.settings.derived import padded_vocab_size
from megatron_cpt.config.settings.schema import ModelConfig
from megatron_cpt.errors import CheckpointError


def release_manifest(model: dict[str, Any], source: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Return the manifest of a `release` checkpoint; `source` describes its inputs, `more` adds and overrides."""
    return {
        "iteration": "release",
        "consumed_samples": 0,
        "consumed_tokens": 0,
        "tokens_per_corpus": {},
        "layout": {"tp": 1, "pp": 1},
        "tokenizer": None,
        "model": model,
        "config": None,
        "content": "weights",
        "hf": None,
        "source": source,
        **more,
    }


def is_made(target: Path, source: dict[str, Any], model: ModelConfig) -> bool:
    """Return whether `target` is a whole checkpoint made of `source`, of the same model.

    Models are compared by meaning: an unset setting equals its default value (`kv_channels`), and settings of training
    alone (dropout, initialisation) do not count.

    Raises: CheckpointError when it is damaged, or was made of something else, naming what differs.
    """
    if not target.exists():
        return False
    manifest = mcore.verify_checkpoint(target, "size")
    made, wanted = manifest.get("source") or {}, json.loads(json.dumps(source))
    different = [f"{key} of the source" for key in {**made, **wanted} if made.get(key) != wanted.get(key)]
    made_of = mcore.manifest_model(manifest, target)
    different += differing_fields(made_of, model, TRAINING_FIELDS)
    if padded_vocab_size(made_of) != padded_vocab_size(model):
        different.append(f"padded vocabulary: {padded_vocab_size(made_of)} != {padded_vocab_size(model)}")
    if not different:
        return True
    raise CheckpointError(
        f"{target}: exists already and was made of something else or with other options ({'; '.join(different)}). A "
        "checkpoint is never overwritten. Remove it or choose another folder."
    )
