"""Weights in formats that others left behind: Megatron's `torch` format and DeepSpeed's universal checkpoints.

    iter_0001000/mp_rank_TT[_PPP]/model_optim_rng.pt     a pickle per tensor- and pipeline-parallel rank, Megatron-Core names
    <universal>/zero/<parameter>/fp32.pt                 whole tensors; Megatron-Core's, Megatron-DeepSpeed's or Hugging Face's names

Pickles are read with `weights_only` and an allow-list of what Megatron puts beside the tensors (arguments, random states);
an unlisted class is an error. Only weights are read, no optimizer state; experts must not be spread over ranks (EP 1).
"""

import argparse
import collections
import pathlib
import pickle
import re
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from numpy._core.multiarray import _reconstruct

from megatron_cpt.checkpoint.dcp import Placeholder
from megatron_cpt.checkpoint.mapping import Unit
from megatron_cpt.checkpoint.transforms import concatenate_shards, merge_gate_up
from megatron_cpt.config.schema import ModelConfig
from megatron_cpt.errors import CheckpointError

_MEGATRON_CLASSES = (
    "megatron.core.enums.ModelType",
    "megatron.core.transformer.enums.AttnBackend",
    "megatron.core.rerun_state_machine.RerunState",
    "megatron.core.rerun_state_machine.RerunMode",
    "megatron.core.rerun_state_machine.RerunDiagnostic",
    "signal.Signals",
)
_LOCAL_TO_TE = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
    "self_attention.q_layernorm.weight": "self_attention.linear_q_up_proj.layer_norm_weight",
    "self_attention.kv_layernorm.weight": "self_attention.linear_kv_up_proj.layer_norm_weight",
}
_REPLICATED = re.compile(r"layer_?norm|layernorm|router|_down_proj")
_ROWS_SPLIT = re.compile(r"linear_proj|linear_fc2")
_DEEPSPEED_NAMES = (
    (r"^(?:module\.)?language_model\.", ""),
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


class TorchFormatWeights:
    """Weights of a checkpoint in Megatron's `torch` format, put together from its tensor- and pipeline-parallel ranks."""

    def __init__(self, directory: Path):
        self.directory = directory
        ranks: dict[int, dict[int, Path]] = collections.defaultdict(dict)
        for path in sorted(directory.glob("mp_rank_*/model_optim_rng.pt")):
            numbers = [int(part) for part in path.parent.name.removeprefix("mp_rank_").split("_")]
            if len(numbers) > 2:
                raise CheckpointError(f"{path}: expert-parallel ranks. Experts on one rank each (EP 1) can be read.")
            ranks[numbers[1] if len(numbers) > 1 else 0][numbers[0]] = path
        if not ranks:
            raise CheckpointError(
                f"{directory}: no mp_rank_*/model_optim_rng.pt. A checkpoint in torch format is needed."
            )
        self._shards: dict[str, list[torch.Tensor]] = {}
        self._collect([[shards[rank] for rank in sorted(shards)] for _, shards in sorted(ranks.items())])

    def shape(self, unit: Unit) -> tuple[int, ...]:
        """Return a unit's shape."""
        return tuple(self.read(unit).shape[0 if unit.expert is None else 1 :])

    def dtype(self, unit: Unit) -> torch.dtype:
        """Return the type on disk."""
        return self._find(unit)[0].dtype

    def read(self, unit: Unit, num_rows: int | None = None) -> torch.Tensor:
        """Return a unit's values, joined over tensor-parallel ranks."""
        shards = self._find(unit)
        if len(shards) == 1 or _REPLICATED.search(unit.key):
            whole = shards[0]
        else:
            dim = 1 if _ROWS_SPLIT.search(unit.key) else 0
            whole = concatenate_shards(shards, dim, is_gate_up=unit.how == "gate_up")
        whole = whole if num_rows is None else whole[:num_rows]
        return whole if unit.expert is None else whole.unsqueeze(0)

    def unclaimed(self, units: Sequence[Unit]) -> list[str]:
        """Return the weights that no unit reads."""
        return sorted(self._shards.keys() - {name for unit in units for name in self._names(unit)})

    def _collect(self, stages: list[list[Path]]) -> None:
        """Read every rank's pickle, memory-mapped, and renumber layers over stages and virtual stages."""
        states = [[_load_pickle(path) for path in shards] for shards in stages]
        first = states[0][0]
        chunks = ["model"] if "model" in first else sorted(key for key in first if re.fullmatch(r"model\d+", key))
        offset = 0
        for chunk in chunks:
            for shards in states:
                layers = 0
                for name in shards[0][chunk]:
                    match = re.match(r"decoder\.layers\.(\d+)\.(.+)", name)
                    layers = max(layers, int(match[1]) + 1) if match else layers
                    whole = f"decoder.layers.{int(match[1]) + offset}.{match[2]}" if match else name
                    tensors = [shard[chunk][name] for shard in shards]
                    if isinstance(tensors[0], torch.Tensor) and not name.endswith("_extra_state"):
                        self._shards.setdefault(whole, tensors)
                offset += layers

    def _names(self, unit: Unit) -> list[str]:
        key = unit.key
        if unit.expert is not None:
            stem, _, rest = key.partition("experts.experts.")
            return [f"{stem}experts.local_experts.{unit.expert}.{rest}", f"{stem}experts.{rest}{unit.expert}"]
        local = [key.replace(te, name) for name, te in _LOCAL_TO_TE.items() if key.endswith(te)]
        return [key, *local]

    def _find(self, unit: Unit) -> list[torch.Tensor]:
        for name in self._names(unit):
            if name in self._shards:
                return self._shards[name]
        raise CheckpointError(f"{self.directory}: no tensor {unit.key}. The params file must describe this model.")


class DeepSpeedUniversalWeights:
    """Weights of a DeepSpeed universal checkpoint: one folder per parameter, whole tensors in fp32."""

    def __init__(self, directory: Path, model: ModelConfig):
        self.model = model
        zero = directory / "zero" if (directory / "zero").is_dir() else directory
        self._files = {_megatron_name(path.parent.name): path for path in sorted(zero.glob("*/fp32.pt"))}
        if not self._files:
            raise CheckpointError(
                f"{directory}: no zero/<parameter>/fp32.pt. A DeepSpeed universal checkpoint is needed."
            )
        self.directory = directory

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
        elif unit.how == "gate_up" and all(f"{unit.key}.{part}" in self._files for part in (0, 1)):
            whole = merge_gate_up(self._load(f"{unit.key}.0"), self._load(f"{unit.key}.1"))
        else:
            raise CheckpointError(
                f"{self.directory}: no parameter {unit.key} and no {unit.hf[0]}. Check the params file."
            )
        whole = whole if num_rows is None else whole[:num_rows]
        return whole if unit.expert is None else whole.unsqueeze(0)

    def unclaimed(self, units: Sequence[Unit]) -> list[str]:
        """Return the parameters that no unit reads."""
        return sorted(self._files.keys() - {name for unit in units for name in (unit.key, *unit.hf)})

    def _load(self, name: str) -> torch.Tensor:
        content = _load_pickle(self._files[name])
        values = content["param"] if isinstance(content, dict) else content
        if not isinstance(values, torch.Tensor):
            raise CheckpointError(f"{self._files[name]}: holds no tensor. The checkpoint is damaged.")
        return values


def _megatron_name(name: str) -> str:
    if name.startswith(("model.", "lm_head.", "decoder.")):
        return name  # Hugging Face's and Megatron-Core's own
    for pattern, replacement in _DEEPSPEED_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _load_pickle(path: Path) -> Any:
    allowed: list[Any] = [
        argparse.Namespace,
        types.SimpleNamespace,
        pathlib.PosixPath,
        numpy.ndarray,
        numpy.dtype,
        numpy.dtypes.UInt32DType,
        _reconstruct,
        (_reconstruct, "numpy.core.multiarray._reconstruct"),
        *((Placeholder, name) for name in _MEGATRON_CLASSES),
    ]
    try:
        with torch.serialization.safe_globals(allowed):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as problem:
        found = re.search(r"GLOBAL ([\w.]+)", str(problem))
        raise CheckpointError(
            f"{path}: holds {found[1] if found else 'a class'}, which is not on the allow-list of weights and arguments. "
            "It is not loaded, because it could run code."
        ) from None
    except (RuntimeError, EOFError) as problem:
        raise CheckpointError(
            f"{path}: cannot be read ({str(problem).splitlines()[0]}). The file is damaged."
        ) from None
