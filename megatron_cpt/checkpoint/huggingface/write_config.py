"""A `config.json` for a model: the one its weights came from, or one derived from the ModelConfig.

Both styles are written (`rope_parameters` and `rope_theta`, `dtype` and `torch_dtype`), so that transformers 5 and older readers each
find their own. What is written is read back and must describe the same model.
"""

from collections.abc import Mapping
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
        neutral = {key: value for key, value in (base or {}).items() if key in HARMLESS - {"qk_head_dim"}}
        config = {**neutral, **_derived_config(model, base)}
    for key, value in (token_ids or {}).items():
        if config.get(key) is None:
            config[key] = value
    if dtype is not None:
        config |= {"dtype": dtype, "torch_dtype": dtype}
    return config


def _derived_config(model: ModelConfig, base: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the configuration of the first architecture that computes what `model` says, the base's before others."""
    first = [family_of_config(base)] if base is not None else []
    nearest: tuple[list[str], Family] | None = None
    for family in dict.fromkeys((*(family.architecture for family in first), *FAMILIES)):
        written = FAMILIES[family]
        config = {"architectures": [family], "model_type": written.model_type, **written.write(model)}
        try:
            different = differing_fields(model_config_from_hf(config), model, TRAINING_FIELDS)
        except CheckpointError as problem:
            different = [str(problem)]
        if not different:
            return config
        if nearest is None or len(different) < len(nearest[0]):
            nearest = different, written
    assert nearest is not None
    raise CheckpointError(
        f"model: {', '.join(nearest[0])} cannot be expressed by {nearest[1].architecture}, the nearest of "
        f"{', '.join(FAMILIES)}. The model cannot be exported."
    )
