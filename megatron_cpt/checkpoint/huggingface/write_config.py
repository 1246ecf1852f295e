"""A `config.json` for a model: the one its weights came from, or one derived from the ModelConfig.

Both styles are written (`rope_parameters` and `rope_theta`, `dtype` and `torch_dtype`), so that transformers 5 and
older readers each find their own. The written file is read back and must describe the same model.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_cpt.checkpoint.huggingface.read_config import (
    TRAINING_FIELDS,
    differing_fields,
    family_of_config,
    model_config_from_hf,
)
from megatron_cpt.checkpoint.mapping.families.known import FAMILIES
from megatron_cpt.checkpoint.mapping.family import Family
from megatron_cpt.checkpoint.mapping.keys import HARMLESS
from megatron_cpt.checkpoint.mapping.writer import both_styles
from megatron_cpt.config.settings.schema import ModelConfig
from megatron_cpt.errors import CheckpointError


def hf_config_from_model(
    model: ModelConfig,
    base: Mapping[str, Any] | None = None,
    *,
    dtype: str | None = None,
    token_ids: dict[str, int | list[int] | None] | None = None,
    ignore: Sequence[str] = (),
) -> dict[str, Any]:
    """Return a `config.json` for `model`.

    `base`, the configuration that the weights came from, is returned (with each key in the style of transformers 4 and of 5)
    when it describes `model`; otherwise its keys that do not touch the architecture are carried over. `token_ids` fills
    `bos_token_id` and such where `base` has none. `ignore`: keys of `base` that were vouched for when it was read.

    Raises: CheckpointError if no known architecture computes `model`.
    """
    family = family_of_config(base) if base is not None else None
    if (
        base is not None
        and family is not None
        and not differing_fields(model_config_from_hf(base, ignore=ignore), model, TRAINING_FIELDS)
    ):
        config = {key: value for key, value in base.items() if key not in ("dtype", "torch_dtype")}
        config["architectures"] = [family.architecture]
    else:
        kept = {*HARMLESS, *(family.harmless if family else ()), *ignore} - {"qk_head_dim"}
        neutral = {key: value for key, value in (base or {}).items() if key in kept}
        config, family = _derived_config(model, family)
        config = {**neutral, **config}
    if config.get("model_type") != family.model_type:
        # a name that transformers knows by remote code only (kimi_k2): the architecture's own opens without it
        config["model_type"] = family.model_type
        config.pop("auto_map", None)
    if config.get("num_nextn_predict_layers"):
        config["num_nextn_predict_layers"] = 0  # their tensors are not in a checkpoint
    for key, value in (token_ids or {}).items():
        if config.get(key) is None:
            config[key] = value
    if dtype is not None:
        config |= {"dtype": dtype, "torch_dtype": dtype}
    return both_styles(config, family.aliases, model.rotary_base)


def portable_config(base: Mapping[str, Any], dtype: str | None = None) -> dict[str, Any]:
    """Return `base` in the styles of transformers 4 and of 5, for weights of its model in `dtype` (None: its own
    dtype)."""
    config = {**base, **({"dtype": dtype, "torch_dtype": dtype} if dtype else {})}
    try:
        family = family_of_config(base)
        theta = model_config_from_hf(base).rotary_base
    except CheckpointError:
        return config  # another architecture, or keys that only its owner knows: the base's own words
    return both_styles(config, family.aliases, theta)


def _derived_config(model: ModelConfig, preferred: Family | None) -> tuple[dict[str, Any], Family]:
    """Return the configuration by the first architecture that computes `model`, the preferred one before others."""
    nearest: tuple[list[str], Family] | None = None
    for family in dict.fromkeys((*([preferred.architecture] if preferred else []), *FAMILIES)):
        written = FAMILIES[family]
        config = {"architectures": [family], "model_type": written.model_type, **written.write(model)}
        try:
            different = differing_fields(model_config_from_hf(config), model, TRAINING_FIELDS)
        except CheckpointError as problem:
            different = [str(problem)]
        if not different:
            return config, written
        if nearest is None or len(different) < len(nearest[0]):
            nearest = different, written
    assert nearest is not None
    raise CheckpointError(
        f"model: {', '.join(nearest[0])} cannot be expressed by {nearest[1].architecture}, the nearest of "
        f"{', '.join(FAMILIES)}. The model cannot be exported."
    )
