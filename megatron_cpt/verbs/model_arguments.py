"""Values of the checkpoint verbs' arguments: sizes in bytes, a model from a params file."""

import re
from pathlib import Path

from megatron_cpt.config.loading.sources import find_params, read_yaml
from megatron_cpt.config.settings.fields import nearest, parse_field, section_fields
from megatron_cpt.config.settings.schema import ModelConfig
from megatron_cpt.errors import ConfigError

_UNITS = {"TB": 10**12, "GB": 10**9, "MB": 10**6, "KB": 10**3, "": 1}


def parse_bytes(text: str) -> int:
    """Return bytes from `2TB`, `5GB`, `1.5MB` or a plain number. Raises: ConfigError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(TB|GB|MB|KB|)", text.strip().upper())
    if match is None:
        raise ConfigError(f"{text!r} is no size. A size such as 5GB or 200MB is needed.")
    return int(float(match[1]) * _UNITS[match[2]])


def params_model(params: str) -> ModelConfig:
    """Return the `model` section of a params file, a name in `params/` or a path.

    Raises: ConfigError when a setting is unknown or its value is of another type.
    """
    path = find_params(params, Path())
    settings = read_yaml(path).get("model") or {}
    fields = section_fields(ModelConfig)
    for key in settings:
        if key not in fields:
            raise ConfigError(f"{path}: model.{key} is not a setting. Use {nearest(key, list(fields))}.")
    try:
        return ModelConfig(
            **{key: parse_field(fields[key][0], value, f"model.{key}") for key, value in settings.items()}
        )
    except (TypeError, ValueError) as problem:
        raise ConfigError(f"{path}: model: {problem}.") from None
