"""Which Hugging Face tensors make which Megatron tensor, as data: blocks of rules, and per architecture its blocks.

A rule names one Megatron tensor (Transformer-Engine names, per layer), the Hugging Face tensors it is made of, and how.
`{i}` is a layer, `{e}` an expert (its axis in the Megatron tensor comes first). `units` spells the rules out for a model;
what Hugging Face has and no rule claims, or the other way round, is an error in `check_coverage`.
"""

import fnmatch
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from megatron_cpt.checkpoint.mapping.transforms import (
    merge_gate_up,
    merge_qkv,
    pad_vocab,
    split_gate_up,
    split_qkv,
    strip_vocab,
)
from megatron_cpt.config.settings.derived import kv_channels, num_query_groups, padded_vocab_size
from megatron_cpt.config.settings.schema import ModelConfig
from megatron_cpt.errors import CheckpointError

How = Literal["copy", "qkv", "gate_up", "vocab"]


@dataclass(frozen=True)
class Rule:
    """`mcore` is made of the tensors `hf` by `how`."""

    mcore: str
    hf: tuple[str, ...]
    how: How = "copy"


@dataclass(frozen=True)
class Family:
    """An architecture's name and the blocks whose names differ between architectures."""

    architecture: str
    model_type: str
    experts: tuple[Rule, ...] = ()


def _rules(*table: tuple[str, str] | tuple[str, str, How]) -> tuple[Rule, ...]:
    return tuple(Rule(row[0], tuple(row[1].split()), row[2] if len(row) > 2 else "copy") for row in table)


_LAYER, _HF_LAYER = "decoder.layers.{i}.", "model.layers.{i}."
_ATTENTION, _HF_ATTENTION = _LAYER + "self_attention.", _HF_LAYER + "self_attn."
_MLP, _HF_MLP = _LAYER + "mlp.", _HF_LAYER + "mlp."

