"""Llama 2 and 3, and the many models that are saved as Llama."""

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
from megatron_cpt.checkpoint.mapping.writer import grouped_query_keys, transformer_keys
from megatron_cpt.config.settings.schema import ModelConfig


def _read(reader: Reader) -> dict[str, Any]:
    no_attention_bias(reader)
    return {
        **transformer(reader),
        **grouped_query_attention(reader),
        **rope(reader),
        **window(reader, is_used=False),
    }


def _write(model: ModelConfig) -> dict[str, Any]:
    return {**transformer_keys(model), **grouped_query_keys(model), "attention_bias": False}


FAMILY = Family(architecture="LlamaForCausalLM", model_type="llama", read=_read, write=_write)
