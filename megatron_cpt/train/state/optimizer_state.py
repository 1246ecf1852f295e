"""Optimizer state between the distributed and the plain optimizer, and between layouts with one optimizer or several.

Both keep main parameters and moments by parameter name. They differ in the main parameters' key
(`optimizer.state.param` of the distributed one, `optimizer.state.fp32_param` of the plain one in bf16, none of the
plain one in fp32, where the weights are the main parameters) and in the data other than tensors. All of that follows
from the settings except the number of updates, which is carried over.
"""

from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_cpt.checkpoint.torch_dist.dcp import read_metadata

_MAIN = ("optimizer.state.param.", "optimizer.state.fp32_param.")


def main_prefix(directory: Path) -> str:
    """Return the prefix of a parameter's name in the key of its main copy; empty if the weights are the main copy."""
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


def loadable_state(loaded: dict[Any, Any], optimizer: MegatronOptimizer, step: int | None) -> dict[Any, Any]:
    """Return loaded optimizer state in the form that this layout's optimizer expects; `step` is its number of updates.

    Experts have an optimizer of their own when EP > 1, and share one otherwise.
    """
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    states = {
        index: _part_state(loaded if len(parts) == 1 else loaded.get(index, {}), part, step)
        for index, part in enumerate(parts)
    }
    return states[0] if len(parts) == 1 else states


def _part_state(source: dict[Any, Any], part: Any, step: int | None) -> dict[Any, Any]:
    """Return what one optimizer loads.

    A stage of dense layers alone has nothing in its experts' optimizer, and then megatron returns no key for it.
    """
    state = part.state_dict()
    inner = state.get("optimizer", state)
    for group in inner["param_groups"]:
        if step is not None and "betas" in group:  # Muon counts no updates, and megatron saves only if all counts agree
            group["step"] = step
    if isinstance(part, DistributedOptimizer):
        parameters = [parameter for buffer in part.buffers for parameter in buffer.param_index_map]
        values_of = source.get("param_state", {})
        for index, values in values_of.items():  # numbered in the order of the buffers
            values.setdefault("param", parameters[index].detach().float())
        return {**state, "param_state": values_of, "param_state_sharding_type": "fully_reshardable"}
    saved = source.get("optimizer", {}) if "optimizer" in state else source
    moments = {index: values for index, values in saved.get("state", {}).items() if index in inner["state"]}
    if step is not None and any("step" in values for values in inner["state"].values()):  # torch's own Adam
        moments["common_step"] = step
    filled = {"state": moments, "param_groups": inner["param_groups"]}
    if "fp32_from_fp16_params" not in state:
        return filled
    main = source.get("fp32_from_fp16_params", state["fp32_from_fp16_params"])
    return {**state, "optimizer": filled, "fp32_from_fp16_params": main}
