"""Qwen 1.5, 2 and 2.5: a bias on queries, keys and values."""

from typing import Any

from megatron_cpt.checkpoint.mapping.family import Family
from megatron_cpt.checkpoint.mapping.reader import (
    Reader,
    grouped_query_attention,
    no_attention_bias,
    rope,
    transformer,
    window,
)
from megatron_cpt.checkpoint.mapping.writer import grouped_query_keys, transformer_keys, window_keys
from megatron_cpt.config.settings.schema import ModelConfig


def _read(reader: Reader) -> dict[str, Any]:
    no_attention_bias(reader)
    return {
        **transformer(reader),
        **grouped_query_attention(reader),
        **rope(reader),
        **window(reader, is_used=False, counts_full_layers=True),
        "add_qkv_bias": True,
    }


def _write(model: ModelConfig) -> dict[str, Any]:
    return {**transformer_keys(model), **grouped_query_keys(model), **window_keys(model)}


FAMILY = Family(
    architecture="Qwen2ForCausalLM",
    model_type="qwen2",
    read=_read,
    write=_write,
    defaults={"num_key_value_heads": 32, "max_position_embeddings": 32768},
)
