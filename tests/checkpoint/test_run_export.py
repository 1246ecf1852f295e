"""Exports and soups of a run's checkpoints, as `convert latest`, `convert all` and `soup --task` make them."""

import shutil

import pytest
import torch
from tokenizers import Tokenizer, models

from megatron_cpt import cli
from megatron_cpt.checkpoint.convert.hf_mcore import hf_to_mcore
from megatron_cpt.checkpoint.huggingface.folder import HFFolder
from megatron_cpt.checkpoint.huggingface.write_config import hf_config_from_model
from megatron_cpt.checkpoint.torch_dist import mcore
from megatron_cpt.config.loading.sources import CHECKOUT
from megatron_cpt.verbs.model_arguments import params_model

PARAMS = """
model: {num_layers: 2, hidden_size: 32, ffn_hidden_size: 48, num_attention_heads: 4, num_query_groups: 2, vocab_size: 130,
        max_position_embeddings: 64, rotary_base: 500000}
training: {seq_length: 32, micro_batch_size: 1, global_batch_size: 1, train_iters: 30}
launch: {nodes: 1, gpus_per_node: 1}
"""
TASK = """
paths: {runs_dir: RUNS, data_dir: DATA}
data: {tokenizer: tokenizer, train_data_path: list.yaml}
sizes: {S: {}}
variants: {main: {}, other: {}}
"""


def megatron_cpt(*arguments):
    """Run a verb; return its exit code."""
    with pytest.raises(SystemExit) as left:
        cli.main([str(argument) for argument in arguments])
    return left.value.code


@pytest.fixture
def task(hf_models, tmp_path):
    """Return the arguments that name a task whose runs `main` and `other` have the iterations 10, 20 and 30."""
    folder = tmp_path / "tiny"
    (folder / "params").mkdir(parents=True)
    (folder / "params" / "p.yaml").write_text(PARAMS)
    (folder / "task.yaml").write_text(
        TASK.replace("RUNS", str(tmp_path / "runs")).replace("DATA", str(tmp_path / "data"))
    )
    tokenizer = tmp_path / "data" / "tokenizer"
    tokenizer.mkdir(parents=True)
    Tokenizer(models.BPE({"a": 0, "<|endoftext|>": 1}, [])).save(str(tokenizer / "tokenizer.json"))
    (tokenizer / "chat_template.jinja").write_text("{{ messages }}")
    for variant, name in (("main", "llama"), ("other", "llama")):
        release = hf_to_mcore(hf_models(name), tmp_path / variant)
        for iteration in (10, 20, 30):
            root = tmp_path / "runs" / "tiny" / "p" / "S" / variant / "checkpoints"
            shutil.copytree(release, mcore.checkpoint_dir(root, iteration))
            mcore.write_tracker(root, iteration)
    return ["--task", folder, "--params", "p", "--size", "S"]


def test_latest_exports_the_newest_good_checkpoint_with_the_tokenizer(task, tmp_path, hf_models, capsys):
    run = tmp_path / "runs" / "tiny" / "p" / "S" / "main"
    (run / "checkpoints" / "iter_0000030" / "common.pt").unlink()
    assert megatron_cpt("convert", "latest", *task) == 0
    output = run / "checkpoints_hf" / "iter_0000020"
    assert capsys.readouterr().out == f"{output}\n"
    assert {"tokenizer.json", "chat_template.jinja", "generation_config.json"} <= {
        path.name for path in output.iterdir()
    }
    assert torch.equal(HFFolder(output).read("lm_head.weight"), HFFolder(hf_models("llama")).read("lm_head.weight"))


def test_all_exports_what_is_not_converted_yet(task, tmp_path, capsys):
    exports = tmp_path / "runs" / "tiny" / "p" / "S" / "main" / "checkpoints_hf"
    assert megatron_cpt("convert", "all", *task, "--every", 20) == 0
    assert [path.name for path in exports.iterdir()] == ["iter_0000020"]
    written = (exports / "iter_0000020" / "config.json").stat().st_mtime_ns
    assert megatron_cpt("convert", "all", *task) == 0
    assert sorted(path.name for path in exports.iterdir()) == ["iter_0000010", "iter_0000020", "iter_0000030"]
    assert (exports / "iter_0000020" / "config.json").stat().st_mtime_ns == written
    (exports.parent / "checkpoints" / "iter_0000010" / "common.pt").unlink()
    shutil.rmtree(exports / "iter_0000030")
    assert megatron_cpt("convert", "all", *task) == 2
    assert (exports / "iter_0000030").exists() and "2 of 3 converted" in capsys.readouterr().err
    assert megatron_cpt("convert", "all", *task, "--every", 7) == 2


def test_soup_merges_the_last_checkpoints_of_one_or_several_runs(task, tmp_path):
    assert megatron_cpt("soup", *task, "--last", 2, "--output", tmp_path / "soup") == 0
    assert (tmp_path / "soup" / "merge_info.json").read_text().count('"path"') == 2
    several = [*task, "--variant", "main", "--variant", "other", "--iterations", "10,30"]
    assert megatron_cpt("soup", *several, "--output", tmp_path / "several") == 0
    assert (tmp_path / "several" / "merge_info.json").read_text().count('"path"') == 4
    direct = [*task, "--last", 3, "--direct", "huggingface"]
    assert megatron_cpt("soup", *direct, "--output", tmp_path / "direct") == 0
    assert (tmp_path / "direct" / "tokenizer.json").exists()
    assert megatron_cpt("soup", *task, "--last", 4, "--output", tmp_path / "many") == 2
    assert megatron_cpt("soup", *task, "--output", tmp_path / "which") == 2


def test_a_greedy_soup_needs_text_and_scores_on_it(task, tmp_path, capsys):
    assert megatron_cpt("soup", *task, "--last", 2, "--greedy", "--output", tmp_path / "soup") == 2
    text = tmp_path / "text.txt"
    text.write_text("aaaaaaaa\naaa\n")
    assert megatron_cpt("soup", *task, "--last", 2, "--greedy", "--text", text, "--output", tmp_path / "soup") == 0
    assert capsys.readouterr().out.count("bits per byte") == 2


@pytest.mark.parametrize("path", sorted((CHECKOUT / "params").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_params_file_describes_a_model_that_can_be_exported(path):
    assert hf_config_from_model(params_model(str(path)))["architectures"]
