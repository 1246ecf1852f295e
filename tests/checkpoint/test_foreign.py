"""Megatron's torch format and DeepSpeed universal checkpoints as sources of weights, read without running code."""

import argparse
import json

import numpy
import pytest
import torch

from megatron_cpt.checkpoint.convert.choices import ImportChoices
from megatron_cpt.checkpoint.convert.hf_mcore import hf_to_mcore
from megatron_cpt.checkpoint.foreign.convert import foreign_to_hf
from megatron_cpt.checkpoint.huggingface.folder import HFFolder
from megatron_cpt.checkpoint.huggingface.read_config import model_config_from_hf
from megatron_cpt.checkpoint.torch_dist.dcp import DcpReader
from megatron_cpt.errors import CheckpointError


@pytest.fixture
def llama(hf_models, tmp_path):
    """Return a Hugging Face folder, its model, and its tensors by Megatron's names."""
    source = hf_models("llama")
    reader = DcpReader(hf_to_mcore(source, tmp_path / "mcore", options=ImportChoices(make_vocab_size_divisible_by=4)))
    model = model_config_from_hf(json.loads((source / "config.json").read_text()))
    return source, model, {key: reader.read(key) for key in reader.tensor_keys()}


def shard(name, tensor, rank, size):
    """Return what a tensor-parallel rank holds."""
    if "norm" in name:
        return tensor
    if "linear_fc1.weight" in name:
        gate, up = tensor.chunk(2)
        return torch.cat((gate.chunk(size)[rank], up.chunk(size)[rank]))
    return tensor.chunk(size, dim=1 if "linear_proj" in name or "linear_fc2" in name else 0)[rank].clone()


def write_torch_format(root, tensors, *, tp, pp, extra=None):
    """Write `mp_rank_TT[_PPP]/model_optim_rng.pt` of two layers, as Megatron's local specification names them."""
    for stage in range(pp):
        for rank in range(tp):
            part = {}
            for name, tensor in tensors.items():
                if name.startswith("decoder.layers."):
                    layer = int(name.split(".")[2])
                    if layer // (2 // pp) != stage:
                        continue
                    name = name.replace(f"layers.{layer}.", f"layers.{layer % (2 // pp)}.")
                    name = name.replace("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight")
                elif stage != (0 if name.startswith("embedding") else pp - 1):
                    continue
                part[name] = shard(name, tensor, rank, tp)
            part["decoder.layers.0.mlp.linear_fc1._extra_state"] = None
            folder = root / (f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if pp > 1 else ""))
            folder.mkdir(parents=True)
            rng = [{"np_rng_state": numpy.random.get_state(), "torch_rng_state": torch.get_rng_state()}]
            state = {"model": part, "args": argparse.Namespace(a=1), "rng_state": rng, "iteration": 5, **(extra or {})}
            torch.save(state, folder / "model_optim_rng.pt")
    return root


def assert_same(source, output):
    """Compare two Hugging Face folders bit by bit."""
    left, right = HFFolder(source), HFFolder(output)
    assert sorted(left.names()) == sorted(right.names())
    assert all(torch.equal(left.read(name), right.read(name)) for name in left.names())


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (2, 2), (1, 2)])
def test_torch_format_shards_are_put_together(llama, tmp_path, tp, pp):
    source, model, tensors = llama
    root = write_torch_format(tmp_path / "iter_0000005", tensors, tp=tp, pp=pp)
    assert_same(source, foreign_to_hf(root, tmp_path / "hf", model, verify=True))


class Evil:
    """Would run code when unpickled."""

    def __reduce__(self):
        return (print, ("gotcha",))


def test_a_pickle_with_anything_else_is_refused(llama, tmp_path, capsys):
    _, model, tensors = llama
    root = write_torch_format(tmp_path / "evil", tensors, tp=1, pp=1, extra={"args": Evil()})
    with pytest.raises(CheckpointError, match="print, which is not on the allow-list"):
        foreign_to_hf(root, tmp_path / "hf", model)
    assert "gotcha" not in capsys.readouterr().out


def test_expert_parallel_ranks_and_damaged_files_are_refused(llama, tmp_path):
    _, model, tensors = llama
    (write_torch_format(tmp_path / "damaged", tensors, tp=1, pp=1) / "mp_rank_00" / "model_optim_rng.pt").write_bytes(
        b"PK"
    )
    with pytest.raises(CheckpointError, match="model_optim_rng.pt"):
        foreign_to_hf(tmp_path / "damaged", tmp_path / "hf", model)
    (write_torch_format(tmp_path / "ep", tensors, tp=1, pp=1) / "mp_rank_00").rename(
        tmp_path / "ep" / "mp_rank_00_000_000"
    )
    with pytest.raises(CheckpointError, match="expert-parallel"):
        foreign_to_hf(tmp_path / "ep", tmp_path / "hf", model)


def test_a_params_file_of_another_model_is_found(llama, tmp_path):
    _, model, tensors = llama
    root = write_torch_format(tmp_path / "iter_0000005", tensors, tp=1, pp=1)
    fewer = type(model)(**{**vars(model), "num_layers": 1})
    with pytest.raises(CheckpointError, match="weights have no place"):
        foreign_to_hf(root, tmp_path / "hf", fewer)


DEEPSPEED = {
    "embedding.word_embeddings.weight": "language_model.embedding.word_embeddings.weight",
    "output_layer.weight": "language_model.output_layer.weight",
    "decoder.final_layernorm.weight": "language_model.encoder.final_layernorm.weight",
}


def deepspeed_name(name):
    """Return Megatron-DeepSpeed's name of a Megatron-Core tensor."""
    for ours, theirs in (
        ("decoder.layers", "language_model.encoder.layers"),
        ("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight"),
        ("mlp.linear_fc1.layer_norm_weight", "post_attention_layernorm.weight"),
        ("linear_qkv", "query_key_value"),
        ("linear_proj", "dense"),
        ("linear_fc1", "dense_h_to_4h"),
        ("linear_fc2", "dense_4h_to_h"),
    ):
        name = name.replace(ours, theirs)
    return name


@pytest.mark.parametrize("names", ["megatron-deepspeed", "megatron-core", "huggingface"])
def test_deepspeed_universal_parameters_are_read_by_any_of_three_namings(llama, tmp_path, names):
    source, model, tensors = llama
    if names == "huggingface":
        content = {name: HFFolder(source).read(name) for name in HFFolder(source).names()}
    elif names == "megatron-core":
        content = tensors
    else:
        content = {DEEPSPEED.get(name) or deepspeed_name(name): tensor for name, tensor in tensors.items()}
    for name, tensor in content.items():
        folder = tmp_path / "universal" / "zero" / name
        folder.mkdir(parents=True)
        torch.save({"param": tensor.float(), "cat_dim": 0}, folder / "fp32.pt")
        torch.save(tensor, folder / "exp_avg.pt")
    assert_same(source, foreign_to_hf(tmp_path / "universal", tmp_path / "hf", model, verify=True))
