"""DeepSpeed universal checkpoints: a folder per parameter with its fp32 value and its moments, whole tensors.

    <universal>/zero/<parameter>/{fp32,exp_avg,exp_avg_sq}.pt     {"param": tensor, "cat_dim": ...} or a tensor
    <universal>/zero/<parameter>/step.pt                          number of updates; or zero/optimizer_state.pt's param_groups

Parameters are named as Megatron-Core, Megatron-DeepSpeed (also its pipeline module's `3.input_layernorm.weight`) or
Hugging Face names them. Tensor-parallel slices were merged when the universal checkpoint was made: gate rows before
up rows, query-key-value per group as Megatron has them.

Source: microsoft/DeepSpeed, `deepspeed/checkpoint/ds_to_universal.py`.
"""

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from megatron_cpt.checkpoint.mapping.transforms import merge_gate_up
from megatron_cpt.checkpoint.mapping.units import Unit
from megatron_cpt.checkpoint.torch_dist.megatron_arguments import find_step
from megatron_cpt.checkpoint.torch_dist.pickles import load_safely
from megatron_cpt.config.settings.schema import ModelConfig
from megatron_cpt.errors import CheckpointError

_NAMES = (
    (r"^(?:module\.)?language_model\.", ""),
    (r"^tied_modules\.embed\.", "embedding."),
    (r"^embedding\.word_embeddings", "embedding.word_embeddings"),
    (r"^(?:encoder|transformer)\.layers\.", "decoder.layers."),
    (r"^(?:encoder|transformer)\.final_layernorm", "decoder.final_layernorm"),
    (r"\.input_layernorm\.weight$", ".self_attention.linear_qkv.layer_norm_weight"),
    (r"\.post_attention_layernorm\.weight$", ".mlp.linear_fc1.layer_norm_weight"),
    (r"\.(?:self_)?attention\.query_key_value\.", ".self_attention.linear_qkv."),
    (r"\.(?:self_)?attention\.dense\.", ".self_attention.linear_proj."),
    (r"\.mlp\.dense_h_to_4h\.", ".mlp.linear_fc1."),
    (r"\.mlp\.dense_4h_to_h\.", ".mlp.linear_fc2."),
)


class DeepSpeedUniversalWeights:
    """One kind of tensor (`fp32`, `exp_avg`, `exp_avg_sq`) of a DeepSpeed universal checkpoint, by Megatron name."""

    def __init__(self, directory: Path, model: ModelConfig, kind: str = "fp32"):
        self.directory, self.model = directory, model
        zero = directory / "zero" if (directory / "zero").is_dir() else directory
        paths = sorted(zero.glob(f"*/{kind}.pt"))
        if not paths:
            raise CheckpointError(
                f"{directory}: no zero/<parameter>/{kind}.pt. A DeepSpeed universal checkpoint is needed."
            )
        names = _pipeline_names({path.parent.name for path in paths})
        self._files = {names.get(path.parent.name) or megatron_name(path.parent.name): path for path in paths}

    def shape(self, unit: Unit) -> tuple[int, ...]:
        """Return a unit's shape."""
        return tuple(self.read(unit).shape[0 if unit.expert is None else 1 :])

    def dtype(self, unit: Unit) -> torch.dtype:
        """Return fp32, which universal checkpoints are in."""
        return torch.float32

    def read(self, unit: Unit, num_rows: int | None = None) -> torch.Tensor:
        """Return a unit's values."""
        if unit.key in self._files:
            whole = self._load(unit.key)
        elif all(name in self._files for name in unit.hf):
            whole = unit.to_mcore([self._load(name) for name in unit.hf], self.model)
            whole = whole if unit.expert is None else whole[0]
        elif unit.is_gated and all(f"{unit.key}.{part}" in self._files for part in (0, 1)):
            whole = merge_gate_up(self._load(f"{unit.key}.0"), self._load(f"{unit.key}.1"))
        else:
            raise CheckpointError(
                f"{self.directory}: no parameter {unit.key} and no {unit.hf[0]}. Check the params file."
            )
        whole = whole if num_rows is None else whole[:num_rows]
        return whole if unit.expert is None else whole.unsqueeze(0)

    def unclaimed(self, units: Sequence[Unit]) -> list[str]:
        """Return the parameters that no unit reads."""
        claimed = {name for unit in units for name in (unit.key, *unit.hf, f"{unit.key}.0", f"{unit.key}.1")}
        return sorted(self._files.keys() - claimed)

    def _load(self, name: str) -> torch.Tensor:
        content = load_safely(self._files[name], os.fspath(self._files[name]), mmap=True)
        values = content["param"] if isinstance(content, dict) else content
        if not isinstance(values, torch.Tensor):
            raise CheckpointError(f"{self._files[name]}: holds no tensor. The checkpoint is damaged.")
        return values


def universal_step(directory: Path) -> int | None:
    """Return the number of updates of a universal checkpoint, None when it does not say.

    Raises: CheckpointError when parameters state different numbers; Megatron keeps one for all.
    """
    zero = directory / "zero" if (directory / "zero").is_dir() else directory
    steps = set()
    for path in sorted((*zero.glob("*/step.pt"), *zero.glob("*/step"))):
        value = load_safely(path, os.fspath(path))
        steps.add(int(value["param"] if isinstance(value, dict) else value))
    if len(steps) > 1:
        raise CheckpointError(
            f"{directory}: parameters after {min(steps)} to {max(steps)} updates. One number is needed."
        )
    if steps:
        return steps.pop()
    state = zero / "optimizer_state.pt"
    return find_step(load_safely(state, os.fspath(state))) if state.exists() else None


def megatron_name(name: str) -> str:
    """Return Megatron-Core's name (Transformer Engine's) of a parameter of Megatron-DeepSpeed or legacy Megatron."""
    if name.startswith(("model.", "lm_head.", "decoder.")):
        return name  # Hugging Face's and Megatron-Core's own
    for pattern, replacement in _NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _pipeline_names(names: Iterable[str]) -> dict[str, str]:
    """Return Megatron-Core's names of the numbered modules of Megatron-DeepSpeed's pipeline model."""
    numbered = {name: (int(match[1]), match[2]) for name in names if (match := re.fullmatch(r"(\d+)\.(.+)", name))}
    layers = sorted({number for number, rest in numbered.values() if rest.startswith("input_layernorm.")})
    if not layers:
        return {}
    found = {}
    for name, (number, rest) in numbered.items():
        if number in layers:
            found[name] = megatron_name(f"encoder.layers.{layers.index(number)}.{rest}")
        elif number < layers[0]:
            found[name] = f"embedding.{rest}"
        else:
            found[name] = "decoder.final_layernorm.weight" if rest == "weight" else "output_layer.weight"
    return found
