"""Conversions of settings to Megatron arguments, and the conditions for them: the functions used by the rows of the
table."""

from collections.abc import Callable
from typing import Any

from megatron_cpt.config.settings import derived
from megatron_cpt.config.settings.batch_sizes import batch_sizes
from megatron_cpt.config.settings.fields import setting_value
from megatron_cpt.config.settings.schema import RunConfig

Value = Callable[[RunConfig], Any]
Condition = Callable[[RunConfig], bool]


def always(config: RunConfig) -> bool:
    """Return True: the row always counts."""
    return True


def is_moe(config: RunConfig) -> bool:
    """Return whether the model is a mixture of experts."""
    return config.model.num_moe_experts is not None


def is_mla(config: RunConfig) -> bool:
    """Return whether attention is multi-head latent attention."""
    return config.model.multi_latent_attention


def is_yarn(config: RunConfig) -> bool:
    """Return whether rotary frequencies are stretched by YaRN."""
    return config.model.rope_scaling_type == "yarn"


def is_mla_with_yarn(config: RunConfig) -> bool:
    """Return whether both hold: only then has Megatron-Core's configuration YaRN's numbers."""
    return is_mla(config) and is_yarn(config)


def window(config: RunConfig) -> tuple[int, int] | None:
    """Return megatron's window: tokens visible to the left besides the token itself, and to the right."""
    width = config.model.window_size
    return None if width is None else (width - 1, 0)


def moe_layer_freq(config: RunConfig) -> list[int]:
    """Return 1 for each layer of experts, 0 for each dense one before them."""
    dense = config.model.moe_num_dense_layers
    return [0] * dense + [1] * (config.model.num_layers - dense)


def recompute(config: RunConfig) -> str | None:
    """Return how much of a layer is computed again, None for nothing."""
    granularity = config.parallel.recompute_granularity
    return None if granularity == "none" else granularity


def recomputes_layers(config: RunConfig) -> bool:
    """Return whether whole layers are computed again."""
    return config.parallel.recompute_granularity == "full"


def is_bf16(config: RunConfig) -> bool:
    """Return whether training is in bf16."""
    return config.training.precision == "bf16"


def is_muon(config: RunConfig) -> bool:
    """Return whether matrices are updated by Muon."""
    return config.optimizer.name == "muon"


def has_weight_decay_schedule(config: RunConfig) -> bool:
    """Return whether weight decay changes over the stage."""
    return config.optimizer.weight_decay_incr_style != "constant"


def weight_decay_bound(name: str) -> Value:
    """Return the value of a bound of weight decay, the constant where it is not set."""

    def bound(config: RunConfig) -> float:
        value = getattr(config.optimizer, name)
        return config.optimizer.weight_decay if value is None else value

    return bound


def duration(setting: str, *, is_at_end: bool = False) -> Value:
    """Return the samples of a duration, or None where it is nothing."""

    def samples(config: RunConfig) -> int | None:
        duration = setting_value(config, setting)
        return (derived.duration_samples(duration, config.training, is_at_end=is_at_end) if duration else 0) or None

    return samples


cooldown_samples = duration("schedule.lr_cooldown", is_at_end=True)


def step_batch_sizes(config: RunConfig) -> str | None:
    """Return Megatron-LM's step schedule, places in tokens; it ignores `--rampup-batch-size` since 0.19."""
    training = config.training
    if training.rampup_batch_size is None:
        return None
    return " ".join(f"{piece.samples * training.seq_length}:{piece.size}" for piece in batch_sizes(training).pieces)


def lm_decay_style(config: RunConfig) -> str | None:
    """Return Megatron-LM's name: a constant rate with a cooldown is its WSD, WSD without one its constant."""
    style = config.schedule.lr_decay_style
    if style in ("constant", "WSD"):
        return "WSD" if cooldown_samples(config) else "constant"
    return None if style.startswith("infinite") else style


def lm_cooldown_style(config: RunConfig) -> str | None:
    """Return Megatron-LM's name of the cooldown, None where it has none."""
    style = config.schedule.lr_cooldown_style
    return style if cooldown_samples(config) and style != "geometric" else None


def exit_minutes(config: RunConfig) -> int | None:
    """Return the minutes after which Megatron-LM exits, None where the job has no such time."""
    before = config.launch.exit_before_walltime
    return (config.launch.walltime - before) // 60 if before else None
