"""Mistral 7B and its successors: Llama with an attention window in every layer, or in none."""

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
        **window(reader, is_used=True),
    }


def _write(model: ModelConfig) -> dict[str, Any]:
    return {**transformer_keys(model), **grouped_query_keys(model), "sliding_window": model.window_size}


FAMILY = Family(
    architecture="MistralForCausalLM",
    model_type="mistral",
    read=_read,
    write=_write,
    defaults={"sliding_window": 4096, "num_key_value_heads": 8, "max_position_embeddings": 131072},
)
