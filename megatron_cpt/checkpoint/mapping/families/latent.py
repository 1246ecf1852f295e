"""Rules shared by DeepSeek V2 and V3: multi-head latent attention, shared experts, dense layers first."""

from typing import Any

from megatron_cpt.checkpoint.mapping.reader import Reader, experts, no_attention_bias, rope, transformer, window
from megatron_cpt.checkpoint.mapping.writer import expert_keys, transformer_keys
from megatron_cpt.config.settings.schema import ModelConfig

LATENT_EPSILON = 1e-6
"""transformers' fixed epsilon of the norms on the latent vectors."""
ROUTER_KEYS = frozenset(
    """
    n_routed_experts n_shared_experts num_experts_per_tok moe_intermediate_size norm_topk_prob routed_scaling_factor
    n_group topk_group topk_method scoring_func router_aux_loss_coef num_experts num_local_experts
    """.split()
)


def read_latent(reader: Reader) -> dict[str, Any]:
    """Return the fields but for those of the experts."""
    no_attention_bias(reader)
    reader.taken |= {"head_dim", "num_key_value_heads"}
    fields = transformer(reader)
    own_epsilon = LATENT_EPSILON if fields["layernorm_epsilon"] != LATENT_EPSILON else None
    return {
        "latent_layernorm_epsilon": own_epsilon,
        **fields,
        **rope(reader, is_latent=True),
        **window(reader, is_used=False),
        "multi_latent_attention": True,
        "qk_layernorm": True,
        "q_lora_rank": reader.optional_size("q_lora_rank"),
        "kv_lora_rank": reader.size("kv_lora_rank"),
        "qk_head_dim": reader.size("qk_nope_head_dim"),
        "qk_pos_emb_head_dim": reader.size("qk_rope_head_dim"),
        "v_head_dim": reader.size("v_head_dim"),
    }


def read_experts(reader: Reader, num_layers: int, *, normalised: bool) -> dict[str, Any]:
    """Return the fields of experts that both versions have; none where every layer is dense."""
    dense = reader.take("first_k_dense_replace", 0)
    if dense >= num_layers:
        reader.taken |= ROUTER_KEYS
        return {}
    fields = experts(reader, normalised=normalised)
    shared = reader.optional_size("n_shared_experts")
    factor = reader.number("routed_scaling_factor", 1.0)
    return fields | {
        "moe_num_dense_layers": dense,
        "moe_shared_expert_intermediate_size": shared * fields["moe_ffn_hidden_size"] if shared else None,
        "moe_router_topk_scaling_factor": None if factor == 1.0 else factor,
    }


def read_groups(reader: Reader, topk: int, *, scored: int) -> dict[str, Any]:
    """Return the fields of group-limited routing; `scored`: experts of a group that make its score in transformers.

    Megatron-Core scores a group by its best `topk // topk_group` experts.
    """
    groups, chosen = reader.optional_size("n_group"), reader.optional_size("topk_group")
    if groups is None or groups == 1:
        return {}
    if chosen is None or topk // chosen != scored:
        reader.refuse("topk_group", chosen, f"num_experts_per_tok // topk_group = {scored} (group scores)")
    return {"moe_router_num_groups": groups, "moe_router_group_topk": chosen}


def write_latent(model: ModelConfig) -> dict[str, Any]:
    """Return the keys but for those of the experts."""
    return {
        **transformer_keys(model),
        "attention_bias": False,
        "head_dim": model.qk_pos_emb_head_dim,
        "num_key_value_heads": model.num_attention_heads,
        "q_lora_rank": model.q_lora_rank,
        "kv_lora_rank": model.kv_lora_rank,
        "qk_nope_head_dim": model.qk_head_dim,
        "qk_rope_head_dim": model.qk_pos_emb_head_dim,
        "v_head_dim": model.v_head_dim,
    }


def write_experts(model: ModelConfig) -> dict[str, Any]:
    """Return the keys of the experts that both versions have."""
    if model.num_moe_experts is None:
        return {
            "n_routed_experts": 1,
            "num_experts_per_tok": 1,
            "first_k_dense_replace": model.num_layers,
            "moe_intermediate_size": model.ffn_hidden_size,
        }
    keys = expert_keys(model)
    keys.pop("router_aux_loss_coef")
    width = keys["moe_intermediate_size"]
    return keys | {
        "n_routed_experts": model.num_moe_experts,
        "n_shared_experts": (model.moe_shared_expert_intermediate_size or 0) // width or None,
        "first_k_dense_replace": model.moe_num_dense_layers,
        "routed_scaling_factor": model.moe_router_topk_scaling_factor or 1.0,
        "scoring_func": model.moe_router_score_function,
    }
