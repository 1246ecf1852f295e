"""Hugging Face `config.json` to our ModelConfig, for the architectures in `mapping.FAMILIES`.

Reads the style of transformers 5 (`rope_parameters`, `dtype`) and the older one (`rope_theta`, `rope_scaling`, `torch_dtype`). Every key must be understood, known to change nothing,
or hold the one value that Megatron computes; anything else is an error that names it.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from megatron_cpt.checkpoint.mapping.rules import FAMILIES, family_of
from megatron_cpt.config.settings.derived import kv_channels, num_query_groups
from megatron_cpt.config.settings.schema import ModelConfig
from megatron_cpt.errors import CheckpointError

TRAINING_FIELDS = {
    "make_vocab_size_divisible_by",
    "init_method_std",
    "hidden_dropout",
    "attention_dropout",
    "moe_aux_loss_coeff",
    "moe_z_loss_coeff",
    "moe_router_bias_update_rate",
}
"""Fields of ModelConfig that a trained model's function does not depend on."""
POSITION_FIELDS = {
    "max_position_embeddings",
    "rotary_base",
    *(field.name for field in dataclasses.fields(ModelConfig) if field.name.startswith("rope_")),
}
"""Fields that may differ on purpose between two stages (a longer context) although the weights are the same."""

NEUTRAL = {
    *(
        "architectures",
        "model_type",
        "transformers_version",
        "dtype",
        "torch_dtype",
        "_name_or_path",
        "auto_map",
        "name_or_path",
    ),
    *("use_cache", "return_dict", "output_hidden_states", "output_attentions", "output_router_logits", "output_scores"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id", "unk_token_id"),
    *("forced_bos_token_id", "forced_eos_token_id", "bad_words_ids", "suppress_tokens", "begin_suppress_tokens"),
    *("id2label", "label2id", "num_labels", "problem_type", "finetuning_task", "task_specific_params", "prefix"),
    *(
        "tokenizer_class",
        "chunk_size_feed_forward",
        "torchscript",
        "tie_encoder_decoder",
        "use_bfloat16",
        "tf_legacy_loss",
    ),
    *("max_length", "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups", "diversity_penalty"),
    *("temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size"),
    *(
        "encoder_no_repeat_ngram_size",
        "num_return_sequences",
        "remove_invalid_values",
        "exponential_decay_length_penalty",
    ),
    *(
        "return_dict_in_generate",
        "_attn_implementation",
        "attn_implementation",
        "_flash_attn_2_enabled",
        "pretraining_tp",
    ),
    *("original_vocab_size", "max_window_layers", "num_nextn_predict_layers", "ep_size", "seq_aux", "aux_loss_alpha"),
    *("_commit_hash", "generation_config", "qk_head_dim", "_experts_implementation"),
}
"""Keys that change nothing in the forward pass, or are kept beside the model (`hf` in the manifest)."""
_REQUIRED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "mlp_bias": (False,),
    "is_encoder_decoder": (False,),
    "is_decoder": (False,),
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (None,),
    "pruned_heads": ({}, None),
    "decoder_sparse_step": (1,),
    "moe_layer_freq": (1,),
    "router_jitter_noise": (0, 0.0),
    "rope_interleave": (True,),
    "partial_rotary_factor": (1, 1.0),
    "clip_qkv": (None,),
    "quantization_config": (None,),
    "use_sliding_window_layers": (None,),
}
"""Keys that must be absent or hold one of these values."""


