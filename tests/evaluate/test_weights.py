import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_cpt.errors import CheckpointError
from megatron_cpt.evaluate.models.weights import divergence_table, layer_divergence, stats_table, tensor_stats
from tests.tolerances import assert_fp32_rounding


@pytest.fixture
def moved_model(tiny_model, tmp_path):
    """Return the tiny model with layer 1's feed-forward weights doubled."""
    folder = tmp_path / "moved"
    shutil.copytree(tiny_model, folder)
    weights = load_file(folder / "model.safetensors")
    for name in weights:
        if "layers.1.mlp" in name:
            weights[name] = weights[name] * 2
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_divergence_is_zero_but_where_weights_moved(tiny_model, moved_model):
    divergence = layer_divergence(moved_model, tiny_model)
    assert_fp32_rounding(divergence["feed-forward"], [0.0, 1.0])
    assert divergence | {"feed-forward": None} == {
        "attention": [0.0, 0.0],
        "feed-forward": None,
        "norms": [0.0, 0.0],
        "embeddings and output": [0.0],
    }
    assert "1.0000" in divergence_table({"moved": divergence})


def test_models_with_different_tensors_are_not_compared(tiny_model, moved_model):
    weights = load_file(moved_model / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, moved_model / "model.safetensors")
    with pytest.raises(CheckpointError, match="1 tensors"):
        layer_divergence(moved_model, tiny_model)


def test_statistics_are_those_of_the_tensors_and_count_what_is_not_finite(tiny_model, moved_model):
    weights = load_file(moved_model / "model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, moved_model / "model.safetensors", metadata={"format": "pt"})
    stats = {found.name: found for found in tensor_stats(moved_model)}
    found, tensor = stats["model.embed_tokens.weight"], weights["model.embed_tokens.weight"]
    assert (found.minimum, found.maximum) == (tensor.min().item(), tensor.max().item())
    assert_fp32_rounding(found.norm, torch.linalg.vector_norm(tensor.double()).item())
    assert found.nonfinite == 0
    assert stats["model.norm.weight"].nonfinite == 1
    assert "257x32" in stats_table(list(stats.values()))
