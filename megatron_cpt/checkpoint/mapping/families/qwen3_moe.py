"""Qwen 3 with experts."""

from typing import Any

from megatron_cpt.checkpoint.mapping.family import Family
from megatron_cpt.checkpoint.mapping.reader import (
    Reader,
    experts,
    grouped_query_attention,
    no_attention_bias,
    rope,
    transformer,
    window,
)
from megatron_cpt.checkpoint.mapping.writer import expert_keys, grouped_query_keys, transformer_keys, window_keys
from megatron_cpt.config.settings.schema import ModelConfig


def _read(reader: Reader) -> dict[str, Any]:
    no_attention_bias(reader)
    dense = list(reader.take("mlp_only_layers", None) or ())
    if dense != list(range(len(dense))):
        reader.refuse("mlp_only_layers", dense, "dense layers before the others")
    return {
        **transformer(reader),
        **grouped_query_attention(reader),
        **rope(reader),
        **window(reader, is_used=False, counts_full_layers=True),
        **experts(reader, normalised=False),
        "qk_layernorm": True,
        "moe_num_dense_layers": len(dense),
    }


def _write(model: ModelConfig) -> dict[str, Any]:
    return {
        **transformer_keys(model),
        **grouped_query_keys(model),
        **window_keys(model),
        **expert_keys(model),
        "attention_bias": False,
        "num_experts": model.num_moe_experts,
        "num_local_experts": model.num_moe_experts,
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(range(model.moe_num_dense_layers)),
    }


FAMILY = Family(
    architecture="Qwen3MoeForCausalLM",
    model_type="qwen3_moe",
    read=_read,
    write=_write,
    required={"shared_expert_intermediate_size": (0, None), "use_qk_norm": (True,), "qkv_bias": (False,)},
    aliases=(("num_experts", "num_local_experts"),),
    defaults={"num_key_value_heads": 4, "max_position_embeddings": 32768, "num_experts_per_tok": 8},
)
