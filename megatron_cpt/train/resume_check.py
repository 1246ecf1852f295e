"""What may differ between a checkpoint and the run that loads it: nothing of the model, results only with consent."""

import dataclasses
from pathlib import Path
from typing import Any

from megatron_cpt.checkpoint.mcore import read_manifest
from megatron_cpt.config.fields import default_value
from megatron_cpt.config.schema import ModelConfig, RunConfig
from megatron_cpt.errors import CheckpointError, ConfigError

# Sections whose values change what a run computes; the others may differ freely between a run and its resume.
RESULT_SECTIONS = ("model", "training", "optimizer", "schedule", "data")
FREE_SETTINGS = (
    "training.micro_batch_size", "training.deterministic", "data.max_epochs",
    # what a run passed stays in its manifest, so that these may change for what is to come
    "data.skip_iterations", "training.spike_threshold", "training.spike_action", "training.spike_skip_iterations",
    "training.spike_max_rollbacks",
)  # fmt: skip


def check_model_fits(directory: Path, model: ModelConfig) -> None:
    """Raise CheckpointError when a checkpoint's architecture differs from `model`, naming each difference.

    Settings that leave the tensors alone (dropout, initialisation, longest sequence, router loss weights) may differ.
    """
    stored = read_manifest(directory)["model"]
    free = {
        "hidden_dropout", "attention_dropout", "init_method_std", "max_position_embeddings", "moe_aux_loss_coeff",
        "moe_z_loss_coeff", "moe_router_bias_update_rate", "rotary_base", "window_size",
    }  # fmt: skip
    free |= {name for name in stored if name.startswith("rope_")}
    filled = _explicit(model)
    stored = _explicit(ModelConfig(**{name: stored[name] for name in filled if name in stored}))
    wrong = [
        f"{name} is {stored[name]}, not {filled[name]}"
        for name in filled
        if stored[name] != filled[name] and name not in free
    ]
    if wrong:
        raise CheckpointError(
            f"{directory}: another architecture than the params file's: {'; '.join(wrong)}. Use the params file it was made with."
        )


def _explicit(model: ModelConfig) -> dict[str, Any]:
    values = dataclasses.asdict(model)
    values["num_query_groups"] = model.num_query_groups or model.num_attention_heads
    values["kv_channels"] = model.kv_channels or model.hidden_size // model.num_attention_heads
    return values


def check_unchanged(stored: dict[str, Any] | None, config: RunConfig, directory: Path) -> list[str]:
    """Return how a resume's settings differ from its checkpoint's, each as `key: old -> new`.

    Raises: ConfigError when some of them change results and `checkpoint.accept_changes` is not set.
    """
    if stored is None:
        return []
    differences, decisive = [], []
    for key, old, new in _changed(_with_defaults(stored, config), dataclasses.asdict(config)):
        section = key.split(".")[0]
        line = f"{key}: {old} -> {new}"
        differences.append(line)
        if section in RESULT_SECTIONS and key not in FREE_SETTINGS:
            decisive.append(line)
    if decisive and not config.checkpoint.accept_changes:
        raise ConfigError(
            f"{directory}: settings that change results differ from the run so far: {'; '.join(decisive)}. "
            "Restore them, use another variant, or set checkpoint.accept_changes=true to go on with the new ones."
        )
    return differences


def _with_defaults(stored: dict[str, Any], config: RunConfig) -> dict[str, Any]:
    """Return stored settings with those that the version which saved them did not know: they acted as their defaults."""
    filled = dict(stored)
    for name, section in vars(config).items():
        if dataclasses.is_dataclass(section):
            known = {field.name: default_value(field) for field in dataclasses.fields(section)}
            later = {
                key: dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value  # type: ignore[arg-type]
                for key, value in known.items()
                if value is not dataclasses.MISSING
            }
            filled[name] = later | dict(stored.get(name) or {})
    return filled


def _changed(old: Any, new: Any, key: str = "") -> list[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            change
            for name in sorted(old.keys() | new.keys())
            for change in _changed(old.get(name), new.get(name), f"{key}.{name}" if key else name)
        ]
    same = list(old) == list(new) if isinstance(old, list | tuple) and isinstance(new, list | tuple) else old == new
    return [] if same else [(key, old, new)]
