"""The planner's bytes of weights, gradients, optimizer and checkpoint are those of the tensors that ranks really hold."""

import dataclasses
import math
from pathlib import Path

import pytest

from megatron_cpt.checkpoint.torch_dist.dcp import read_metadata
from megatron_cpt.config.settings.schema import LaunchConfig, OptimizerConfig
from megatron_cpt.launch.planning.memory import checkpoint_bytes, stage_memories
from tests.tolerances import assert_about
from tests.train.tiny import manifest_of, tiny_config

TP, PP, EP = "tensor_model_parallel_size", "pipeline_model_parallel_size", "expert_model_parallel_size"
CASES = [
    ("dense", "fp32", "adam", {}),
    ("qwen", "bf16", "adam", {TP: 2}),
    ("tied", "bf16", "adam", {PP: 2}),
    ("moe", "bf16", "adam", {EP: 2}),
    ("dense", "fp32", "muon", {}),
    ("qwen", "bf16", "muon", {TP: 2}),
    ("tied", "fp32", "muon", {PP: 2}),
    ("moe", "bf16", "muon", {EP: 2}),
    ("deepseek", "bf16", "muon", {TP: 2, EP: 2, "expert_tensor_parallel_size": 1}),
]


def measure(config, folder):
    """Return the bytes of this rank's weights, gradients and optimizer state; save a checkpoint."""
    from megatron_cpt.train.backend.parallel import finish_parallel, initialize_parallel
    from megatron_cpt.train.model.build import build_training_model
    from megatron_cpt.train.state.checkpointing import save_checkpoint

    initialize_parallel(config)
    model, optimizer = build_training_model(config)
    weights = [parameter for chunk in model for parameter in chunk.parameters()]
    state = []
    for part in optimizer.chained_optimizers if hasattr(optimizer, "chained_optimizers") else [optimizer]:
        state += [tensor for values in part.optimizer.state.values() for tensor in values.values()]
        state += [tensor for group in part.optimizer.param_groups for tensor in group["params"]]
    sizes = [_bytes(weights), _bytes([weight.main_grad for weight in weights])]
    sizes.append(_bytes(state, but={tensor.untyped_storage().data_ptr() for tensor in weights}))
    save_checkpoint(Path(folder), 1, model, optimizer, manifest_of(config, 1))
    finish_parallel()
    return sizes


WHY = "megatron pads the buffers of parameters and gradients to multiples of 128 values"


def _bytes(tensors, but=()):
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}
    return sum(storage.nbytes() for pointer, storage in storages.items() if pointer not in but)


@pytest.mark.parametrize(("kind", "precision", "optimizer", "layout"), CASES)
def test_the_estimate_is_what_two_ranks_hold_and_save(ranks, tmp_path, kind, precision, optimizer, layout):
    if optimizer == "muon":
        pytest.importorskip("emerging_optimizers")
        layout = layout | {"use_distributed_optimizer": False}
    config = tiny_config(kind, precision, **layout)
    config = dataclasses.replace(
        config, optimizer=OptimizerConfig(name=optimizer), launch=LaunchConfig(gpus_per_node=2)
    )
    stages = stage_memories(config)
    for rank, measured in enumerate(ranks.run(measure, 2, config, str(tmp_path))):
        stage = stages[rank if PP in layout else 0]
        assert_about(measured, [stage.weights, stage.gradients, stage.optimizer], within=5e-3, why=WHY)
    entries = read_metadata(tmp_path / "iter_0000001").state_dict_metadata.values()
    tensors = [entry for entry in entries if hasattr(entry, "size")]
    saved = sum(math.prod(tensor.size) * tensor.properties.dtype.itemsize for tensor in tensors)
    assert_about(saved, checkpoint_bytes(config), within=5e-3, why=WHY)
