"""Mixtral: Mistral with experts of its own names."""

from collections.abc import Sequence
from typing import Any

from megatron_cpt.checkpoint.mapping import blocks
from megatron_cpt.checkpoint.mapping.family import Family
from megatron_cpt.checkpoint.mapping.kinds import Rule
from megatron_cpt.checkpoint.mapping.reader import (
    Reader,
    experts,
    grouped_query_attention,
    no_attention_bias,
    rope,
    transformer,
    window,
)
from megatron_cpt.checkpoint.mapping.writer import expert_keys, grouped_query_keys, transformer_keys
from megatron_cpt.config.settings.schema import ModelConfig

_BLOCK_SPARSE = blocks.HF_LAYER + "block_sparse_moe."
_EXPERTS = blocks.experts(
    _BLOCK_SPARSE + "gate.weight", [f"{_BLOCK_SPARSE}experts.{{e}}.{part}.weight" for part in ("w1", "w3", "w2")]
)


def _layer_rules(model: ModelConfig, layer: int) -> Sequence[Rule]:
    return blocks.layer_rules(model, layer, _EXPERTS)


def _read(reader: Reader) -> dict[str, Any]:
    no_attention_bias(reader)
    return {
        **transformer(reader),
        **grouped_query_attention(reader),
        **rope(reader),
        **window(reader, is_used=True),
        **experts(reader, normalised=True),
    }


def _write(model: ModelConfig) -> dict[str, Any]:
    keys = expert_keys(model)
    keys.pop("norm_topk_prob")
    return {
        **transformer_keys(model),
        **grouped_query_keys(model),
        **keys,
        "sliding_window": model.window_size,
        "num_local_experts": model.num_moe_experts,
        "intermediate_size": keys.pop("moe_intermediate_size"),
    }


FAMILY = Family(
    architecture="MixtralForCausalLM",
    model_type="mixtral",
    layer_rules=_layer_rules,
    read=_read,
    write=_write,
    defaults={
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "num_local_experts": 8,
        "router_aux_loss_coef": 0.001,
    },
)