def model_config_from_hf(config: dict[str, Any], *, ignore: Sequence[str] = ()) -> ModelConfig:
    """Return the model that a Hugging Face configuration describes; keys in `ignore` are not looked at.

    Raises: CheckpointError naming the key that is not understood, or whose value Megatron-Core cannot compute.
    """
    reader = _Reader(config, ignore)
    family = family_of(architecture_name(config))
    fields: dict[str, Any] = {
        "num_layers": reader.take("num_hidden_layers"),
        "hidden_size": reader.take("hidden_size"),
        "ffn_hidden_size": reader.take("intermediate_size"),
        "num_attention_heads": reader.take("num_attention_heads"),
        "vocab_size": reader.take("vocab_size"),
        "max_position_embeddings": reader.take("max_position_embeddings", 2048),
        "layernorm_epsilon": reader.take("rms_norm_eps", 1e-6),
        "init_method_std": reader.take("initializer_range", 0.02),
        "attention_dropout": reader.take("attention_dropout", 0.0),
        "untie_embeddings_and_output_weights": not reader.take("tie_word_embeddings", False),
        **_rope(reader, is_latent=family.model_type.startswith("deepseek")),
        **_window(reader, family.model_type),
    }
    bias = reader.take("attention_bias", False)
    if bias:
        reader.refuse("attention_bias", bias, "False (a bias on the output projection has no place)")
    if family.model_type.startswith("deepseek"):
        fields |= _latent_attention(reader)
    else:
        heads = fields["num_attention_heads"]
        fields["num_query_groups"] = reader.take("num_key_value_heads", None) or heads
        head = reader.take("head_dim", None)
        fields["kv_channels"] = head or fields["hidden_size"] // heads
        fields["add_qkv_bias"] = family.model_type == "qwen2"
        fields["qk_layernorm"] = family.model_type in ("qwen3", "qwen3_moe")
    if family.experts:
        fields |= _experts(reader, family.model_type, fields)
    reader.finish()
    return ModelConfig(**fields)


def architecture_name(config: dict[str, Any]) -> str:
    """Return the architecture that a configuration names. Raises: CheckpointError when it names none that is known."""
    names = config.get("architectures") or []
    if len(names) == 1:
        return names[0]
    by_type = [name for name, family in FAMILIES.items() if family.model_type == config.get("model_type")]
    if not by_type:
        raise CheckpointError(
            f"config.json: architectures {names}, model_type {config.get('model_type')!r}. Known: {', '.join(FAMILIES)}."
        )
    return by_type[0]


def architecture_keys(config: dict[str, Any]) -> dict[str, Any]:
    """Return the keys of a configuration that may change what the model computes."""
    return {key: value for key, value in config.items() if key not in NEUTRAL}


def differing_fields(left: ModelConfig, right: ModelConfig, but: set[str] = frozenset()) -> list[str]:  # type: ignore[assignment]
    """Return `field: left != right` for each field that means another model, leaving out `but`."""
    left_values, right_values = _effective(left), _effective(right)
    return [
        f"{name}: {left_values[name]} != {right_values[name]}"
        for name in left_values
        if name not in but and left_values[name] != right_values[name]
    ]


class _Reader:
    """Takes keys out of a configuration and remembers which."""

    def __init__(self, config: dict[str, Any], ignore: Sequence[str]):
        self.config = config
        self.name = config.get("_name_or_path") or "config.json"
        self.taken = set(ignore)

    def take(self, key: str, *default: Any) -> Any:
        """Return the value of `key`, or the default where it is absent."""
        self.taken.add(key)
        if key not in self.config:
            if default:
                return default[0]
            raise CheckpointError(f"{self.name}: no {key}. A Hugging Face model configuration is needed.")
        return self.config[key]

    def refuse(self, key: str, value: Any, needed: str) -> None:
        """Raise the error of a value that cannot be computed."""
        raise CheckpointError(
            f"{self.name}: {key} is {value!r}. {needed} is what Megatron-Core computes. This model cannot be converted."
        )

    def finish(self) -> None:
        """Raise for a key that nobody took, or whose value would have to be another."""
        for key, value in self.config.items():
            if key in self.taken or key in NEUTRAL:
                continue
            if key not in _REQUIRED:
                raise CheckpointError(
                    f"{self.name}: key {key} (value {str(value)[:60]!r}) is not understood. Every key must be, because it may "
                    f"change what the model computes. Use --ignore-config {key} if it does not."
                )
            if value not in _REQUIRED[key]:
                self.refuse(key, value, " or ".join(repr(choice) for choice in _REQUIRED[key]))


