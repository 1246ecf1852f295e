"""Megatron-LM's loader finds what it looks for: its steps, with the stock specification and `megatron.core` alone.

Megatron-LM itself (`megatron.training`) is not installed here; these are the calls of its `load_checkpoint` (v0.12 to v0.16):
common state first, checks of `args`, then the sharded load with the metadata that the checkpoint states.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_cpt.checkpoint.convert.hf_mcore import hf_to_mcore, mcore_to_hf
from megatron_cpt.checkpoint.torch_dist.dcp import DcpReader
from megatron_cpt.config.settings.schema import RunConfig
from tests.train.tiny import run_steps, tiny_config

TP, PP = "tensor_model_parallel_size", "pipeline_model_parallel_size"
LR, MIN_LR = 1e-3, 0.0


def load_as_megatron_lm(config: RunConfig, root: str) -> dict[str, Any]:
    """Load the newest checkpoint of `root` as Megatron-LM does; return what it took and the parameters of this rank."""
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.dist_checkpointing.strategies.common import load_common
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    from megatron_cpt.config.settings.derived import padded_vocab_size
    from megatron_cpt.train.backend.parallel import finish_parallel, initialize_parallel
    from megatron_cpt.train.model.build import build_training_model, transformer_config, unwrap
    from megatron_cpt.train.model.layer_spec import LocalRMSNorm

    initialize_parallel(config)
    iteration = (Path(root) / "latest_checkpointed_iteration.txt").read_text().strip()
    release = iteration == "release"
    directory = str(Path(root) / ("release" if release else f"iter_{int(iteration):07d}"))
    assert dist_checkpointing.check_is_distributed_checkpoint(directory)
    common = load_common(directory)  # what Megatron-Core up to 0.16 does; later ones read the same file
    assert dist_checkpointing.load_common_state_dict(directory).keys() == common.keys()
    arguments, metadata = common["args"], dist_checkpointing.load_content_metadata(preloaded_state_dict=common)
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")  # not ours: Megatron's own names and key map
    spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = LocalRMSNorm
    stock = GPTModel(
        config=transformer_config(config),
        transformer_layer_spec=spec,
        vocab_size=padded_vocab_size(config.model),
        max_sequence_length=64,
        position_embedding_type="rope",
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=not config.model.untie_embeddings_and_output_weights,
    )
    metadata["dp_cp_group"] = parallel_state.get_data_parallel_group(with_context_parallel=True)
    state: dict[str, Any] = {"model": stock.sharded_state_dict(metadata=metadata)}
    state["model"] = {name: value for name, value in state["model"].items() if "_extra_state" not in name}
    step = rates = None
    if not release and not arguments.no_save_optim:
        model, optimizer = build_training_model(config)
        named = unwrap(model[0]).sharded_state_dict(metadata=metadata)
        state["optimizer"] = optimizer.sharded_state_dict(named, is_loading=True, metadata=metadata)
        loaded = dist_checkpointing.load(state, directory, strict="assume_ok_unexpected")
        optimizer.load_state_dict(loaded["optimizer"])  # as it is: no mending of ours
        (step,) = {group["step"] for group in optimizer.param_groups}
        (rates,) = {(group["max_lr"], group["min_lr"]) for group in loaded["optimizer"]["optimizer"]["param_groups"]}
    else:
        loaded = dist_checkpointing.load(state, directory, strict="assume_ok_unexpected")
    result = {
        "args": vars(arguments),
        "iteration": common["iteration"],
        "version": common["checkpoint_version"],
        "flops": common["num_floating_point_operations_so_far"],
        "scheduler": common.get("opt_param_scheduler"),
        "step": step,
        "rates": rates,
        "norm": loaded["model"]["decoder.layers.0.input_layernorm.weight"].tolist(),
    }
    stock.load_state_dict(loaded["model"], strict=False)
    finish_parallel()
    return result


def test_megatron_lm_loads_a_checkpoint_of_a_run_with_its_optimizer(ranks, tmp_path):
    ranks.run(run_steps, 2, tiny_config(**{TP: 2}), 0, 2, None, str(tmp_path))
    for found in ranks.run(load_as_megatron_lm, 2, tiny_config(**{PP: 1}), str(tmp_path)):
        assert found["args"]["num_layers"] == 4 and found["args"]["tensor_model_parallel_size"] == 2
        assert found["args"]["no_save_rng"] and found["args"]["swiglu"] and found["args"]["add_position_embedding"]
        assert (found["iteration"], found["version"], found["flops"], found["step"]) == (2, 3.0, 0, 2)
        assert {"num_steps", "lr_decay_style", "start_wd"} < found["scheduler"].keys()
        rates = (LR, MIN_LR)
        assert (found["scheduler"]["max_lr"], found["scheduler"]["min_lr"]) == rates == found["rates"]
        stored = DcpReader(tmp_path / "iter_0000002").read(
            "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight"
        )
        assert found["norm"] == stored.tolist()


def test_megatron_lm_loads_converted_weights(ranks, tmp_path):
    ranks.run(run_steps, 1, tiny_config("tied"), 0, 1, None, str(tmp_path / "run"))
    model = tiny_config("tied").model
    folder = mcore_to_hf(tmp_path / "run", tmp_path / "hf")
    hf_to_mcore(folder, tmp_path / "weights", model=model)
    results = ranks.run(load_as_megatron_lm, 2, tiny_config("tied", **{PP: 2}), str(tmp_path / "weights"))
    assert all(found["args"]["padded_vocab_size"] == 512 and found["args"]["no_save_optim"] for found in results)


def test_the_common_state_needs_one_class_on_the_allow_list(ranks, tmp_path):
    import argparse

    ranks.run(run_steps, 1, tiny_config(), 0, 1, None, str(tmp_path))
    path = tmp_path / "iter_0000001" / "common.pt"
    allowed = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()  # importing megatron-core allows the class too
    try:
        with pytest.raises(Exception, match="argparse.Namespace"):
            torch.load(path, weights_only=True)
        with torch.serialization.safe_globals([argparse.Namespace]):
            assert torch.load(path, weights_only=True)["args"].hidden_size == 64
    finally:
        torch.serialization.add_safe_globals(allowed)
