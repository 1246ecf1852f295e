"""DeepSeek V3 and models of its architecture (Kimi K2, Moonlight): sigmoid routing with a bias for each expert."""

from typing import Any

from megatron_cpt.checkpoint.mapping.families.latent import (
    read_experts,
    read_groups,
    read_latent,
    write_experts,
    write_latent,
)
from megatron_cpt.checkpoint.mapping.family import Family
from megatron_cpt.checkpoint.mapping.reader import Reader
from megatron_cpt.config.settings.schema import ModelConfig


def _read(reader: Reader) -> dict[str, Any]:
    fields = read_latent(reader)
    moe = read_experts(reader, fields["num_layers"], normalised=True)
    if not moe:
        return fields
    if moe["moe_router_pre_softmax"]:
        reader.refuse("norm_topk_prob", False, "True with num_experts_per_tok above 1")
    score, method = reader.take("scoring_func", "sigmoid"), reader.take("topk_method", "noaux_tc")
    if (score, method) != ("sigmoid", "noaux_tc"):
        reader.refuse("scoring_func, topk_method", (score, method), "sigmoid with noaux_tc")
    return {
        **fields,
        **moe,
        **read_groups(reader, moe["moe_router_topk"], scored=2),
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_pre_softmax": True,
    }


def _write(model: ModelConfig) -> dict[str, Any]:
    keys = {**write_latent(model), **write_experts(model)}
    if model.num_moe_experts is None:
        return keys
    return keys | {
        "n_group": model.moe_router_num_groups or 1,
        "topk_group": model.moe_router_group_topk or 1,
        "topk_method": "noaux_tc",
        "norm_topk_prob": True,
    }


FAMILY = Family(
    architecture="DeepseekV3ForCausalLM",
    model_type="deepseek_v3",
    other_types=("kimi_k2",),
    read=_read,
    write=_write,
    defaults={
        "first_k_dense_replace": 3,
        "n_shared_experts": 1,
        "routed_scaling_factor": 2.5,
        "n_group": 8,
        "topk_group": 4,
        "q_lora_rank": 1536,
        "max_position_embeddings": 4096,
        "num_experts_per_tok": 8,
        "n_routed_experts": 256,
    },
)
