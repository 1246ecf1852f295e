"""Sources of Megatron weights and moments for conversions: `torch_dist` folders of every layout in use.

Megatron writes one tensor per layer, or all layers stacked (`decoder.layers.self_attention...` with a layer axis), and
its local specification names some norms differently from Transformer Engine's. Gate and up rows can be two tensors
(`..._w`, `..._v`), experts a key each (`singleton_local_shards`). Optimizer state carries the same names behind
`optimizer.state.<kind>.`; in `fully_sharded_model_space` (Megatron-Core up to 0.15) each tensor-parallel part of it is flat:
the stored shape is the grid of parts, then the elements of a part. All of them read alike here.
"""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch

from megatron_cpt.checkpoint.mapping.transforms import merge_gate_up
from megatron_cpt.checkpoint.mapping.units import Unit
from megatron_cpt.checkpoint.torch_dist.dcp import DcpReader
from megatron_cpt.errors import CheckpointError

_NOT_WEIGHTS = re.compile(
    r"^(optimizer|chained_\d+|rng_state|rerun_state|common_state|opt_param_scheduler)\b|_extra_state"
)
_OPTIMIZER = re.compile(r"^(?:chained_\d+\.)?optimizer\.state\.(\w+?)\.(.+)$")
_LOCAL_NAMES = {
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "self_attention.linear_q_up_proj.layer_norm_weight": "self_attention.q_layernorm.weight",
    "self_attention.linear_kv_up_proj.layer_norm_weight": "self_attention.kv_layernorm.weight",
}


def is_extra_state(name: str) -> bool:
    """Return whether a key is Transformer Engine's own state and no weight; grouped experts number theirs: `_extra_state1`."""
    return re.search(r"_extra_state\d*$", name) is not None


class MegatronWeights(Protocol):
    """Megatron tensors by Transformer-Engine name, independent of the format on disk."""

    def shape(self, unit: Unit) -> tuple[int, ...]:
        """Return the shape of a unit on disk, without the expert axis; its vocabulary can be padded differently."""
        ...

    def dtype(self, unit: Unit) -> torch.dtype:
        """Return the type on disk."""
        ...

    def read(self, unit: Unit, num_rows: int | None = None) -> torch.Tensor:
        """Return a unit's values, with the expert axis where it has one; `num_rows`: the first rows only."""
        ...

    def unclaimed(self, units: Sequence[Unit]) -> list[str]:
        """Return the weights that no unit reads."""
        ...


class TorchDistWeights:
    """One kind of tensor of a `torch_dist` folder: the weights (kind None), or the optimizer's `exp_avg`, `exp_avg_sq`,
    `param` (whose other name is `fp32_param`)."""

    def __init__(self, directory: Path, kind: str | None = None, reader: DcpReader | None = None):
        self.directory = directory
        self.reader = reader or DcpReader(directory)
        keys = self.reader.tensor_keys()
        if kind is None:
            self._keys = {key: key for key in keys if not _NOT_WEIGHTS.search(key)}
        else:
            kinds = ("param", "fp32_param") if kind == "param" else (kind,)
            found = ((_OPTIMIZER.match(key), key) for key in keys)
            self._keys = {match[2]: key for match, key in found if match and match[1] in kinds}

    def __len__(self) -> int:
        return len(self._keys)

    def shape(self, unit: Unit) -> tuple[int, ...]:
        """Return the shape on disk, without layer and expert axis."""
        if self._is_halved(unit):
            rows, *rest = self._part(f"{unit.key}_w", unit)[2]
            return (2 * rows, *rest)
        return self._part(unit.key, unit)[2]

    def dtype(self, unit: Unit) -> torch.dtype:
        """Return the type on disk."""
        return self.reader.dtype(self._part(unit.key + "_w" * self._is_halved(unit), unit)[0])

    def read(self, unit: Unit, num_rows: int | None = None) -> torch.Tensor:
        """Return a unit's values, with the expert axis where it has one; `num_rows`: the first rows only."""
        if self._is_halved(unit):
            values = merge_gate_up(*(self._read(f"{unit.key}_{half}", unit, None) for half in "wv"))
        else:
            values = self._read(unit.key, unit, num_rows)
        return values if unit.expert is None else values.unsqueeze(0)

    def unclaimed(self, units: Sequence[Unit]) -> list[str]:
        """Return the weights that no unit reads."""
        claimed = set()
        for unit in units:
            halves = ("_w", "_v") if self._is_halved(unit) else ("",)
            claimed |= {self._part(unit.key + half, unit)[0] for half in halves}
        return sorted(set(self._keys.values()) - claimed)

    def _read(self, name: str, unit: Unit, num_rows: int | None) -> torch.Tensor:
        key, prefix, shape = self._part(name, unit)
        stored = self.reader.shape(key)
        if len(stored) == len(prefix) + len(shape):
            wanted = shape if num_rows is None else (num_rows, *shape[1:])
            values = self.reader.read(key, (*prefix, *(0 for _ in wanted)), (*(1 for _ in prefix), *wanted))
            return values.reshape(wanted)
        grid = stored[len(prefix) : -1]
        flat = self.reader.read(key, (*prefix, *(0 for _ in grid), 0), (*(1 for _ in prefix), *grid, stored[-1]))
        parts = [size // count for size, count in zip(shape, grid, strict=True)]
        values = flat.reshape(*grid, *parts)
        order = [axis for pair in zip(range(len(grid)), range(len(grid), 2 * len(grid)), strict=True) for axis in pair]
        values = values.permute(order).reshape(shape)
        return values if num_rows is None else values[:num_rows]

    def _is_halved(self, unit: Unit) -> bool:
        return unit.is_gated and self._find(f"{unit.key}_w", unit) is not None

    def _part(self, name: str, unit: Unit) -> tuple[str, tuple[int, ...], tuple[int, ...]]:
        """Return the key on disk, the indices in front of the tensor's own axes, and its shape without them."""
        found = self._find(name, unit)
        if found is None:
            raise CheckpointError(
                f"{self.directory}: no tensor {unit.key}. The model in its manifest needs it. "
                "The checkpoint is incomplete or its manifest belongs to another model."
            )
        key, prefix = found
        stored = self.reader.shape(key)[len(prefix) :]
        if len(stored) == len(unit.shape) + 1:  # a grid of flat parts
            return key, prefix, (math.prod(stored) // math.prod(unit.shape[1:]), *unit.shape[1:])
        return key, prefix, stored

    def _find(self, name: str, unit: Unit) -> tuple[str, tuple[int, ...]] | None:
        experts = () if unit.expert is None else (unit.expert,)
        match = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", name)
        if match is None:
            candidates = [(name, experts)]
        else:
            layer, rest = int(match[1]), match[2]
            names = [rest, _LOCAL_NAMES[rest]] if rest in _LOCAL_NAMES else [rest]
            candidates = [(f"decoder.layers.{layer}.{name}", experts) for name in names]
            candidates += [(f"decoder.layers.{name}", (layer, *experts)) for name in names]
            if unit.expert is not None:
                own = rest.replace("experts.experts.", f"experts.experts.{unit.expert}.")
                candidates += [(f"decoder.layers.{layer}.{own}", ()), (f"decoder.layers.{own}", (layer,))]
        for candidate, prefix in candidates:
            if candidate in self._keys:
                return self._keys[candidate], prefix
        return None
