"""Megatron's `torch` format: a pickle per tensor- and pipeline-parallel rank, put together again.

    iter_0001000/mp_rank_TT[_PPP]/model_optim_rng.pt     weights; with the plain optimizer its state too
    iter_0001000/mp_rank_TT[_PPP]/distrib_optim.pt       the distributed optimizer's state: flat buffers in fp32

Weights are Megatron-Core's (`decoder.layers.0...`) or the legacy model's (`language_model.encoder...`). Moments carry no
names. The plain optimizer numbers its parameters in the order of the model within each group (with weight decay: matrices;
without: biases and norms). The distributed one lays them out in reverse order in a buffer whose gaps depend on the layout;
each place is proven by comparing the main parameters there with the weights, bit by bit in the weights' type.
Expert-parallel ranks are refused.

Source: NVIDIA/Megatron-LM, `megatron/core/optimizer/{optimizer,distrib_optimizer}.py`, `megatron/training/checkpointing.py`.
"""

import collections
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron_cpt.checkpoint.foreign.deepspeed import megatron_name
from megatron_cpt.checkpoint.mapping.transforms import concatenate_shards
from megatron_cpt.checkpoint.mapping.units import Unit
from megatron_cpt.checkpoint.torch_dist.megatron_arguments import find_step
from megatron_cpt.checkpoint.torch_dist.pickles import load_safely
from megatron_cpt.checkpoint.torch_dist.weights import is_extra_state
from megatron_cpt.errors import CheckpointError

MOMENTS = ("param", "exp_avg", "exp_avg_sq")
_LOCAL_TO_TE = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
    "self_attention.q_layernorm.weight": "self_attention.linear_q_up_proj.layer_norm_weight",
    "self_attention.kv_layernorm.weight": "self_attention.linear_kv_up_proj.layer_norm_weight",
}
_REPLICATED = re.compile(r"layer_?norm|layernorm|router|_down_proj")
_ROWS_SPLIT = re.compile(r"linear_proj|linear_fc2")
_BUFFER_ALIGNMENT = 64
"""Elements: start of a parameter in the distributed optimizer's buffer, counted from its bucket."""


class Unmappable(Exception):
    """Optimizer state whose parameters cannot be identified with certainty; the text contains the reason."""


class TorchFormatWeights:
    """One kind of tensor of a checkpoint in torch format: per name the tensor-parallel shards."""

    def __init__(self, directory: Path, shards: dict[str, list[torch.Tensor]]):
        self.directory, self._shards = directory, shards

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
            whole = concatenate_shards(shards, dim, is_gate_up=unit.is_gated)
        whole = whole if num_rows is None else whole[:num_rows]
        return whole if unit.expert is None else whole.unsqueeze(0)

    def unclaimed(self, units: Sequence[Unit]) -> list[str]:
        """Return the weights that no unit reads; a tied output layer's copy of the embedding is not one."""
        claimed = {name for unit in units for name in self._names(unit)}
        return sorted(self._shards.keys() - claimed - {"word_embeddings_for_head.weight", "output_layer.weight"}) + (
            ["output_layer.weight"] if self._has_own_output_layer(units) else []
        )

    def _has_own_output_layer(self, units: Sequence[Unit]) -> bool:
        if "output_layer.weight" not in self._shards or any(unit.key == "output_layer.weight" for unit in units):
            return False
        pairs = zip(self._shards["output_layer.weight"], self._shards["embedding.word_embeddings.weight"], strict=True)
        return not all(torch.equal(left, right) for left, right in pairs)

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


@dataclass
class _Rank:
    """Content of one rank's pickle, with layers renumbered over the whole model."""

    path: Path
    state: dict[str, Any]
    chunks: list[dict[str, torch.Tensor]] = field(default_factory=list)
    """Per virtual stage: whole-model name -> tensor, in the model's order."""

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        return {name: tensor for chunk in self.chunks for name, tensor in chunk.items()}


