"""Relations inside an architecture: heads, rotary scaling, experts, latent attention."""

from collections.abc import Iterator
from dataclasses import MISSING

from megatron_cpt.config.checks.problem import Problem, not_multiple
from megatron_cpt.config.settings import derived
from megatron_cpt.config.settings.fields import default_value, section_fields
from megatron_cpt.config.settings.schema import ModelConfig, RunConfig


def model_problems(config: RunConfig) -> Iterator[Problem]:
    """Yield what does not fit together in the architecture."""
    model = config.model
    yield from _head_problems(model)
    yield from _rope_problems(model)
    yield from _expert_problems(model)
    yield from _latent_attention_problems(model)


def _head_problems(model: ModelConfig) -> Iterator[Problem]:
    if model.kv_channels is None and not model.multi_latent_attention:
        yield from not_multiple(
            ("model.hidden_size", model.hidden_size),
            ("num_attention_heads", model.num_attention_heads),
            ("model.num_attention_heads",),
            "Set kv_channels where the head dimension is not hidden_size / num_attention_heads.",
        )
    yield from not_multiple(
        ("model.num_attention_heads", model.num_attention_heads),
        ("num_query_groups", derived.num_query_groups(model)),
        ("model.num_query_groups",),
        "Query heads share the key/value heads evenly.",
    )
    channels = model.qk_pos_emb_head_dim if model.multi_latent_attention else derived.kv_channels(model)
    if channels % 2:
        key = "model.qk_pos_emb_head_dim" if model.multi_latent_attention else "model.kv_channels"
        yield Problem(
            (key, "model.hidden_size"), f"{key} is {channels}. Rotary embedding turns pairs: an even number is needed."
        )


def _rope_problems(model: ModelConfig) -> Iterator[Problem]:
    kind, keys = model.rope_scaling_type, ("model.rope_scaling_type", "model.multi_latent_attention")
    if kind in ("linear", "llama3") and model.multi_latent_attention:
        yield Problem(keys, f"model.rope_scaling_type is {kind} with multi_latent_attention. Use none or yarn.")
    used = {
        "none": (),
        "linear": ("rope_scaling_factor",),
        "llama3": (
            "rope_scaling_factor",
            "rope_low_freq_factor",
            "rope_high_freq_factor",
            "rope_original_max_position_embeddings",
        ),
        "yarn": (
            "rope_scaling_factor",
            "rope_original_max_position_embeddings",
            "rope_beta_fast",
            "rope_beta_slow",
            *(("rope_mscale", "rope_mscale_all_dim") if model.multi_latent_attention else ()),
        ),
    }[kind]
    for name in section_fields(ModelConfig):
        if name.startswith("rope_") and name != "rope_scaling_type" and name not in used:
            yield from _without_effect(model, name, f"with rope_scaling_type {kind}")
    if kind == "llama3" and model.rope_low_freq_factor >= model.rope_high_freq_factor:
        yield Problem(
            ("model.rope_low_freq_factor", "model.rope_high_freq_factor"),
            f"model.rope_low_freq_factor is {model.rope_low_freq_factor:g}, not below rope_high_freq_factor "
            f"({model.rope_high_freq_factor:g}). Llama 3 has 1 and 4.",
        )
    if kind == "yarn" and model.rope_beta_fast <= model.rope_beta_slow:
        yield Problem(
            ("model.rope_beta_fast", "model.rope_beta_slow"),
            f"model.rope_beta_fast is {model.rope_beta_fast:g}, not above rope_beta_slow "
            f"({model.rope_beta_slow:g}). YaRN has 32 and 1.",
        )


