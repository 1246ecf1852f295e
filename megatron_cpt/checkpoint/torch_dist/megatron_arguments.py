"""Megatron-LM's data other than tensors: arguments, iteration, optimizer settings. Read safely, written for it.

Megatron-Core up to 0.16 reads `common.pt`; later versions read the object `common_state` inside the DCP files, and
`common.pt` if there is one. Megatron-LM's loader (`megatron/training/checkpointing.py`, v0.12 to v0.16) takes from it
`args` (architecture checks, parallel sizes, consumed samples), `iteration`, `checkpoint_version`,
`num_floating_point_operations_so_far`, `content_metadata` and, for the optimizer, `param_groups` and
`opt_param_scheduler`. `args` holds plain values only, so that `weights_only` with `argparse.Namespace` allowed reads
it.
"""

import argparse
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_cpt.checkpoint.torch_dist.dcp import DcpReader
from megatron_cpt.checkpoint.torch_dist.pickles import load_safely
from megatron_cpt.config.settings.derived import kv_channels, num_query_groups, padded_vocab_size
from megatron_cpt.config.settings.schema import ModelConfig
from megatron_cpt.files import whole_file, write_json

COMMON = "common.pt"
COMMON_STATE = "common_state/shard_0_1"
"""Megatron-Core's name for the object that holds the common state (a list of one dictionary) since 0.17."""
CHECKPOINT_VERSION = 3.0
"""Megatron's version of the order inside merged query-key-value tensors."""
CONTENT = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": False,
    "non_homogeneous_layers": True,
    "singleton_local_shards": False,
    "chained_optim_avoid_prefix": True,
}
"""How keys and optimizer state are laid out; Megatron-LM builds its own names from it."""
METADATA_JSON = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


def megatron_args(model: ModelConfig, **others: Any) -> argparse.Namespace:
    """Return Megatron-LM's `args` for a model: its own names and plain values; `others` are added.

    Random states are ours (they follow from seed and iteration), so `no_save_rng` makes Megatron-LM not load them.
    """
    values: dict[str, Any] = {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.ffn_hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "group_query_attention": num_query_groups(model) != model.num_attention_heads,
        "num_query_groups": num_query_groups(model),
        "kv_channels": kv_channels(model),
        "max_position_embeddings": model.max_position_embeddings,
        "position_embedding_type": "rope",
        "add_position_embedding": True,  # its parser's value beside --position-embedding-type rope
        "rotary_base": model.rotary_base,
        "rotary_percent": 1.0,
        "normalization": "RMSNorm",
        "norm_epsilon": model.layernorm_epsilon,
        "swiglu": True,
        "add_bias_linear": False,
        "add_qkv_bias": model.add_qkv_bias,
        "qk_layernorm": model.qk_layernorm,
        "untie_embeddings_and_output_weights": model.untie_embeddings_and_output_weights,
        "vocab_size": model.vocab_size,
        "padded_vocab_size": padded_vocab_size(model),
        "make_vocab_size_divisible_by": model.make_vocab_size_divisible_by,
        "num_experts": model.num_moe_experts,
        "multi_latent_attention": model.multi_latent_attention,
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "consumed_train_samples": 0,
        "skipped_train_samples": 0,
        "consumed_valid_samples": 0,
        "ckpt_format": "torch_dist",
        "use_distributed_optimizer": True,
        "no_save_rng": True,
        "no_save_optim": False,
    }
    return argparse.Namespace(**values | others)


def param_groups(step: int) -> list[dict[str, Any]]:
    """Return the settings of Megatron's two groups of parameters, with and without weight decay, after `step` updates.

    Rates and decay are placeholders that the next training sets; groups are identified by their multipliers.
    """
    shared = {
        "lr": 0.0, "max_lr": 0.0, "min_lr": 0.0, "lr_mult": 1.0, "betas": (0.9, 0.95), "eps": 1e-8, "step": step,
        "bias_correction": True, "is_expert_parallel": False, "is_decoupled_lr": False, "default_config": True,
    }  # fmt: skip
    return [{**shared, "wd_mult": mult, "weight_decay": 0.0} for mult in (1.0, 0.0)]


def write_megatron_metadata(
    directory: Path, model: ModelConfig, *, step: int | None = None, iteration: int = 0, consumed_samples: int = 0
) -> None:
    """Write what megatron-core and Megatron-LM read besides the tensors; `step`: with an optimizer after that many updates."""
    arguments = megatron_args(
        model, consumed_train_samples=consumed_samples, iteration=iteration, no_save_optim=step is None
    )
    common: dict[str, Any] = {
        "args": arguments,
        "checkpoint_version": CHECKPOINT_VERSION,
        "iteration": iteration,
        "num_floating_point_operations_so_far": 0,
        "content_metadata": dict(CONTENT),
    }
    if step is not None:
        common["optimizer"] = {
            "optimizer": {"param_groups": param_groups(step)},
            "param_state_sharding_type": "fully_reshardable",
        }
    write_json(directory / "metadata.json", METADATA_JSON)
    write_common(directory, common)


def write_common(directory: Path, common: Mapping[str, Any]) -> None:
    """Write `common.pt`, whole or not at all."""
    with whole_file(directory / COMMON, "wb") as file:
        torch.save(dict(common), file)


def read_common(directory: Path, reader: DcpReader | None = None) -> dict[str, Any]:
    """Return the common state of a `torch_dist` folder, empty where it has none; `reader`: an open one of the folder.

    Raises: CheckpointError when it names a class that could run code.
    """
    path = directory / COMMON
    if path.exists():
        common = load_safely(path, os.fspath(path))
    else:
        reader = reader or DcpReader(directory)
        stored = reader.read_object(COMMON_STATE) if COMMON_STATE in reader.object_keys() else [{}]
        common = stored[0] if isinstance(stored, list) and stored else {}
    return common if isinstance(common, dict) else {}


def check_safe(directory: Path) -> None:
    """Raise CheckpointError when a pickle of a `torch_dist` folder holds more than weights, an index and arguments."""
    reader = DcpReader(directory)
    read_common(directory, reader)
    for key in reader.object_keys():
        reader.read_object(key)


def find_step(value: Any) -> int | None:
    """Return the number of updates in an optimizer's state, stored in a group or for all parameters."""
    if isinstance(value, dict):
        if value.get("common_step") is not None:
            return int(value["common_step"])
        groups = value.get("param_groups")
        if isinstance(groups, list):
            step = next((int(group["step"]) for group in groups if group.get("step") is not None), None)
            if step is not None:
                return step
        value = [part for name, part in value.items() if name not in ("param_state", "param_groups")]
    if isinstance(value, list):
        return next((step for part in value if (step := find_step(part)) is not None), None)
    return None
