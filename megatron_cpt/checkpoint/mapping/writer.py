"""Keys of config.json that describe a model, in both styles, so that transformers 4 and 5 read the same model."""

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_cpt.config.settings.derived import kv_channels, num_query_groups
from megatron_cpt.config.settings.schema import ModelConfig


def transformer_keys(model: ModelConfig) -> dict[str, Any]:
    """Return the keys that every decoder has."""
    return {
        "num_hidden_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "vocab_size": model.vocab_size,
        "max_position_embeddings": model.max_position_embeddings,
        "rms_norm_eps": model.layernorm_epsilon,
        "initializer_range": model.init_method_std,
        "attention_dropout": model.attention_dropout,
        "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
        "hidden_act": "silu",
        **rope_keys(model),
    }


def grouped_query_keys(model: ModelConfig) -> dict[str, Any]:
    """Return the keys of attention with heads that share keys and values."""
    return {"num_key_value_heads": num_query_groups(model), "head_dim": kv_channels(model)}


def rope_keys(model: ModelConfig) -> dict[str, Any]:
    """Return the keys of rotary positions in both styles."""
    if model.rope_scaling_type == "none":
        rope = {"rope_type": "default", "rope_theta": model.rotary_base}
        return {"rope_theta": model.rotary_base, "rope_scaling": None, "rope_parameters": rope}
    scaling: dict[str, Any] = {"rope_type": model.rope_scaling_type, "factor": model.rope_scaling_factor}
    if model.rope_scaling_type in ("llama3", "yarn"):
        original = model.rope_original_max_position_embeddings or model.max_position_embeddings
        scaling["original_max_position_embeddings"] = original
    if model.rope_scaling_type == "llama3":
        scaling |= {"low_freq_factor": model.rope_low_freq_factor, "high_freq_factor": model.rope_high_freq_factor}
    if model.rope_scaling_type == "yarn":
        scaling |= {"beta_fast": model.rope_beta_fast, "beta_slow": model.rope_beta_slow}
        if model.multi_latent_attention:
            scaling |= {"mscale": model.rope_mscale, "mscale_all_dim": model.rope_mscale_all_dim}
    rope = {**scaling, "rope_theta": model.rotary_base}
    return {"rope_theta": model.rotary_base, "rope_scaling": scaling, "rope_parameters": rope}


def window_keys(model: ModelConfig) -> dict[str, Any]:
    """Return the keys of Qwen's attention window."""
    return {
        "use_sliding_window": model.window_size is not None,
        "sliding_window": model.window_size,
        "max_window_layers": 0 if model.window_size else model.num_layers,
    }


def expert_keys(model: ModelConfig) -> dict[str, Any]:
    """Return the keys of a router and its experts but for their number, whose name differs."""
    return {
        "num_experts_per_tok": model.moe_router_topk,
        "router_aux_loss_coef": model.moe_aux_loss_coeff,
        "moe_intermediate_size": model.moe_ffn_hidden_size or model.ffn_hidden_size,
        "norm_topk_prob": not model.moe_router_pre_softmax,
    }


def both_styles(
    config: Mapping[str, Any], aliases: Sequence[tuple[str, str]], theta: float | None = None
) -> dict[str, Any]:
    """Return a configuration with each key under the names of transformers 4 and of 5.

    A base saved by transformers 5 has `rope_parameters` only, and 4 then takes theta 10,000 without a word. `theta` is
    the default of a configuration without one.
    """
    result = dict(config)
    for one, other in (*aliases, ("torch_dtype", "dtype")):
        value = config.get(other, config.get(one))
        if value is not None:
            result[one] = result[other] = value
    older, newer = config.get("rope_scaling"), config.get("rope_parameters")
    if any(isinstance(part, dict) for part in {**(older or {}), **(newer or {})}.values()):
        return result  # one for each kind of layer: the architecture's own file writes what both read
    theta = (newer or {}).get("rope_theta", config.get("rope_theta", theta))
    scaling = {key: value for key, value in {**(older or newer or {})}.items() if key != "rope_theta"}
    if "rope_type" not in scaling:
        scaling = {"rope_type": scaling.get("type", "default"), **scaling}
    theta = (older or {}).get("rope_theta", theta)
    if theta is not None:
        result["rope_theta"] = theta
        is_plain = scaling["rope_type"] == "default"
        result["rope_scaling"] = None if is_plain else scaling
        result["rope_parameters"] = {**({"rope_type": "default"} if is_plain else scaling), "rope_theta": theta}
    return result
