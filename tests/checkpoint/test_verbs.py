"""The verbs convert, checkpoint and soup, end to end in this process."""

import shutil

import pytest
import torch

from megatron_cpt import cli
from megatron_cpt.checkpoint.convert.hf_mcore import hf_to_mcore
from megatron_cpt.checkpoint.huggingface.folder import HFFolder
from megatron_cpt.checkpoint.torch_dist import mcore
from megatron_cpt.checkpoint.torch_dist.dcp import DcpReader
from tests.tolerances import assert_fp32_rounding

PARAMS = """
model:
  num_layers: 2
  hidden_size: 32
  ffn_hidden_size: 48
  num_attention_heads: 4
  num_query_groups: 2
  vocab_size: 130
  max_position_embeddings: 64
  rotary_base: 500000
"""


def megatron_cpt(*arguments):
    """Run a verb; return its exit code."""
    with pytest.raises(SystemExit) as left:
        cli.main([str(argument) for argument in arguments])
    return left.value.code


@pytest.fixture
def run_root(hf_models, tmp_path):
    """Return a `checkpoints` folder with iterations 1 to 3 of one small model."""
    release = hf_to_mcore(hf_models("llama"), tmp_path / "source")
    root = tmp_path / "checkpoints"
    for iteration in (1, 2, 3):
        target = mcore.checkpoint_dir(root, iteration)
        shutil.copytree(release, target)
        manifest = mcore.read_manifest(target) | {"iteration": iteration, "consumed_tokens": iteration * 1000}
        mcore.write_manifest(target, manifest)
        mcore.write_tracker(root, iteration)
    return root


def test_convert_both_ways_and_verify(hf_models, tmp_path, capsys):
    source = hf_models("qwen3")
    assert megatron_cpt("convert", "hf-to-mcore", source, tmp_path / "mcore", "--verify") == 0
    assert megatron_cpt("convert", "mcore-to-hf", tmp_path / "mcore", tmp_path / "hf", "--max-shard-size", "1MB") == 0
    assert torch.equal(HFFolder(source).read("lm_head.weight"), HFFolder(tmp_path / "hf").read("lm_head.weight"))
    capsys.readouterr()
    assert megatron_cpt("convert", "verify", source, tmp_path / "mcore") == 0
    assert "equal bit by bit" in capsys.readouterr().out
    assert megatron_cpt("convert", "verify", hf_models("llama"), tmp_path / "mcore") == 2
    assert megatron_cpt("convert", "mcore-to-hf", tmp_path / "mcore", tmp_path / "x", "--max-shard-size", "big") == 2


def test_convert_checks_the_params_file(hf_models, tmp_path):
    params = tmp_path / "tiny.yaml"
    params.write_text(PARAMS)
    assert megatron_cpt("convert", "hf-to-mcore", hf_models("llama"), tmp_path / "a", "--params", params) == 0
    params.write_text(PARAMS.replace("num_layers: 2", "num_layers: 3"))
    assert megatron_cpt("convert", "hf-to-mcore", hf_models("llama"), tmp_path / "b", "--params", params) == 2


def test_list_and_inspect_show_what_is_there(run_root, capsys):
    megatron_cpt("checkpoint", "protect", run_root, 1)
    assert megatron_cpt("checkpoint", "list", run_root) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:2] == ["1", "1K"] and lines[1].endswith("protected") and lines[3].endswith("latest")
    assert megatron_cpt("checkpoint", "inspect", run_root, "--tensors") == 0
    text = capsys.readouterr().out
    assert "decoder.layers.1.mlp.linear_fc2.weight" in text and "32x48" in text and "consumed tokens   3K" in text


def test_verify_names_damage_and_leaves_with_1(run_root, capsys):
    assert megatron_cpt("checkpoint", "verify", run_root) == 0
    (run_root / "iter_0000002" / "common.pt").write_bytes(b"")
    (run_root / "iter_0000004").mkdir()
    assert megatron_cpt("checkpoint", "verify", run_root) == 1
    lines = capsys.readouterr().out.splitlines()[-4:]
    assert [line.split()[0] for line in lines] == ["good", "DAMAGED", "good", "DAMAGED"]
    assert "common.pt has 0 bytes" in lines[1] and "did not finish" in lines[3]