def _expert_problems(model: ModelConfig) -> Iterator[Problem]:
    experts = model.num_moe_experts
    if experts is None:
        for name in section_fields(ModelConfig):
            if name.startswith("moe_"):
                yield from _without_effect(model, name, "without num_moe_experts")
        return
    if model.moe_ffn_hidden_size is None:
        yield Problem(
            ("model.moe_ffn_hidden_size",),
            f"model.num_moe_experts is {experts} without moe_ffn_hidden_size. The width of one expert is needed. Set it.",
        )
    topk = model.moe_router_topk
    if topk > experts:
        yield Problem(
            ("model.moe_router_topk", "model.num_moe_experts"),
            f"model.moe_router_topk is {topk}, more than num_moe_experts ({experts}). Use at most {experts}.",
        )
    if topk == 1 and model.moe_router_score_function == "softmax" and not model.moe_router_pre_softmax:
        yield Problem(
            ("model.moe_router_topk", "model.moe_router_pre_softmax"),
            "model.moe_router_topk is 1 without moe_router_pre_softmax: the softmax over one expert has no gradient. "
            "Set moe_router_pre_softmax: true.",
        )
    if model.moe_num_dense_layers >= model.num_layers:
        yield Problem(
            ("model.moe_num_dense_layers", "model.num_layers"),
            f"model.moe_num_dense_layers is {model.moe_num_dense_layers}, not below num_layers ({model.num_layers}). "
            "Leave at least one layer of experts.",
        )
    yield from _routing_problems(model, experts)


def _routing_problems(model: ModelConfig, experts: int) -> Iterator[Problem]:
    has_bias = model.moe_router_enable_expert_bias
    if has_bias and model.moe_router_score_function != "sigmoid":
        yield Problem(
            ("model.moe_router_enable_expert_bias", "model.moe_router_score_function"),
            f"model.moe_router_enable_expert_bias with score function {model.moe_router_score_function}. "
            "The bias needs sigmoid scores. Set moe_router_score_function: sigmoid.",
        )
    if not has_bias:
        yield from _without_effect(model, "moe_router_bias_update_rate", "without moe_router_enable_expert_bias")
    groups, group_topk = model.moe_router_num_groups, model.moe_router_group_topk
    keys = ("model.moe_router_num_groups", "model.moe_router_group_topk")
    if (groups is None) != (group_topk is None):
        yield Problem(
            keys,
            f"model.moe_router_num_groups is {groups} and moe_router_group_topk is {group_topk}. "
            "Group-limited routing needs both. Set both or none.",
        )
    if groups is None or group_topk is None:
        return
    yield from not_multiple(
        ("model.num_moe_experts", experts), ("moe_router_num_groups", groups), keys[:1], "Groups are of one size."
    )
    if group_topk > groups:
        yield Problem(
            keys[::-1],
            f"model.moe_router_group_topk is {group_topk}, more than moe_router_num_groups ({groups}). "
            f"Use at most {groups}.",
        )
        return
    topk, chosen = model.moe_router_topk, experts // groups * group_topk
    if not group_topk <= topk <= chosen:
        yield Problem(
            (*keys, "model.moe_router_topk"),
            f"model.moe_router_topk is {topk} with moe_router_group_topk {group_topk}: the chosen groups have {chosen} "
            f"experts, and each counts with its best topk // group_topk. Use {group_topk} to {chosen}.",
        )


def _latent_attention_problems(model: ModelConfig) -> Iterator[Problem]:
    if not model.multi_latent_attention:
        for name in (
            "q_lora_rank",
            "kv_lora_rank",
            "qk_head_dim",
            "qk_pos_emb_head_dim",
            "v_head_dim",
            "latent_layernorm_epsilon",
        ):
            yield from _without_effect(model, name, "without multi_latent_attention")
        return
    if not model.qk_layernorm:
        yield Problem(
            ("model.qk_layernorm", "model.multi_latent_attention"),
            "model.qk_layernorm is false with multi_latent_attention. DeepSeek's latent attention normalises the latent "
            "vectors. Set model.qk_layernorm: true.",
        )
    yield from _without_effect(model, "add_qkv_bias", "with multi_latent_attention")
    yield from _without_effect(model, "window_size", "with multi_latent_attention")
    yield from _without_effect(model, "kv_channels", "with multi_latent_attention")
    if derived.num_query_groups(model) != model.num_attention_heads:
        yield Problem(
            ("model.num_query_groups", "model.multi_latent_attention"),
            f"model.num_query_groups is {model.num_query_groups} with multi_latent_attention, which has no key/value "
            "heads. Remove it.",
        )


def _without_effect(model: ModelConfig, name: str, why: str) -> Iterator[Problem]:
    value, default = getattr(model, name), default_value(section_fields(ModelConfig)[name][1])
    if value != default and default is not MISSING:
        yield Problem((f"model.{name}",), f"model.{name} is {value} and has no effect {why}. Remove it.")
