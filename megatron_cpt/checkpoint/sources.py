"""Where a conversion to Hugging Face reads Megatron weights from: `torch_dist` folders of every layout in use.

Megatron writes one tensor per layer, or all layers stacked (`decoder.layers.self_attention...` with a layer axis), and
its local specification names some norms differently from Transformer Engine's. All of them read alike here.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch

from megatron_cpt.checkpoint.dcp import DcpReader
from megatron_cpt.checkpoint.mapping import Unit
from megatron_cpt.errors import CheckpointError

_NOT_WEIGHTS = re.compile(
    r"^(optimizer|chained_\d+|rng_state|rerun_state|common_state|opt_param_scheduler)\b|_extra_state"
)
_LOCAL_NAMES = {
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "self_attention.linear_q_up_proj.layer_norm_weight": "self_attention.q_layernorm.weight",
    "self_attention.linear_kv_up_proj.layer_norm_weight": "self_attention.kv_layernorm.weight",
}


class MegatronWeights(Protocol):
    """Megatron tensors by Transformer-Engine name, whatever the format on disk."""

    def shape(self, unit: Unit) -> tuple[int, ...]:
        """Return the shape of a unit on disk, without the expert axis; its vocabulary may be padded otherwise."""
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
    """Weights of a `torch_dist` folder."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.reader = DcpReader(directory)
        self._keys = {key for key in self.reader.tensor_keys() if not _NOT_WEIGHTS.search(key)}

    def shape(self, unit: Unit) -> tuple[int, ...]:
        """Return the shape on disk, without layer and expert axis."""
        key, prefix = self._stored(unit)
        return self.reader.shape(key)[len(prefix) :]

    def dtype(self, unit: Unit) -> torch.dtype:
        """Return the type on disk."""
        return self.reader.dtype(self._stored(unit)[0])

    def read(self, unit: Unit, num_rows: int | None = None) -> torch.Tensor:
        """Return a unit's values, with the expert axis where it has one; `num_rows`: the first rows only."""
        key, prefix = self._stored(unit)
        shape = list(self.reader.shape(key)[len(prefix) :])
        if num_rows is not None:
            shape[0] = num_rows
        values = self.reader.read(key, (*prefix, *(0 for _ in shape)), (*(1 for _ in prefix), *shape))
        return values.reshape(shape if unit.expert is None else (1, *shape))

    def unclaimed(self, units: Sequence[Unit]) -> list[str]:
        """Return the weights that no unit reads."""
        return sorted(self._keys - {self._stored(unit)[0] for unit in units})

    def _stored(self, unit: Unit) -> tuple[str, tuple[int, ...]]:
        """Return the key on disk and the layer and expert index in front of the tensor's own axes."""
        experts = () if unit.expert is None else (unit.expert,)
        match = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", unit.key)
        if match is None:
            candidates = [(unit.key, experts)]
        else:
            layer, rest = int(match[1]), match[2]
            names = [rest, _LOCAL_NAMES[rest]] if rest in _LOCAL_NAMES else [rest]
            candidates = [(f"decoder.layers.{layer}.{name}", experts) for name in names]
            candidates += [(f"decoder.layers.{name}", (layer, *experts)) for name in names]
        for key, prefix in candidates:
            if key in self._keys:
                return key, prefix
        raise CheckpointError(
            f"{self.directory}: no tensor {unit.key}. The model in its manifest needs it. "
            "The checkpoint is incomplete or its manifest belongs to another model."
        )
