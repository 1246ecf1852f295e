"""Layouts and names that Megatron-LM writes: stacked layers, the local specification's norms."""

import json
import re
import shutil

import pytest
import torch

from megatron_cpt.checkpoint.convert.hf_mcore import hf_to_mcore, mcore_to_hf
from megatron_cpt.checkpoint.huggingface.folder import HFFolder
from megatron_cpt.checkpoint.torch_dist import mcore
from megatron_cpt.checkpoint.torch_dist.dcp import DcpReader
from megatron_cpt.checkpoint.torch_dist.dcp_writer import Slice, write_dcp
from megatron_cpt.errors import CheckpointError


def rewrite(release, target, change):
    """Write a checkpoint again with `change(dict of tensors)` applied to it, and optimizer state and objects beside."""
    reader = DcpReader(release)
    tensors = change({key: reader.read(key) for key in reader.tensor_keys()})
    tensors |= {"optimizer.state.exp_avg.output_layer.weight": torch.zeros(3)}
    target.mkdir(parents=True)
    slices = [
        Slice(key, tuple(t.shape), t.dtype, (0,) * t.ndim, tuple(t.shape), lambda t=t: t) for key, t in tensors.items()
    ]
    extra = {"decoder.layers.self_attention.core_attention._extra_state/shard_0_2": b"", "common_state/shard_0_1": [{}]}
    write_dcp(target, slices, objects=extra)
    for name in ("metadata.json", "common.pt"):
        shutil.copy(release / name, target)
    manifest = {key: value for key, value in mcore.read_manifest(release).items() if key != "files"}
    mcore.write_manifest(target, {**manifest, "iteration": 7, "content": "full"})
    return target


def stacked(tensors):
    """Stack the layers: `decoder.layers.mlp...` with a layer axis."""
    result, layers = {}, {}
    for key, value in tensors.items():
        match = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", key)
        if match:
            layers.setdefault(match[2], {})[int(match[1])] = value
        else:
            result[key] = value
    return result | {
        f"decoder.layers.{name}": torch.stack([parts[layer] for layer in sorted(parts)])
        for name, parts in layers.items()
    }


def local_names(tensors):
    """Name the norms as Megatron's local specification does."""
    renamed = {}
    for key, value in tensors.items():
        for te, local in (
            ("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"),
            ("self_attention.linear_q_up_proj.layer_norm_weight", "self_attention.q_layernorm.weight"),
            ("self_attention.linear_kv_up_proj.layer_norm_weight", "self_attention.kv_layernorm.weight"),
        ):
            key = key.replace(te, local)
        renamed[key] = value
    return renamed


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("llama", stacked),
        ("qwen2", stacked),
        ("mixtral", stacked),
        ("mixtral", local_names),
        ("qwen3-moe", lambda tensors: stacked(local_names(tensors))),
        ("deepseek-v3", local_names),
    ],
)
def test_every_layout_and_naming_of_megatron_exports_alike(hf_models, tmp_path, name, change):
    source = hf_models(name)
    checkpoint = rewrite(hf_to_mcore(source, tmp_path / "m"), tmp_path / "run" / "iter_0000007", change)
    exported = HFFolder(mcore_to_hf(checkpoint, tmp_path / "hf", verify=True))
    original = HFFolder(source)
    assert sorted(exported.names()) == sorted(original.names())
    assert all(torch.equal(exported.read(tensor), original.read(tensor)) for tensor in original.names())


def test_a_weight_without_a_place_is_an_error(hf_models, tmp_path):
    release = hf_to_mcore(hf_models("llama"), tmp_path / "m")
    checkpoint = rewrite(
        release, tmp_path / "run" / "iter_0000007", lambda t: {**t, "mtp.layers.0.weight": torch.ones(2)}
    )
    with pytest.raises(
        CheckpointError, match=r"1 weights have no place in LlamaForCausalLM, the first are mtp.layers.0"
    ):
        mcore_to_hf(checkpoint, tmp_path / "hf")


def test_a_weight_that_is_missing_is_an_error(hf_models, tmp_path):
    release = hf_to_mcore(hf_models("llama"), tmp_path / "m")
    key = "decoder.layers.1.mlp.linear_fc2.weight"
    checkpoint = rewrite(release, tmp_path / "run" / "iter_0000007", lambda t: {k: v for k, v in t.items() if k != key})
    with pytest.raises(CheckpointError, match=f"no tensor {key}"):
        mcore_to_hf(checkpoint, tmp_path / "hf")
    assert json.loads((checkpoint / "manifest.json").read_text())["iteration"] == 7
