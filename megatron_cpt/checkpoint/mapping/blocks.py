"""Blocks of rules that architectures share; each rule has the shape of its Megatron tensor.

`layer_rules` puts a layer together from the model's settings; an architecture with other names or blocks defines its
own.
"""

from collections.abc import Sequence

from megatron_cpt.checkpoint.mapping.kinds import QKV, Copy, Experts, GateUp, Rule, Shape, Size, Vocabulary
from megatron_cpt.config.settings.derived import kv_channels, num_query_groups, padded_vocab_size
from megatron_cpt.config.settings.schema import ModelConfig

LAYER, HF_LAYER = "decoder.layers.{i}.", "model.layers.{i}."
ATTENTION, HF_ATTENTION = LAYER + "self_attention.", HF_LAYER + "self_attn."
MLP, HF_MLP = LAYER + "mlp.", HF_LAYER + "mlp."


def hidden(model: ModelConfig) -> Shape:
    """Return the shape of a norm over the residual stream, `[h]`."""
    return (model.hidden_size,)


def head(model: ModelConfig) -> Shape:
    """Return the shape of a norm over one attention head, `[d]`."""
    return (kv_channels(model),)


def vocabulary(model: ModelConfig) -> Shape:
    """Return the shape of an embedding or output layer, `[v_padded, h]`."""
    return padded_vocab_size(model), model.hidden_size


def qkv_rows(model: ModelConfig) -> int:
    """Return the rows of the merged query, key and value projection."""
    return (model.num_attention_heads + 2 * num_query_groups(model)) * kv_channels(model)


def expert_width(model: ModelConfig) -> int:
    """Return the width of one expert."""
    return model.moe_ffn_hidden_size or model.ffn_hidden_size


def _query_rows(model: ModelConfig) -> int:
    return model.num_attention_heads * (model.qk_head_dim + model.qk_pos_emb_head_dim)


def _value_columns(model: ModelConfig) -> int:
    return model.num_attention_heads * (model.v_head_dim if model.multi_latent_attention else kv_channels(model))