class TorchFormat:
    """A checkpoint in torch format: `weights`, and on request the optimizer's tensors and step."""

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
        self._stages = [
            [_Rank(path, load_safely(path, os.fspath(path), mmap=True)) for _, path in sorted(shards.items())]
            for _, shards in sorted(ranks.items())
        ]
        self._number_layers()
        self.weights = self._joined([[rank.tensors for rank in stage] for stage in self._stages])
        first = self._stages[0][0].state
        self.iteration = first.get("iteration")
        version = first.get("checkpoint_version", 3.0)
        if version < 2.0:
            raise CheckpointError(
                f"{directory}: checkpoint_version {version} orders query, key and value otherwise. Version 2.0 or newer "
                "is needed. Load and save it once with Megatron-LM."
            )

    def optimizer(self) -> tuple[dict[str, TorchFormatWeights], int]:
        """Return kind (param, exp_avg, exp_avg_sq) -> tensors, and the number of updates.

        Raises: Unmappable saying why there is no such state that can be used.
        """
        per_stage = [[_rank_moments(rank) for rank in stage] for stage in self._stages]
        joined = {kind: self._joined([[rank[kind] for rank in stage] for stage in per_stage]) for kind in MOMENTS}
        step = find_step(self._stages[0][0].state.get("optimizer")) or _step_of_parameters(self._stages[0][0])
        if step is None:
            raise Unmappable("the number of updates is not in the checkpoint")
        return joined, step

    def _joined(self, stages: list[list[dict[str, torch.Tensor]]]) -> TorchFormatWeights:
        shards: dict[str, list[torch.Tensor]] = {}
        for ranks in stages:
            for name in ranks[0]:
                shards.setdefault(name, [rank[name] for rank in ranks])
        return TorchFormatWeights(self.directory, shards)

    def _number_layers(self) -> None:
        first = self._stages[0][0].state
        chunks = ["model"] if "model" in first else sorted(key for key in first if re.fullmatch(r"model\d+", key))
        offset = 0
        for chunk in chunks:
            for stage in self._stages:
                layers = 0
                for rank in stage:
                    named = {megatron_name(name): value for name, value in _flat(rank.state[chunk]).items()}
                    whole = {}
                    for name, tensor in named.items():
                        match = re.match(r"decoder\.layers\.(\d+)\.(.+)", name)
                        layers = max(layers, int(match[1]) + 1) if match else layers
                        whole[f"decoder.layers.{int(match[1]) + offset}.{match[2]}" if match else name] = tensor
                    rank.chunks.append(whole)
                offset += layers


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, torch.Tensor]:
    """Return the tensors of nested dictionaries by dotted name, without Transformer Engine's extra states."""
    tensors: dict[str, torch.Tensor] = {}
    for name, part in value.items():
        if isinstance(part, dict):
            tensors |= _flat(part, f"{prefix}{name}.")
        elif isinstance(part, torch.Tensor) and not is_extra_state(name):
            tensors[prefix + name] = part
    return tensors


def _rank_moments(rank: _Rank) -> dict[str, dict[str, torch.Tensor]]:
    """Return kind -> name -> this rank's shard. Raises: Unmappable."""
    state = rank.state.get("optimizer")
    if not state:
        raise Unmappable("it was saved without optimizer (--no-save-optim)")
    if isinstance(state, list) and len(state) == 1:
        state = state[0]
    if isinstance(state, list):
        raise Unmappable(f"it has {len(state)} chained optimizers")
    flat = rank.path.with_name("distrib_optim.pt")
    if flat.exists():
        return _distributed_moments(rank, load_safely(flat, os.fspath(flat), mmap=True))
    inner = state.get("optimizer", state)
    if not any("exp_avg" in values for values in inner.get("state", {}).values() if isinstance(values, dict)):
        raise Unmappable(f"{rank.path.name} holds no moments and there is no {flat.name} next to it")
    return _plain_moments(rank, inner, state.get("fp32_from_fp16_params"))


