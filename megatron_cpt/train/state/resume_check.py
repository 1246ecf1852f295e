"""Allowed differences between a checkpoint and the run that loads it: none of the model; settings that change results
need `accept_changes`."""

import dataclasses
from pathlib import Path
from typing import Any

from megatron_cpt.checkpoint.torch_dist.mcore import read_manifest
from megatron_cpt.config.settings.batch_sizes import batch_sizes
from megatron_cpt.config.settings.fields import default_value
from megatron_cpt.config.settings.schema import CheckpointConfig, ModelConfig, RunConfig, TrainingConfig
from megatron_cpt.config.settings.values import ALL_SETTINGS, Duration
from megatron_cpt.errors import CheckpointError, ConfigError

# Sections whose values change what a run computes; the others may differ freely between a run and its resume.
RESULT_SECTIONS = ("model", "training", "optimizer", "schedule", "data")
FREE_SETTINGS = (
    "training.micro_batch_size", "training.deterministic", "training.compile", "data.max_epochs",
    # what a run passed stays in its manifest, so that these may change for what is to come
    "data.skip_iterations", "training.spike_threshold", "training.spike_action", "training.spike_skip_iterations",
    "training.spike_max_rollbacks",
)  # fmt: skip
FIXED_SETTINGS = ("data.order",)
FREE_OF_A_CORPUS = ("documents", "validation", "validation_documents")
"""Fields of a corpus that training does not read."""


def check_model_fits(directory: Path, model: ModelConfig) -> None:
    """Raise CheckpointError when a checkpoint's architecture differs from `model`, naming each difference.

    Settings that leave the tensors alone (dropout, initialisation, longest sequence, router loss weights) are allowed
    to differ.
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

    Raises: ConfigError when some of them change results and `checkpoint.accept_changes` does not name them.
    """
    if stored is None:
        return []
    differences, decisive = [], {}
    for key, old, new in _changed(_stated(_with_defaults(stored, config)), _stated(dataclasses.asdict(config))):
        line = f"{key}: {old} -> {new}"
        differences.append(line)
        if key in FIXED_SETTINGS:
            raise ConfigError(f"{directory}: {line}. It cannot change in a run that has begun. Use another variant.")
        if _changes_results(key) and not _is_accepted(key, config.checkpoint):
            decisive[key] = line
    if decisive:
        keys = list(dict.fromkeys(".".join(key.split(".")[:2]) for key in decisive))
        raise ConfigError(
            f"{directory}: settings that change results differ from the run so far: {'; '.join(decisive.values())}. "
            f"Restore them, use another variant, or set checkpoint.accept_changes=[{','.join(keys)}] to continue with the new ones."
        )
    return differences


def check_position(manifest: dict[str, Any], training: TrainingConfig, directory: Path) -> None:
    """Raise ConfigError when the settings put a checkpoint's iteration at another place than its run reached.

    Consent cannot help: the run would jump in its data, its schedule and its counts.
    """
    iteration = int(manifest["iteration"])
    samples, tokens = int(manifest["consumed_samples"]), int(manifest["consumed_tokens"])
    now = batch_sizes(training).samples(iteration)
    if (now, now * training.seq_length) != (samples, tokens):
        raise ConfigError(
            f"{directory}: the run consumed {samples} samples ({tokens} tokens) in {iteration} iterations, which with these "
            f"settings take {now} samples ({now * training.seq_length} tokens). Batch and sequence length of steps that "
            f"were made cannot change. Restore them, or begin a stage here that reads on: megatron-cpt fork --run "
            f"{directory.parent.parent} --iteration {iteration} --to-variant NAME --data continue KEY=VALUE."
        )


def reads_other_data(stored: dict[str, Any], config: RunConfig) -> bool:
    """Return whether the settings of a resume let it read other data, or in another order, than its checkpoint's."""
    keys = [key for key, _, _ in _changed(_stated(_with_defaults(stored, config)), _stated(dataclasses.asdict(config)))]
    return any(
        key in ("training.seed", "training.seq_length") or (key.startswith("data.") and _changes_reading(key))
        for key in keys
    )


def _changes_results(key: str) -> bool:
    if key.startswith("data.corpora.") and key.rpartition(".")[2] in FREE_OF_A_CORPUS:
        return False
    return key.split(".")[0] in RESULT_SECTIONS and key not in FREE_SETTINGS


def _changes_reading(key: str) -> bool:
    """Return whether a setting of the data section selects samples, instead of transforming them."""
    treated = ("fim_", "reset_attention_mask", "eod_mask_loss")
    return _changes_results(key) and not key.split(".")[1].startswith(treated)


def _is_accepted(key: str, checkpoint: CheckpointConfig) -> bool:
    return any(name == ALL_SETTINGS or f"{key}.".startswith(f"{name}.") for name in checkpoint.accept_changes)


def _stated(value: Any) -> Any:
    """Return settings as JSON holds them, but durations as a person writes them: one value, not two."""
    if isinstance(value, dict):
        if value.keys() == {"amount", "unit"}:
            return str(Duration(**value))
        return {key: _stated(item) for key, item in value.items()}
    return [_stated(item) for item in value] if isinstance(value, list | tuple) else value


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
    return [] if old == new else [(key, old, new)]