EMBEDDING = _rules(("embedding.word_embeddings.weight", "model.embed_tokens.weight", "vocab"))
FINAL_NORM = _rules(("decoder.final_layernorm.weight", "model.norm.weight"))
OUTPUT_LAYER = _rules(("output_layer.weight", "lm_head.weight", "vocab"))
_QKV = " ".join(_HF_ATTENTION + part + "_proj.weight" for part in "qkv")
GROUPED_QUERY_ATTENTION = _rules(
    (_ATTENTION + "linear_qkv.layer_norm_weight", _HF_LAYER + "input_layernorm.weight"),
    (_ATTENTION + "linear_qkv.weight", _QKV, "qkv"),
    (_ATTENTION + "linear_proj.weight", _HF_ATTENTION + "o_proj.weight"),
)
QKV_BIAS = _rules((_ATTENTION + "linear_qkv.bias", _QKV.replace(".weight", ".bias"), "qkv"))
QK_NORM = _rules(
    (_ATTENTION + "q_layernorm.weight", _HF_ATTENTION + "q_norm.weight"),
    (_ATTENTION + "k_layernorm.weight", _HF_ATTENTION + "k_norm.weight"),
)
LATENT_ATTENTION = _rules(
    (_LAYER + "input_layernorm.weight", _HF_LAYER + "input_layernorm.weight"),
    (_ATTENTION + "linear_kv_down_proj.weight", _HF_ATTENTION + "kv_a_proj_with_mqa.weight"),
    (_ATTENTION + "linear_kv_up_proj.layer_norm_weight", _HF_ATTENTION + "kv_a_layernorm.weight"),
    (_ATTENTION + "linear_kv_up_proj.weight", _HF_ATTENTION + "kv_b_proj.weight"),
    (_ATTENTION + "linear_proj.weight", _HF_ATTENTION + "o_proj.weight"),
)
LATENT_QUERY = _rules(
    (_ATTENTION + "linear_q_down_proj.weight", _HF_ATTENTION + "q_a_proj.weight"),
    (_ATTENTION + "linear_q_up_proj.layer_norm_weight", _HF_ATTENTION + "q_a_layernorm.weight"),
    (_ATTENTION + "linear_q_up_proj.weight", _HF_ATTENTION + "q_b_proj.weight"),
)
DIRECT_QUERY = _rules((_ATTENTION + "linear_q_proj.weight", _HF_ATTENTION + "q_proj.weight"))
DENSE_MLP = _rules(
    (_MLP + "linear_fc1.layer_norm_weight", _HF_LAYER + "post_attention_layernorm.weight"),
    (_MLP + "linear_fc1.weight", f"{_HF_MLP}gate_proj.weight {_HF_MLP}up_proj.weight", "gate_up"),
    (_MLP + "linear_fc2.weight", _HF_MLP + "down_proj.weight"),
)
MOE_NORM = _rules((_LAYER + "pre_mlp_layernorm.weight", _HF_LAYER + "post_attention_layernorm.weight"))
_EXPERT = _HF_MLP + "experts.{e}."
EXPERTS = _rules(
    (_MLP + "router.weight", _HF_MLP + "gate.weight"),
    (_MLP + "experts.experts.linear_fc1.weight", f"{_EXPERT}gate_proj.weight {_EXPERT}up_proj.weight", "gate_up"),
    (_MLP + "experts.experts.linear_fc2.weight", _EXPERT + "down_proj.weight"),
)
_BLOCK_SPARSE = _HF_LAYER + "block_sparse_moe."
MIXTRAL_EXPERTS = _rules(
    (_MLP + "router.weight", _BLOCK_SPARSE + "gate.weight"),
    (
        _MLP + "experts.experts.linear_fc1.weight",
        f"{_BLOCK_SPARSE}experts.{{e}}.w1.weight {_BLOCK_SPARSE}experts.{{e}}.w3.weight",
        "gate_up",
    ),
    (_MLP + "experts.experts.linear_fc2.weight", _BLOCK_SPARSE + "experts.{e}.w2.weight"),
)
EXPERT_BIAS = _rules((_MLP + "router.expert_bias", _HF_MLP + "gate.e_score_correction_bias"))
_SHARED = _HF_MLP + "shared_experts."
SHARED_EXPERTS = _rules(
    (_MLP + "shared_experts.linear_fc1.weight", f"{_SHARED}gate_proj.weight {_SHARED}up_proj.weight", "gate_up"),
    (_MLP + "shared_experts.linear_fc2.weight", _SHARED + "down_proj.weight"),
)

FAMILIES = {
    family.architecture: family
    for family in (
        Family("LlamaForCausalLM", "llama"),
        Family("MistralForCausalLM", "mistral"),
        Family("Qwen2ForCausalLM", "qwen2"),
        Family("Qwen3ForCausalLM", "qwen3"),
        Family("MixtralForCausalLM", "mixtral", MIXTRAL_EXPERTS),
        Family("Qwen3MoeForCausalLM", "qwen3_moe", EXPERTS),
        Family("DeepseekV2ForCausalLM", "deepseek_v2", EXPERTS),
        Family("DeepseekV3ForCausalLM", "deepseek_v3", EXPERTS),
    )
}

COMPUTED_TENSORS = ("*.rotary_emb.inv_freq",)
"""Tensors in older folders that follow from the configuration."""


