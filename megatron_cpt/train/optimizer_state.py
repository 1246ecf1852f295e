"""Optimizer state between the distributed and the plain optimizer, and between layouts with one optimizer or several.

Both keep main parameters and moments by parameter name. They differ in the main parameters' key (`optimizer.state.param`
of the distributed one, `optimizer.state.fp32_param` of the plain one in bf16, none of the plain one in fp32, where the
weights are the main parameters) and in what stands beside the tensors. All of that follows from the settings except the
number of updates, which is carried over.
"""

from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_cpt.checkpoint.dcp import read_metadata
from megatron_cpt.checkpoint.megatron_common import find_step

_MAIN = ("optimizer.state.param.", "optimizer.state.fp32_param.")


def main_prefix(directory: Path) -> str:
    """Return what stands before a parameter's name in the key of its main copy: empty where the weights are it."""
    keys = list(read_metadata(directory).state_dict_metadata)
    return next((prefix for prefix in _MAIN if any(key.startswith(prefix) for key in keys)), "")


def rename_main_parameters(state: ShardedStateDict, prefix: str) -> None:
    """Let the optimizer state to load ask for main parameters by the keys that the checkpoint has, if it has any."""
    if not prefix:
        for part in (state, *(value for value in state.values() if isinstance(value, dict))):
            for values in (part.get("param_state") or {}).values():
                values.pop("param")
    for value in nested_values(state):
        if isinstance(value, ShardedTensor | ShardedTensorFactory):
            for own in _MAIN:
                if value.key.startswith(own):
                    value.key = prefix + value.key.removeprefix(own)
                    break


def loadable_state(loaded: dict[Any, Any], optimizer: MegatronOptimizer) -> dict[Any, Any]:
    """Return loaded optimizer state in the form that this layout's optimizer expects.

    Experts have an optimizer of their own when EP > 1, and share one otherwise.
    """
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    step = find_step({name: value for name, value in loaded.items() if name != "param_state"})
    states = {
        index: _part_state(loaded if len(parts) == 1 else loaded[index], part, step) for index, part in enumerate(parts)
    }
    return states[0] if len(parts) == 1 else states


def _part_state(source: dict[Any, Any], part: Any, step: int | None) -> dict[Any, Any]:
    state = part.state_dict()
    inner = state.get("optimizer", state)
    for group in inner["param_groups"]:
        if step is not None:
            group["step"] = step
    if isinstance(part, DistributedOptimizer):
        parameters = [parameter for buffer in part.buffers for parameter in buffer.param_index_map]
        for index, values in source["param_state"].items():  # numbered in the order of the buffers
            values.setdefault("param", parameters[index].detach().float())
        return {**state, "param_state": source["param_state"], "param_state_sharding_type": "fully_reshardable"}
    moments = {
        index: values
        for index, values in (source["optimizer"] if "optimizer" in state else source)["state"].items()
        if index in inner["state"]
    }
    if step is not None and any("step" in values for values in inner["state"].values()):  # torch's own Adam
        moments["common_step"] = step
    filled = {"state": moments, "param_groups": inner["param_groups"]}
    if "fp32_from_fp16_params" not in state:
        return filled
    return {**state, "optimizer": filled, "fp32_from_fp16_params": source["fp32_from_fp16_params"]}
