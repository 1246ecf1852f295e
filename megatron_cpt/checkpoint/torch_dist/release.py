"""Checkpoints that no training wrote (converted, averaged): what their manifest says, and whether one is made already."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from megatron_cpt.checkpoint.torch_dist import mcore
from megatron_cpt.config.settings.schema import ModelConfig
from megatron_cpt.errors import CheckpointError


def release_manifest(model: dict[str, Any], source: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Return the manifest of a `release` checkpoint; `source` tells what it was made of, `more` adds and overrides."""
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
    """Return whether `target` is a whole checkpoint made of `source`.

    Raises: CheckpointError when it is damaged, or was made of something else.
    """
    if not target.exists():
        return False
    manifest = mcore.verify_checkpoint(target, "size")
    if manifest.get("source") == json.loads(json.dumps(source)) and manifest["model"] == dataclasses.asdict(model):
        return True
    raise CheckpointError(
        f"{target}: exists already and was made of something else or with other options. A checkpoint is never "
        "overwritten. Remove it or choose another folder."
    )
