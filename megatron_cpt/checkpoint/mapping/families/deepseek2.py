"""DeepSeek V2: latent attention, softmax routing."""

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
    moe = read_experts(reader, fields["num_layers"], normalised=False)
    if not moe:
        return fields
    if not moe["moe_router_pre_softmax"]:
        reader.refuse("norm_topk_prob", True, "False (transformers does not look at it)")
    score, method = reader.take("scoring_func", "softmax"), reader.take("topk_method", "greedy")
    if score != "softmax" or method not in ("greedy", "group_limited_greedy"):
        reader.refuse("scoring_func, topk_method", (score, method), "softmax with greedy or group_limited_greedy")
    groups = read_groups(reader, moe["moe_router_topk"], scored=1) if method != "greedy" else {}
    reader.taken |= {"n_group", "topk_group"}
    return fields | moe | groups


def _write(model: ModelConfig) -> dict[str, Any]:
    keys = {**write_latent(model), **write_experts(model)}
    if model.num_moe_experts is None:
        return keys
    return keys | {
        "n_group": model.moe_router_num_groups,
        "topk_group": model.moe_router_group_topk,
        "topk_method": "group_limited_greedy" if model.moe_router_num_groups else "greedy",
    }


FAMILY = Family(
    architecture="DeepseekV2ForCausalLM",
    model_type="deepseek_v2",
    read=_read,
    write=_write,
    defaults={"n_shared_experts": 2, "q_lora_rank": 1536},
)