def _rope(reader: _Reader, *, is_latent: bool) -> dict[str, Any]:
    top_theta = reader.take("rope_theta", None)
    scaling = reader.take("rope_scaling", None)
    rope = dict(scaling or reader.take("rope_parameters", None) or {})
    reader.taken.add("rope_parameters")
    theta = rope.pop("rope_theta", top_theta)
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    rope.pop("type", None)
    fields: dict[str, Any] = {"rotary_base": float(10000.0 if theta is None else theta)}
    if rope.pop("partial_rotary_factor", 1.0) != 1.0:
        reader.refuse("partial_rotary_factor", rope, "1.0")
    known = {
        "factor": "rope_scaling_factor",
        "original_max_position_embeddings": "rope_original_max_position_embeddings",
    }
    if kind == "llama3":
        known |= {"low_freq_factor": "rope_low_freq_factor", "high_freq_factor": "rope_high_freq_factor"}
    elif kind == "yarn":
        names = ("beta_fast", "beta_slow", *(("mscale", "mscale_all_dim") if is_latent else ()))
        known |= {name: f"rope_{name}" for name in names}
        if rope.pop("attention_factor", None) is not None or rope.pop("truncate", True) is not True:
            reader.refuse("rope_parameters", rope, "yarn without attention_factor and with truncate")
    elif kind not in ("default", "linear"):
        reader.refuse("rope_type", kind, "default, linear, llama3 or yarn")
    unknown = sorted(set(rope) - set(known))
    if unknown and kind != "default":
        reader.refuse("rope_parameters", rope, f"a dictionary without {', '.join(unknown)}")
    if kind == "default":
        return fields
    fields["rope_scaling_type"] = kind
    return fields | {ours: rope[theirs] for theirs, ours in known.items() if rope.get(theirs) is not None}


def _window(reader: _Reader, model_type: str) -> dict[str, Any]:
    window = reader.take("sliding_window", None)
    in_use = reader.take("use_sliding_window", model_type in ("mistral", "mixtral"))
    layer_types = set(reader.take("layer_types", None) or ())
    if len(layer_types) > 1 or layer_types - {"full_attention", "sliding_attention"}:
        reader.refuse("layer_types", sorted(layer_types), "the same attention in every layer")
    if layer_types:
        in_use = layer_types == {"sliding_attention"}
    elif in_use and model_type.startswith("qwen") and reader.config.get("max_window_layers", 0) > 0:
        reader.refuse("max_window_layers", reader.config["max_window_layers"], "the same attention in every layer (0)")
    return {"window_size": window} if in_use and window else {}


def _latent_attention(reader: _Reader) -> dict[str, Any]:
    reader.taken |= {"head_dim", "num_key_value_heads"}
    epsilon = reader.take("rms_norm_eps", 1e-6)
    if epsilon != 1e-6:
        reader.refuse("rms_norm_eps", epsilon, "1e-6, transformers' fixed epsilon of the latent norms, in all norms")
    return {
        "multi_latent_attention": True,
        "qk_layernorm": True,
        "q_lora_rank": reader.take("q_lora_rank", None),
        "kv_lora_rank": reader.take("kv_lora_rank"),
        "qk_head_dim": reader.take("qk_nope_head_dim"),
        "qk_pos_emb_head_dim": reader.take("qk_rope_head_dim"),
        "v_head_dim": reader.take("v_head_dim"),
    }