def test_diff_says_which_weights_and_settings_changed(run_root, hf_models, tmp_path, capsys):
    first, second = run_root / "iter_0000001", run_root / "iter_0000002"
    assert megatron_cpt("checkpoint", "diff", first, second) == 0
    capsys.readouterr()
    other = hf_to_mcore(hf_models("qwen2"), tmp_path / "other")
    assert megatron_cpt("checkpoint", "diff", first, other) == 1
    text = capsys.readouterr().out
    assert "model.add_qkv_bias: False -> True" in text
    assert "only in the second  decoder.layers.0.self_attention.linear_qkv.bias" in text and "max |diff|" in text


def test_prune_says_first_then_does(run_root, capsys):
    megatron_cpt("checkpoint", "prune", run_root, "--keep-last", 1, "--dry-run")
    assert capsys.readouterr().out.count("would delete") == 2
    assert mcore.list_checkpoints(run_root) == [1, 2, 3]
    megatron_cpt("checkpoint", "prune", run_root, "--keep-last", 1, "--protect", 1)
    assert mcore.list_checkpoints(run_root) == [1, 3]
    assert megatron_cpt("checkpoint", "prune", run_root, "--keep-last", 0) == 2
    megatron_cpt("checkpoint", "prune", run_root, "--keep-last", 3, "--quota", "1KB")
    assert mcore.list_checkpoints(run_root) == [3]


def test_copy_takes_all_checkpoints_of_a_run(run_root, tmp_path):
    assert megatron_cpt("checkpoint", "copy", run_root, tmp_path / "archive") == 0
    assert mcore.list_checkpoints(tmp_path / "archive") == [1, 2, 3]


def test_adopt_makes_a_foreign_folder_a_checkpoint(run_root, tmp_path):
    foreign = run_root / "iter_0000003"
    (foreign / mcore.MANIFEST).unlink()
    params = tmp_path / "tiny.yaml"
    params.write_text(PARAMS)
    assert megatron_cpt("convert", "mcore-to-hf", foreign, tmp_path / "hf") == 2
    assert megatron_cpt("checkpoint", "adopt", foreign, "--params", params) == 0
    assert megatron_cpt("convert", "mcore-to-hf", foreign, tmp_path / "hf") == 0
    assert megatron_cpt("checkpoint", "adopt", foreign, "--params", params) == 2
    params.write_text(PARAMS.replace("vocab_size: 130", "vocab_size: many"))
    assert megatron_cpt("checkpoint", "adopt", run_root / "iter_0000009", "--params", params) == 2


def test_soup_averages_folders(hf_models, tmp_path, capsys):
    source = hf_models("llama")
    assert megatron_cpt("soup", "--inputs", source, source, "--base", source, "--output", tmp_path / "soup") == 0
    soup, one = (HFFolder(path).read("lm_head.weight") for path in (tmp_path / "soup", source))
    assert_fp32_rounding(soup, one, roundings=3)  # two halves and their sum
    assert megatron_cpt("soup", "--inputs", source, hf_models("qwen2"), "--output", tmp_path / "bad") == 2
    assert "some models only" in capsys.readouterr().err
    assert megatron_cpt("soup", "--output", tmp_path / "none") == 2


def test_soup_averages_megatron_checkpoints_directly(run_root, tmp_path):
    inputs = [run_root / "iter_0000001", run_root / "iter_0000002"]
    assert megatron_cpt("soup", "--inputs", *inputs, "--direct", "megatron", "--output", tmp_path / "soup") == 0
    key = "output_layer.weight"
    assert torch.equal(DcpReader(tmp_path / "soup" / "release").read(key), DcpReader(inputs[0]).read(key))