@dataclass(frozen=True)
class Unit:
    """One step of a conversion: a Megatron tensor, or one expert of it, and the Hugging Face tensors it is made of."""

    key: str
    hf: tuple[str, ...]
    how: How
    shape: tuple[int, ...]
    """Shape on Megatron's side, without the expert axis."""
    hf_shapes: tuple[tuple[int, ...], ...]
    expert: int | None = None
    num_experts: int | None = None

    @property
    def global_shape(self) -> tuple[int, ...]:
        """The whole Megatron tensor's shape."""
        return self.shape if self.num_experts is None else (self.num_experts, *self.shape)

    @property
    def offsets(self) -> tuple[int, ...]:
        """Where the unit starts in the whole Megatron tensor."""
        start = (0,) * len(self.shape)
        return start if self.expert is None else (self.expert, *start)

    def to_mcore(self, tensors: Sequence[torch.Tensor], model: ModelConfig) -> torch.Tensor:
        """Return the Megatron tensor, with the expert axis where there is one."""
        if self.how == "qkv":
            merged = merge_qkv(tensors[0], tensors[1], tensors[2], num_query_groups(model))
        elif self.how == "gate_up":
            merged = merge_gate_up(tensors[0], tensors[1])
        elif self.how == "vocab":
            merged = pad_vocab(tensors[0], self.shape[0])
        else:
            merged = tensors[0]
        return merged if self.expert is None else merged.unsqueeze(0)

    def to_hf(self, tensor: torch.Tensor, model: ModelConfig) -> tuple[torch.Tensor, ...]:
        """Return the Hugging Face tensors; the inverse of `to_mcore`."""
        tensor = tensor if self.expert is None else tensor.squeeze(0)
        if self.how == "qkv":
            return split_qkv(tensor, num_query_groups(model), model.num_attention_heads)
        if self.how == "gate_up":
            return split_gate_up(tensor)
        if self.how == "vocab":
            return (strip_vocab(tensor, model.vocab_size),)
        return (tensor,)


def family_of(architecture: str) -> Family:
    """Return the family of a Hugging Face architecture. Raises: CheckpointError naming the known ones."""
    if architecture not in FAMILIES:
        raise CheckpointError(f"architecture {architecture} is not known. Known: {', '.join(FAMILIES)}.")
    return FAMILIES[architecture]


def units(model: ModelConfig, family: Family) -> list[Unit]:
    """Return all steps of converting `model`, in the order of the layers."""
    rules = list(EMBEDDING)
    for layer in range(model.num_layers):
        rules += [_for_layer(rule, layer) for rule in _layer_rules(model, family, layer)]
    rules += FINAL_NORM
    if model.untie_embeddings_and_output_weights:
        rules += OUTPUT_LAYER
    result = []
    for rule in rules:
        if "{e}" not in rule.hf[0]:
            result.append(_unit(model, rule))
            continue
        for expert in range(model.num_moe_experts or 0):
            result.append(_unit(model, rule, expert))
    return result


def check_coverage(
    model_units: Sequence[Unit], names: Collection[str], where: str, skip: Sequence[str] = ()
) -> list[str]:
    """Return the names that are left out on purpose; every other one must be claimed, and every claim be there.

    `skip` holds globs of tensors to leave out. Raises: CheckpointError naming the first unclaimed and missing tensors.
    """
    claimed = {name for unit in model_units for name in unit.hf}
    present = set(names)
    left = sorted(present - claimed)
    skipped = [name for name in left if any(fnmatch.fnmatchcase(name, glob) for glob in (*COMPUTED_TENSORS, *skip))]
    unclaimed = sorted(set(left) - set(skipped))
    missing = sorted(claimed - present)
    if unclaimed:
        raise CheckpointError(
            f"{where}: {len(unclaimed)} tensors have no place in Megatron's model, the first are {', '.join(unclaimed[:3])}. "
            "Every weight must be converted. Use --skip-tensors GLOB to leave out what is not wanted."
        )
    if missing:
        raise CheckpointError(
            f"{where}: {len(missing)} tensors are missing, the first are {', '.join(missing[:3])}. "
            "The folder is incomplete or its config.json belongs to another model."
        )
    return skipped


def _layer_rules(model: ModelConfig, family: Family, layer: int) -> list[Rule]:
    rules: list[Rule] = []
    if model.multi_latent_attention:
        rules += LATENT_ATTENTION + (LATENT_QUERY if model.q_lora_rank else DIRECT_QUERY)
    else:
        rules += GROUPED_QUERY_ATTENTION
        rules += QKV_BIAS if model.add_qkv_bias else ()
        rules += QK_NORM if model.qk_layernorm else ()
    if model.num_moe_experts is None or layer < model.moe_num_dense_layers:
        return rules + list(DENSE_MLP)
    rules += MOE_NORM + family.experts
    rules += EXPERT_BIAS if model.moe_router_enable_expert_bias else ()
    rules += SHARED_EXPERTS if model.moe_shared_expert_intermediate_size else ()
    return rules


