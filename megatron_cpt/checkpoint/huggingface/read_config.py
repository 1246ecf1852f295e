"""Hugging Face `config.json` to our ModelConfig, for the architectures in `families/`, and models held against each other.

Every key must be understood, known to change nothing, or hold the one value that Megatron computes; anything else is an
error that names it.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_cpt.checkpoint.mapping.families.known import FAMILIES
from megatron_cpt.checkpoint.mapping.family import Family
from megatron_cpt.checkpoint.mapping.keys import HARMLESS
from megatron_cpt.checkpoint.mapping.reader import Reader
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
"""Fields that can differ on purpose between two stages (a longer context) with the same weights."""


def model_config_from_hf(
    config: Mapping[str, Any], *, ignore: Sequence[str] = (), where: str = "config.json"
) -> ModelConfig:
    """Return the model that a Hugging Face configuration describes; keys in `ignore` are not looked at.

    Raises: CheckpointError naming the key that is not understood, or whose value Megatron-Core cannot compute.
    """
    family = family_of_config(config, where)
    reader = _reader(config, family, where, ignore)
    fields = family.read(reader)
    reader.finish()
    return ModelConfig(**fields)


def config_differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Return in what two configurations mean different models, whichever style each is written in."""
    meanings = [_meaning(config) for config in (one, other)]
    (left, left_rest), (right, right_rest) = meanings
    if left is None or right is None:
        keys = [architecture_keys(config) for config in (one, other)]
        return sorted(key for key in {**keys[0], **keys[1]} if keys[0].get(key) != keys[1].get(key))
    rest = sorted(key for key in {**left_rest, **right_rest} if left_rest.get(key) != right_rest.get(key))
    return differing_fields(left, right, TRAINING_FIELDS) + rest


def _meaning(config: Mapping[str, Any]) -> tuple[ModelConfig | None, dict[str, Any]]:
    """Return the model and the keys that it does not account for; no model where the architecture is not known."""
    try:
        family = family_of_config(config)
        reader = _reader(config, family, "config.json", ())
        return ModelConfig(**family.read(reader)), {key: value for key, value in reader.left().items() if value}
    except CheckpointError:
        return None, {}


def _reader(config: Mapping[str, Any], family: Family, where: str, ignore: Sequence[str]) -> Reader:
    return Reader(
        config, where, ignore=ignore, defaults=family.defaults, harmless=family.harmless, required=family.required
    )


def family_of_config(config: Mapping[str, Any], where: str = "config.json") -> Family:
    """Return the architecture that a configuration names, by `architectures` or else by `model_type`.

    Raises: CheckpointError when it names none that is known.
    """
    listed = config.get("architectures") or []
    names = [listed] if isinstance(listed, str) else [str(name) for name in listed] if isinstance(listed, list) else []
    by_name = [FAMILIES[name] for name in names if name in FAMILIES]
    if len(names) == 1 and by_name:
        return by_name[0]
    kind = config.get("model_type")
    by_type = [family for family in FAMILIES.values() if kind in (family.model_type, *family.other_types)]
    if (len(names) == 1 and not by_name) or not by_type:
        raise CheckpointError(
            f"{where}: architectures {names}, model_type {kind!r}: {names[0] if names else kind} is not known. "
            f"Known: {', '.join(FAMILIES)}."
        )
    return next((family for family in by_type if family in by_name), by_type[0])


def architecture_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of a configuration that can change the model's computation."""
    return {key: value for key, value in config.items() if key not in HARMLESS}


def differing_fields(left: ModelConfig, right: ModelConfig, but: set[str] = frozenset()) -> list[str]:  # type: ignore[assignment]
    """Return `field: left != right` for each field that means another model, leaving out `but`."""
    left_values, right_values = _effective(left), _effective(right)
    return [
        f"{name}: {left_values[name]} != {right_values[name]}"
        for name in left_values
        if name not in but and left_values[name] != right_values[name]
    ]


def _effective(model: ModelConfig) -> dict[str, Any]:
    """Return the fields with `None` replaced by its meaning, and without those that have no effect."""
    fields = dataclasses.asdict(model) | {
        "num_query_groups": num_query_groups(model),
        "kv_channels": kv_channels(model),
    }
    is_latent = model.multi_latent_attention
    if is_latent:
        fields["latent_layernorm_epsilon"] = model.latent_layernorm_epsilon or model.layernorm_epsilon
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