EMBEDDING: tuple[Rule, ...] = (
    Vocabulary("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), vocabulary),
)
FINAL_NORM: tuple[Rule, ...] = (Copy("decoder.final_layernorm.weight", ("model.norm.weight",), hidden),)
OUTPUT_LAYER: tuple[Rule, ...] = (Vocabulary("output_layer.weight", ("lm_head.weight",), vocabulary),)

PROJECTION: tuple[Rule, ...] = (
    Copy(
        ATTENTION + "linear_proj.weight",
        (HF_ATTENTION + "o_proj.weight",),
        lambda model: (model.hidden_size, _value_columns(model)),
    ),
)
GROUPED_QUERY_ATTENTION: tuple[Rule, ...] = (
    Copy(ATTENTION + "linear_qkv.layer_norm_weight", (HF_LAYER + "input_layernorm.weight",), hidden),
    QKV(
        ATTENTION + "linear_qkv.weight",
        tuple(f"{HF_ATTENTION}{part}_proj.weight" for part in "qkv"),
        lambda model: (qkv_rows(model), model.hidden_size),
    ),
    *PROJECTION,
)
QKV_BIAS: tuple[Rule, ...] = (
    QKV(
        ATTENTION + "linear_qkv.bias",
        tuple(f"{HF_ATTENTION}{part}_proj.bias" for part in "qkv"),
        lambda model: (qkv_rows(model),),
    ),
)
QK_NORM: tuple[Rule, ...] = (
    Copy(ATTENTION + "q_layernorm.weight", (HF_ATTENTION + "q_norm.weight",), head),
    Copy(ATTENTION + "k_layernorm.weight", (HF_ATTENTION + "k_norm.weight",), head),
)
LATENT_ATTENTION: tuple[Rule, ...] = (
    Copy(LAYER + "input_layernorm.weight", (HF_LAYER + "input_layernorm.weight",), hidden),
    Copy(
        ATTENTION + "linear_kv_down_proj.weight",
        (HF_ATTENTION + "kv_a_proj_with_mqa.weight",),
        lambda model: (model.kv_lora_rank + model.qk_pos_emb_head_dim, model.hidden_size),
    ),
    Copy(
        ATTENTION + "linear_kv_up_proj.layer_norm_weight",
        (HF_ATTENTION + "kv_a_layernorm.weight",),
        lambda model: (model.kv_lora_rank,),
    ),
    Copy(
        ATTENTION + "linear_kv_up_proj.weight",
        (HF_ATTENTION + "kv_b_proj.weight",),
        lambda model: (model.num_attention_heads * (model.qk_head_dim + model.v_head_dim), model.kv_lora_rank),
    ),
    *PROJECTION,
)
LATENT_QUERY: tuple[Rule, ...] = (
    Copy(
        ATTENTION + "linear_q_down_proj.weight",
        (HF_ATTENTION + "q_a_proj.weight",),
        lambda model: (model.q_lora_rank or 0, model.hidden_size),
    ),
    Copy(
        ATTENTION + "linear_q_up_proj.layer_norm_weight",
        (HF_ATTENTION + "q_a_layernorm.weight",),
        lambda model: (model.q_lora_rank or 0,),
    ),
    Copy(
        ATTENTION + "linear_q_up_proj.weight",
        (HF_ATTENTION + "q_b_proj.weight",),
        lambda model: (_query_rows(model), model.q_lora_rank or 0),
    ),
)
DIRECT_QUERY: tuple[Rule, ...] = (
    Copy(
        ATTENTION + "linear_q_proj.weight",
        (HF_ATTENTION + "q_proj.weight",),
        lambda model: (_query_rows(model), model.hidden_size),
    ),
)


def gated_mlp(mcore: str, hf: Sequence[str], fc1: Size, fc2: Size) -> tuple[Rule, Rule]:
    """Return the two rules of a gated feed-forward network; `hf`: its gate, up- and down-projection."""
    gate, up, down = hf
    return (
        GateUp(mcore + "linear_fc1.weight", (gate, up), fc1),
        Copy(mcore + "linear_fc2.weight", (down,), fc2),
    )


def projections(prefix: str) -> tuple[str, str, str]:
    """Return the usual names of gate, up- and down-projection behind `prefix`."""
    return f"{prefix}gate_proj.weight", f"{prefix}up_proj.weight", f"{prefix}down_proj.weight"


def experts(router: str, hf: Sequence[str]) -> tuple[Rule, ...]:
    """Return the rules of a router and its experts; `hf`: an expert's gate, up- and down-projection."""
    each = gated_mlp(
        MLP + "experts.experts.",
        hf,
        lambda model: (2 * expert_width(model), model.hidden_size),
        lambda model: (model.hidden_size, expert_width(model)),
    )
    weight = Copy(MLP + "router.weight", (router,), lambda model: (model.num_moe_experts or 0, model.hidden_size))
    return (weight, *(Experts(rule) for rule in each))


DENSE_MLP: tuple[Rule, ...] = (
    Copy(MLP + "linear_fc1.layer_norm_weight", (HF_LAYER + "post_attention_layernorm.weight",), hidden),
    *gated_mlp(
        MLP,
        projections(HF_MLP),
        lambda model: (2 * model.ffn_hidden_size, model.hidden_size),
        lambda model: (model.hidden_size, model.ffn_hidden_size),
    ),
)
MOE_NORM: tuple[Rule, ...] = (
    Copy(LAYER + "pre_mlp_layernorm.weight", (HF_LAYER + "post_attention_layernorm.weight",), hidden),
)
EXPERTS = experts(HF_MLP + "gate.weight", projections(HF_MLP + "experts.{e}."))
EXPERT_BIAS: tuple[Rule, ...] = (
    Copy(
        MLP + "router.expert_bias",
        (HF_MLP + "gate.e_score_correction_bias",),
        lambda model: (model.num_moe_experts or 0,),
    ),
)
SHARED_EXPERTS: tuple[Rule, ...] = gated_mlp(
    MLP + "shared_experts.",
    projections(HF_MLP + "shared_experts."),
    lambda model: (2 * (model.moe_shared_expert_intermediate_size or 0), model.hidden_size),
    lambda model: (model.hidden_size, model.moe_shared_expert_intermediate_size or 0),
)


def layer_rules(model: ModelConfig, layer: int, expert_rules: Sequence[Rule] = EXPERTS) -> list[Rule]:
    """Return the rules of one layer, as the model's settings say; `expert_rules`: of the router and the experts."""
    rules: list[Rule] = []
    if model.multi_latent_attention:
        rules += [*LATENT_ATTENTION, *(LATENT_QUERY if model.q_lora_rank else DIRECT_QUERY)]
    else:
        rules += GROUPED_QUERY_ATTENTION
        rules += QKV_BIAS if model.add_qkv_bias else ()
        rules += QK_NORM if model.qk_layernorm else ()
    if model.num_moe_experts is None or layer < model.moe_num_dense_layers:
        return [*rules, *DENSE_MLP]
    rules += [*MOE_NORM, *expert_rules]
    rules += EXPERT_BIAS if model.moe_router_enable_expert_bias else ()
    rules += SHARED_EXPERTS if model.moe_shared_expert_intermediate_size else ()
    return rules