def _for_layer(rule: Rule, layer: int) -> Rule:
    fill = "{i}", str(layer)
    return Rule(rule.mcore.replace(*fill), tuple(name.replace(*fill) for name in rule.hf), rule.how)


def _unit(model: ModelConfig, rule: Rule, expert: int | None = None) -> Unit:
    shape = _shape(model, rule.mcore)
    if rule.how == "qkv":
        head, groups = kv_channels(model), num_query_groups(model)
        rows = (model.num_attention_heads * head, groups * head, groups * head)
        hf_shapes = tuple((count, *shape[1:]) for count in rows)
    elif rule.how == "gate_up":
        hf_shapes = ((shape[0] // 2, *shape[1:]),) * 2
    elif rule.how == "vocab":
        hf_shapes = ((model.vocab_size, *shape[1:]),)
    else:
        hf_shapes = (shape,)
    names = rule.hf if expert is None else tuple(name.replace("{e}", str(expert)) for name in rule.hf)
    num_experts = None if expert is None else model.num_moe_experts
    return Unit(rule.mcore, names, rule.how, shape, hf_shapes, expert, num_experts)


def _shape(model: ModelConfig, key: str) -> tuple[int, ...]:
    """Return the shape of a Megatron tensor, without the expert axis, from the configuration."""
    hidden, heads = model.hidden_size, model.num_attention_heads
    head = kv_channels(model)
    qkv_rows = (heads + 2 * num_query_groups(model)) * head
    query_rows = heads * (model.qk_head_dim + model.qk_pos_emb_head_dim)
    value_columns = heads * (model.v_head_dim if model.multi_latent_attention else head)
    query_rank = model.q_lora_rank or 0
    shapes: dict[str, tuple[int, ...]] = {
        "word_embeddings.weight": (padded_vocab_size(model), hidden),
        "output_layer.weight": (padded_vocab_size(model), hidden),
        "final_layernorm.weight": (hidden,),
        "input_layernorm.weight": (hidden,),
        "pre_mlp_layernorm.weight": (hidden,),
        "linear_qkv.layer_norm_weight": (hidden,),
        "linear_qkv.weight": (qkv_rows, hidden),
        "linear_qkv.bias": (qkv_rows,),
        "linear_proj.weight": (hidden, value_columns),
        "q_layernorm.weight": (head,),
        "k_layernorm.weight": (head,),
        "linear_kv_down_proj.weight": (model.kv_lora_rank + model.qk_pos_emb_head_dim, hidden),
        "linear_kv_up_proj.layer_norm_weight": (model.kv_lora_rank,),
        "linear_kv_up_proj.weight": (heads * (model.qk_head_dim + model.v_head_dim), model.kv_lora_rank),
        "linear_q_proj.weight": (query_rows, hidden),
        "linear_q_down_proj.weight": (query_rank, hidden),
        "linear_q_up_proj.layer_norm_weight": (query_rank,),
        "linear_q_up_proj.weight": (query_rows, query_rank),
        "router.weight": (model.num_moe_experts or 0, hidden),
        "router.expert_bias": (model.num_moe_experts or 0,),
        "linear_fc1.layer_norm_weight": (hidden,),
    }
    width = model.ffn_hidden_size
    if ".shared_experts." in key:
        width = model.moe_shared_expert_intermediate_size or 0
    elif ".experts.experts." in key:
        width = model.moe_ffn_hidden_size or model.ffn_hidden_size
    shapes |= {"linear_fc1.weight": (2 * width, hidden), "linear_fc2.weight": (hidden, width)}
    return shapes[".".join(key.split(".")[-2:])]
