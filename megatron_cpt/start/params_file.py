"""A params file from a Hugging Face folder: the architecture of config.json in Megatron's words, and settings to begin with."""

from dataclasses import MISSING
from pathlib import Path
from typing import Any

import yaml

from megatron_cpt.checkpoint.huggingface.read_config import model_config_from_hf
from megatron_cpt.config.settings.fields import default_value, plain, section_fields
from megatron_cpt.config.settings.schema import ModelConfig, ParallelConfig, RunConfig
from megatron_cpt.errors import CheckpointError
from megatron_cpt.files import read_json

_MODEL_NOTES = {
    "num_query_groups": "key/value heads",
    "kv_channels": "size of a head",
    "untie_embeddings_and_output_weights": "false: the output layer is the embedding",
}


def read_model(folder: Path) -> ModelConfig:
    """Return the architecture of a Hugging Face folder.

    Raises: CheckpointError when there is no config.json or a key of it is not understood.
    """
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder}: no config.json. A Hugging Face model folder is needed. Check the path.")
    config = read_json(folder / "config.json", CheckpointError)
    if not isinstance(config, dict):
        raise CheckpointError(f"{folder / 'config.json'}: not a mapping. A model's config.json is needed.")
    return model_config_from_hf(config)


def model_section(model: ModelConfig) -> list[str]:
    """Return the lines of a params file's `model:` section: the differences from the defaults."""
    return ["model:", *_stated(model, ModelConfig, _MODEL_NOTES)]


def params_text(config: RunConfig, source: str, layout_note: str) -> str:
    """Return a params file for `config`: architecture, layout, batch, learning rate, what it trains on."""
    training, optimizer, launch = config.training, config.optimizer, config.launch
    parallel = _stated(config.parallel, ParallelConfig, {})
    lines = [
        f"# Architecture: config.json of {source}. The other settings are proposals to begin with; every one is explained by",
        "# `megatron-cpt show-config --explain KEY`.",
        f"description: {inline(Path(source).name)}",
        "",
        *model_section(config.model),
        "",
        f"# Layout: {layout_note}.",
        *(["parallel:", *parallel, ""] if parallel else []),
        "training:",
        f"  seq_length: {training.seq_length}",
        f"  micro_batch_size: {training.micro_batch_size}",
        f"  global_batch_size: {training.global_batch_size} # sequences: {training.global_batch_size * training.seq_length:,} tokens a step",
        f"  precision: {training.precision}",
        "",
        "# DECIDE: the peak. The old data is forgotten: half of it. Nothing is learned: twice (docs/cookbook.md).",
        "optimizer:",
        f"  lr: {optimizer.lr:g}",
        f"  min_lr: {optimizer.min_lr:g}",
        "  weight_decay: 0.1",
        "  adam_beta1: 0.9",
        "  adam_beta2: 0.95",
        "  adam_eps: 1e-8",
        "  clip_grad: 1.0",
        "",
        "# A site file or the command line changes them.",
        "launch:",
        f"  nodes: {launch.nodes}",
        f"  gpus_per_node: {launch.gpus_per_node}",
    ]
    return "\n".join(lines) + "\n"


def inline(value: Any) -> str:
    """Return a value as YAML on a line."""
    text: str = yaml.safe_dump(plain(value), default_flow_style=True, width=float("inf"), allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")


def _stated(section: Any, kind: type, notes: dict[str, str]) -> list[str]:
    lines = []
    for name, (_, field) in section_fields(kind).items():
        value, default = getattr(section, name), default_value(field)
        if default is MISSING or value != default:
            note = f" # {notes[name]}" if name in notes else ""
            lines.append(f"  {name}: {inline(value)}{note}")
    return lines