def _experts(reader: _Reader, model_type: str, fields: dict[str, Any]) -> dict[str, Any]:
    layers = fields["num_layers"]
    experts = [reader.take(key, None) for key in ("num_local_experts", "num_experts", "n_routed_experts")]
    normalised = bool(reader.take("norm_topk_prob", model_type == "mixtral"))
    moe: dict[str, Any] = {
        "num_moe_experts": next((number for number in experts if number is not None), None),
        "moe_ffn_hidden_size": reader.take("moe_intermediate_size", fields["ffn_hidden_size"]),
        "moe_router_topk": reader.take("num_experts_per_tok", None) or 2,
        "moe_aux_loss_coeff": reader.take("router_aux_loss_coef", 0.0),
        "moe_router_pre_softmax": not normalised,
    }
    if normalised and model_type == "deepseek_v2":
        reader.refuse("norm_topk_prob", normalised, "False (transformers does not look at it)")
    if normalised and moe["moe_router_topk"] == 1:
        reader.refuse("num_experts_per_tok", 1, "2 or more where weights are normalised (one expert's is always 1)")
    dense = list(reader.take("mlp_only_layers", None) or ())
    if dense != list(range(len(dense))):
        reader.refuse("mlp_only_layers", dense, "dense layers before the others")
    moe["moe_num_dense_layers"] = len(dense)
    if not model_type.startswith("deepseek"):
        return moe
    moe["moe_num_dense_layers"] = reader.take("first_k_dense_replace", 0)
    if moe["moe_num_dense_layers"] >= layers:
        reader.taken |= {
            "n_shared_experts",
            "routed_scaling_factor",
            "n_group",
            "topk_group",
            "topk_method",
            "scoring_func",
        }
        return {}
    shared = reader.take("n_shared_experts", None)
    moe["moe_shared_expert_intermediate_size"] = shared * moe["moe_ffn_hidden_size"] if shared else None
    factor = reader.take("routed_scaling_factor", 1.0)
    moe["moe_router_topk_scaling_factor"] = None if factor == 1.0 else factor
    is_v3 = model_type == "deepseek_v3"
    score = reader.take("scoring_func", "sigmoid" if is_v3 else "softmax")
    method = reader.take("topk_method", "noaux_tc" if is_v3 else "greedy")
    groups, group_topk = reader.take("n_group", None), reader.take("topk_group", None)
    if (score, method) not in {("sigmoid", "noaux_tc")} if is_v3 else score != "softmax" or method == "noaux_tc":
        reader.refuse(
            "scoring_func, topk_method", (score, method), "sigmoid with noaux_tc (V3), softmax with greedy (V2)"
        )
    if is_v3:
        if not normalised or moe["moe_router_topk"] == 1:
            reader.refuse("norm_topk_prob", normalised, "True with num_experts_per_tok above 1")
        moe |= {
            "moe_router_score_function": "sigmoid",
            "moe_router_enable_expert_bias": True,
            "moe_router_pre_softmax": True,
        }
    if method == "greedy" or groups is None or groups == 1:
        return moe
    if moe["moe_router_topk"] // group_topk != (2 if is_v3 else 1):
        reader.refuse(
            "topk_group", group_topk, f"num_experts_per_tok // topk_group = {2 if is_v3 else 1} (group scores)"
        )
    return moe | {"moe_router_num_groups": groups, "moe_router_group_topk": group_topk}


def _effective(model: ModelConfig) -> dict[str, Any]:
    """Return the fields with what `None` stands for, and without those that play no part."""
    fields = dataclasses.asdict(model) | {
        "num_query_groups": num_query_groups(model),
        "kv_channels": kv_channels(model),
    }
    is_latent = model.multi_latent_attention
    used = {
        "moe_": model.num_moe_experts is not None,
        "rope_scaling_factor": model.rope_scaling_type != "none",
        "rope_original": model.rope_scaling_type in ("llama3", "yarn"),
        "rope_low_": model.rope_scaling_type == "llama3",
        "rope_high_": model.rope_scaling_type == "llama3",
        "rope_beta_": model.rope_scaling_type == "yarn",
        "rope_mscale": model.rope_scaling_type == "yarn" and is_latent,
        "num_query_groups": not is_latent,
        "kv_channels": not is_latent,
        **dict.fromkeys(("q_lora_", "kv_lora_", "qk_head_dim", "qk_pos_", "v_head_dim"), is_latent),
    }
    for name in fields:
        if any(name.startswith(prefix) and not is_used for prefix, is_used in used.items()):
            fields[name] = None
    if model.num_moe_experts is not None:
        fields["moe_ffn_hidden_size"] = model.moe_ffn_hidden_size or model.ffn_hidden_size
        fields["moe_shared_expert_intermediate_size"] = model.moe_shared_expert_intermediate_size or None
        fields["moe_router_topk_scaling_factor"] = model.moe_router_topk_scaling_factor or 1.0
        fields["moe_router_pre_softmax"] = model.moe_router_score_function == "sigmoid" or model.moe_router_pre_softmax
        if model.moe_num_dense_layers == 0 and not is_latent:
            fields["ffn_hidden_size"] = None  # no dense layer uses it
    if fields["rope_original_max_position_embeddings"] is None and model.rope_scaling_type in ("llama3", "yarn"):
        fields["rope_original_max_position_embeddings"] = model.max_position_embeddings
    return fields