def _plain_moments(rank: _Rank, inner: dict[str, Any], mains: list[Any] | None) -> dict[str, dict[str, torch.Tensor]]:
    result: dict[str, dict[str, torch.Tensor]] = {kind: {} for kind in MOMENTS}
    names = [name for name in rank.tensors if not name.endswith("expert_bias")]
    for number, group in enumerate(inner["param_groups"]):
        decays = group["wd_mult"] != 0 if "wd_mult" in group else group.get("weight_decay", 0) != 0
        members = [name for name in names if decays == (rank.tensors[name].ndim > 1 and not name.endswith(".bias"))]
        if len(members) != len(group["params"]):
            raise Unmappable(
                f"group {number} of the optimizer has {len(group['params'])} parameters, the model {len(members)}"
            )
        for place, (name, index) in enumerate(zip(members, group["params"], strict=True)):
            values = inner["state"][index]
            main = mains[number][place] if mains is not None else rank.tensors[name]
            parts = {"param": main, "exp_avg": values["exp_avg"], "exp_avg_sq": values["exp_avg_sq"]}
            if not torch.equal(main.to(rank.tensors[name].dtype), rank.tensors[name]):
                raise Unmappable(f"main parameter {index} of the optimizer is not {name}")
            for kind, tensor in parts.items():
                if tensor.shape != rank.tensors[name].shape:
                    raise Unmappable(f"{kind} {index} is {list(tensor.shape)}, {name} another shape")
                result[kind][name] = tensor.float()
    if set(result["param"]) != set(names):
        raise Unmappable("some parameters are in no group of the optimizer")
    return result


def _distributed_moments(rank: _Rank, state: Any) -> dict[str, dict[str, torch.Tensor]]:
    if isinstance(state, list) and len(state) == 1:
        state = state[0]
    if not isinstance(state, dict) or not state.get("buckets_coalesced"):
        raise Unmappable("distrib_optim.pt keeps its buckets apart or has several optimizers")
    buffers = [value for key, value in sorted((k, v) for k, v in state.items() if isinstance(k, int))]
    if len(buffers) != len(rank.chunks) or any(len(types) != 1 for types in buffers):
        raise Unmappable(f"distrib_optim.pt has {len(buffers)} buffers for {len(rank.chunks)} parts of the model")
    result: dict[str, dict[str, torch.Tensor]] = {kind: {} for kind in MOMENTS}
    for chunk, types in zip(rank.chunks, buffers, strict=True):
        (world,) = types.values()
        start = bucket = 0
        for name in reversed([name for name in chunk if not name.endswith("expert_bias")]):
            weight = chunk[name]
            aligned = bucket + -(-(start - bucket) // _BUFFER_ALIGNMENT) * _BUFFER_ALIGNMENT
            found = next((place for place in (aligned, start) if _holds(world["param"], place, weight)), None)
            if found is None:
                raise Unmappable(f"{name} is not where its order says in distrib_optim.pt")
            bucket = bucket if found == aligned else found
            start = found + weight.numel()
            for kind in MOMENTS:
                result[kind][name] = world[kind][found:start].view(weight.shape)
    return result


def _holds(flat: torch.Tensor, place: int, weight: torch.Tensor) -> bool:
    there = flat[place : place + weight.numel()]
    return there.numel() == weight.numel() and torch.equal(there.to(weight.dtype), weight.reshape(-1))


def _step_of_parameters(rank: _Rank) -> int | None:
    """Return the number of updates that torch's own Adam keeps with each parameter."""
    state = rank.state["optimizer"]
    state = state[0] if isinstance(state, list) else state
    values = state.get("optimizer", state).get("state", {}).values()
    steps = {int(value["step"]) for value in values if isinstance(value, dict) and "step" in value}
    return steps.pop() if len(steps) == 1 else None
