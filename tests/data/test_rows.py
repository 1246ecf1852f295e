"""Ids of a tokenizer without a row of the model are refused wherever both are known, before anything is trained."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from megatron_cpt import cli
from megatron_cpt.checkpoint.huggingface.vocabulary import extension_for
from megatron_cpt.config.checks.vocabulary import rows_problem, vocabulary_problem
from megatron_cpt.config.settings.schema import ModelConfig
from megatron_cpt.data.shards.indexed import bin_path
from megatron_cpt.errors import CheckpointError
from tests.data.conftest import build_bpe, save_tokenizer

MODEL = """
model: {{num_layers: 2, hidden_size: 64, ffn_hidden_size: 128, num_attention_heads: 4, num_query_groups: 2,
        vocab_size: {rows}, max_position_embeddings: 64}}
training: {{seq_length: 64, micro_batch_size: 2, global_batch_size: 4, precision: fp32}}
optimizer: {{lr: 1e-2}}
"""
TASK = """
data:
  tokenizer: tokenizer
  corpora: {D0: {tokens: [D0_text_document]}}
  mix: {D0: 1.0}
sizes: {tiny: {training: {train_iters: 2}}}
"""
RUN = ("--task", "task", "--params", "params.yaml", "--size", "tiny")


def model(rows):
    sizes = {
        "num_layers": 2,
        "hidden_size": 64,
        "ffn_hidden_size": 128,
        "num_attention_heads": 4,
        "num_query_groups": 2,
    }
    return ModelConfig(**sizes, vocab_size=rows, max_position_embeddings=64)


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A tokenizer of 500 ids, a corpus of it, and a model whose rows each test states."""
    monkeypatch.chdir(tmp_path)
    save_tokenizer(build_bpe(), tmp_path / "data" / "tokenizer")
    texts = [f"{i} the quick brown fox jumps over the lazy dog" for i in range(200)]
    (tmp_path / "D0.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    run("tokenize", "--input", "D0.jsonl", "--tokenizer", "data/tokenizer", "--output-prefix", "data/D0")
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "task.yaml").write_text(TASK)

    def with_rows(rows):
        (tmp_path / "params.yaml").write_text(MODEL.format(rows=rows))

    return with_rows


def run(*words):
    with pytest.raises(SystemExit) as left:
        cli.main([*map(str, words)])
    return left.value.code


@pytest.mark.parametrize(
    ("ids", "rows", "is_refused"), [(500, 500, False), (500, 499, True), (1, 128, False), (129, 128, True)]
)
def test_each_id_needs_a_row_that_is_trained(ids, rows, is_refused):
    assert (vocabulary_problem("x", ids, model(rows)) is not None) == is_refused
    assert (rows_problem("x", ids, rows) is not None) == is_refused
    if is_refused:
        assert f"ids up to {ids - 1}; the model has {rows} rows" in vocabulary_problem("x", ids, model(rows))


@pytest.mark.parametrize("rows", [400, 499])  # 499 rows are 512 with padding, which every id fits into
@pytest.mark.parametrize("verb", [("blend", "plan"), ("plan",), ("submit", "train", "--dry-run")])
def test_a_plan_refuses_ids_without_rows(verb, rows, project, capsys):
    project(rows)
    assert run(*verb, *RUN) == 2
    assert f"has ids up to 499; the model has {rows} rows" in capsys.readouterr().err
    project(500)
    assert run(*verb, *RUN) == 0


@pytest.mark.full
def test_training_refuses_ids_without_rows_and_damaged_shards(project, tmp_path):
    project(499)
    environment = os.environ | {
        "PYTHONPATH": os.environ.get("PYTHONPATH") or os.path.dirname(os.path.dirname(cli.__file__))
    }
    train = [sys.executable, "-m", "megatron_cpt", "train", *RUN]
    done = subprocess.run(train, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 2 and "has ids up to 499; the model has 499 rows" in done.stderr
    project(500)
    path = bin_path(tmp_path / "data" / "D0_text_document")
    ids = np.fromfile(path, np.uint16)
    np.where(np.arange(len(ids)) == 5, 499, ids).astype(np.uint16).tofile(path)
    done = subprocess.run(train, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 2 and "holds other tokens than were written" in done.stderr, done.stderr


def test_a_batch_with_an_id_beyond_the_rows_is_refused_by_sample():
    import torch

    from megatron_cpt.errors import DataError
    from megatron_cpt.train.samples.batches import _check_ids

    ids = torch.zeros(2, 8, dtype=torch.int64)
    _check_ids(ids + 499, [6, 7], model(500))
    for wrong, message in (
        (500, "sample 7 has ids up to 500; the model has 500 rows"),
        (-1, "sample 7: holds the id -1"),
    ):
        changed = ids.clone()
        changed[1, 3] = wrong
        with pytest.raises(DataError, match=message):
            _check_ids(changed, [6, 7], model(500))


def test_an_extension_has_rows_for_every_id_of_its_tokenizer(bpe_dir, tmp_path):
    (tmp_path / "config.json").write_text('{"vocab_size": 400}')
    assert extension_for(tmp_path, bpe_dir, rows=500).vocab_size == 500
    with pytest.raises(CheckpointError, match="ids up to 499; the model has 498 rows"):
        extension_for(tmp_path, bpe_dir, rows=498)


def test_adopting_again_with_another_tokenizer_is_an_error(project, tmp_path, capsys):
    other = build_bpe()
    other.add_tokens(["<more>"])
    save_tokenizer(other, tmp_path / "other")
    assert run("data", "adopt", "data", "--tokenizer", "data/tokenizer") == 0
    assert "has its manifest already" in capsys.readouterr().out
    assert run("data", "adopt", "data", "--tokenizer", "other") == 2
    error = capsys.readouterr().err
    assert "D0_text_document: was tokenized with tokenizer" in error and "not with other" in error
    assert run("data", "trace", "data/D0_text_document", "--document", "1", "--tokenizer", "other") == 2


def test_held_out_shards_of_another_tokenizer_are_refused(project, tmp_path, capsys):
    other = build_bpe()
    other.add_tokens(["<more>"])
    save_tokenizer(other, tmp_path / "other")
    project(512)
    run("tokenize", "--input", "D0.jsonl", "--tokenizer", "other", "--output-prefix", "data/held")
    task = TASK.replace("[D0_text_document]", "[D0_text_document], validation: [held_text_document]")
    (tmp_path / "task" / "task.yaml").write_text(task + "evaluation: {eval_interval: 1}\n")
    assert run("blend", "plan", *RUN) == 2
    assert "held_text_document) were tokenized with other" in capsys.readouterr().err
