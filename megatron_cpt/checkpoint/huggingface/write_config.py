"""A `config.json` for a model: the one its weights came from, or one derived from the ModelConfig.

Both styles are written (`rope_parameters` and `rope_theta`, `dtype` and `torch_dtype`), so that transformers 5 and older readers each
find their own. What is written is read back and must describe the same model.
"""

from typing import Any

from megatron_cpt.checkpoint.huggingface.read_config import (
    NEUTRAL,
    TRAINING_FIELDS,
    differing_fields,
    model_config_from_hf,
)
from megatron_cpt.checkpoint.mapping.rules import FAMILIES
from megatron_cpt.config.settings.derived import kv_channels, num_query_groups
from megatron_cpt.config.settings.schema import ModelConfig
from megatron_cpt.errors import CheckpointError


def hf_config_from_model(
    model: ModelConfig,
    base: dict[str, Any] | None = None,
    *,
    dtype: str | None = None,
    token_ids: dict[str, int | list[int] | None] | None = None,
) -> dict[str, Any]:
    """Return a `config.json` for `model`.

    `base`, the configuration that the weights came from, is returned as it is (but for `dtype`) when it describes `model`;
    otherwise its keys that do not touch the architecture are carried over. `token_ids` fills `bos_token_id` and such where
    `base` has none.

    Raises: CheckpointError when no known architecture computes what `model` says.
    """
    if base is not None and not differing_fields(model_config_from_hf(base), model, TRAINING_FIELDS):
        config = {key: value for key, value in base.items() if key not in ("dtype", "torch_dtype")}
    else:
        neutral = {key: value for key, value in (base or {}).items() if key in NEUTRAL - {"qk_head_dim"}}
        config = {**neutral, **_derived_config(model)}
        described = differing_fields(model_config_from_hf(config), model, TRAINING_FIELDS)
        if described:
            raise CheckpointError(
                f"model: {', '.join(described)} cannot be expressed by {config['architectures'][0]}, the nearest of "
                f"{', '.join(FAMILIES)}. The model cannot be exported."
            )
    for key, value in (token_ids or {}).items():
        if config.get(key) is None:
            config[key] = value
    if dtype is not None:
        config |= {"dtype": dtype, "torch_dtype": dtype}
    return config


def _derived_config(model: ModelConfig) -> dict[str, Any]:
    architecture = _nearest_architecture(model)
    model_type = FAMILIES[architecture].model_type
    config: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": model_type,
        "num_hidden_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": num_query_groups(model),
        "head_dim": model.qk_pos_emb_head_dim if model.multi_latent_attention else kv_channels(model),
        "vocab_size": model.vocab_size,
        "max_position_embeddings": model.max_position_embeddings,
        "rms_norm_eps": model.layernorm_epsilon,
        "initializer_range": model.init_method_std,
        "attention_dropout": model.attention_dropout,
        "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
        "hidden_act": "silu",
        **_derived_rope(model),
    }
    if model_type in ("mistral", "mixtral"):
        config["sliding_window"] = model.window_size
    elif model_type.startswith("qwen"):
        config |= {"use_sliding_window": model.window_size is not None, "sliding_window": model.window_size}
        config["max_window_layers"] = 0 if model.window_size else model.num_layers
    if not model_type.startswith("qwen2") and model_type not in ("mistral", "mixtral"):
        config["attention_bias"] = False
    if model.multi_latent_attention:
        config |= _derived_latent_attention(model)
    if FAMILIES[architecture].experts:
        config |= _derived_experts(model, model_type)
    return config


def _nearest_architecture(model: ModelConfig) -> str:
    if model.multi_latent_attention:
        is_v3 = model.num_moe_experts is None or model.moe_router_score_function == "sigmoid"
        return "DeepseekV3ForCausalLM" if is_v3 else "DeepseekV2ForCausalLM"
    if model.num_moe_experts is not None:
        return "Qwen3MoeForCausalLM" if model.qk_layernorm else "MixtralForCausalLM"
    if model.qk_layernorm:
        return "Qwen3ForCausalLM"
    if model.add_qkv_bias:
        return "Qwen2ForCausalLM"
    return "MistralForCausalLM" if model.window_size else "LlamaForCausalLM"


def _derived_rope(model: ModelConfig) -> dict[str, Any]:
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


def _derived_latent_attention(model: ModelConfig) -> dict[str, Any]:
    config = {
        "num_key_value_heads": model.num_attention_heads,
        "q_lora_rank": model.q_lora_rank,
        "kv_lora_rank": model.kv_lora_rank,
        "qk_nope_head_dim": model.qk_head_dim,
        "qk_rope_head_dim": model.qk_pos_emb_head_dim,
        "v_head_dim": model.v_head_dim,
    }
    return config if model.num_moe_experts else config | {"n_routed_experts": 1, "num_experts_per_tok": 1}


def _derived_experts(model: ModelConfig, model_type: str) -> dict[str, Any]:
    if model.num_moe_experts is None:
        return {"first_k_dense_replace": model.num_layers, "moe_intermediate_size": model.ffn_hidden_size}
    width = model.moe_ffn_hidden_size or model.ffn_hidden_size
    config: dict[str, Any] = {
        "num_experts_per_tok": model.moe_router_topk,
        "router_aux_loss_coef": model.moe_aux_loss_coeff,
    }
    if model_type == "mixtral":
        return config | {"num_local_experts": model.num_moe_experts, "intermediate_size": width}
    config |= {"moe_intermediate_size": width, "norm_topk_prob": not model.moe_router_pre_softmax}
    if model_type == "qwen3_moe":
        dense = list(range(model.moe_num_dense_layers))
        return config | {"num_experts": model.num_moe_experts, "decoder_sparse_step": 1, "mlp_only_layers": dense}
    config.pop("router_aux_loss_coef")
    is_v3 = model_type == "deepseek_v3"
    groups = model.moe_router_num_groups
    return config | {
        "n_routed_experts": model.num_moe_experts,
        "n_shared_experts": (model.moe_shared_expert_intermediate_size or 0) // width or None,
        "first_k_dense_replace": model.moe_num_dense_layers,
        "routed_scaling_factor": model.moe_router_topk_scaling_factor or 1.0,
        "n_group": groups or (1 if is_v3 else None),
        "topk_group": model.moe_router_group_topk or (1 if is_v3 else None),
        "topk_method": "noaux_tc" if is_v3 else ("group_limited_greedy" if groups else "greedy"),
        "scoring_func": model.moe_router_score_function,
        "norm_topk_prob": is_v3 or not model.moe_router_pre_softmax,
    }
