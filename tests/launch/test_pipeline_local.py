"""`submit pipeline` on this machine, from a folder that transformers saved: every stage runs, is kept, and is in the ledger."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megatron_cpt.config.loading.sources import CHECKOUT
from megatron_cpt.run.directory import RunDir
from megatron_cpt.run.ledger import read_jobs
from tests.checkpoint.conftest import build_hf_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

WORDS = "the a model of language learns from old and new text without losing what it knew before".split()
STAGES = [
    "tokenize-D0",
    "tokenize-D0-validation",
    "build-index",
    "convert-in",
    "train",
    "convert-out",
    "evaluate",
    "report",
]
LEFT_OUT = {"hidden_dropout", "attention_dropout"}
"""Settings of training that a Hugging Face folder states too; the params file here says nothing of them."""


def write_documents(path: Path, first: int, count: int) -> None:
    texts = [
        " ".join(WORDS[number * step % len(WORDS)] for step in range(60)) for number in range(first, first + count)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write("".join(json.dumps({"text": text}) + "\n" for text in texts))


def write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([" ".join(WORDS)], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(folder)


def make_task(root: Path, architecture: str) -> list[str]:
    """Write documents, a saved model, a params file that states no default of it, and a task; return what names the run."""
    from megatron_cpt.checkpoint.huggingface.read_config import model_config_from_hf
    from megatron_cpt.config.settings.schema import ModelConfig

    write_documents(root / "elsewhere" / "D0.jsonl", 1, 120)
    write_documents(root / "data" / "held" / "out.jsonl", 500, 20)
    base = root / "data" / "models" / "base"
    build_hf_model(architecture, vocab_size=304).save_pretrained(base)
    write_tokenizer(base)
    described = model_config_from_hf(json.loads((base / "config.json").read_text()))
    usual = ModelConfig(
        num_layers=described.num_layers,
        hidden_size=described.hidden_size,
        ffn_hidden_size=described.ffn_hidden_size,
        num_attention_heads=described.num_attention_heads,
        vocab_size=described.vocab_size,
        max_position_embeddings=described.max_position_embeddings,
    )
    required = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "vocab_size")
    model = {
        key: value
        for key, value in vars(described).items()
        if key not in LEFT_OUT and (key in required or value != getattr(usual, key))
    }
    if described.kv_channels == described.hidden_size // described.num_attention_heads:
        model.pop("kv_channels", None)
    training = {"seq_length": 32, "micro_batch_size": 2, "global_batch_size": 4, "precision": "fp32"}
    params = {"model": model, "training": training, "logging": {"tensorboard": False}}
    (root / "own.yaml").write_text(yaml.safe_dump({**params, "checkpoint": {"save_interval": 4}}))
    corpus = {
        "documents": [str(root / "elsewhere" / "*.jsonl")],
        "tokens": ["tokens/D0_text_document"],
        "validation_documents": ["held"],
        "validation": ["tokens/held_text_document"],
    }
    task = {
        "paths": {"runs_dir": "runs", "data_dir": "data"},
        "data": {"tokenizer": str(base), "corpora": {"D0": corpus}, "mix": {"D0": 1.0}, "max_epochs": 100},
        "evaluation": {"eval_interval": 4, "eval_iters": 1},
        "sizes": {"S": {"training": {"train_iters": 8}}},
        "variants": {"main": {"init": {"from_path": "models/base"}}, "other": {"init": {"from_path": "models/base"}}},
    }
    (root / "t").mkdir()
    (root / "t" / "task.yaml").write_text(yaml.safe_dump(task))
    return ["--task", str(root / "t"), "--params", str(root / "own.yaml"), "--size", "S"]


def call(root: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "megatron_cpt", *words]
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=600)


def ledger(root: Path, variant: str = "main") -> list[dict]:
    return list(read_jobs(RunDir(root / "runs/t/own/S" / variant).jobs).values())


@pytest.mark.parametrize(
    "architecture",
    ["llama", *(pytest.param(name, marks=pytest.mark.full) for name in ("llama-tied-llama3", "qwen3", "qwen3-moe"))],
)
def test_a_saved_folder_goes_through_every_stage(tmp_path, architecture):
    names = make_task(tmp_path, architecture)
    ended = call(tmp_path, "submit", "pipeline", *names)
    assert ended.returncode == 0, ended.stderr[-4000:]
    run = tmp_path / "runs/t/own/S/main"
    assert (run / "checkpoints_hf/iter_0000008/config.json").is_file() and (run / "report/report.md").is_file()
    jobs = ledger(tmp_path)
    assert [job["name"] for job in jobs] == STAGES
    assert {(job["state"], job["exit_code"]) for job in jobs} == {("finished", 0)}
    assert all(Path(job["log_dir"]).is_dir() for job in jobs)
    shown = call(tmp_path, "status", "--runs", "runs")
    assert all(name in shown.stdout for name in STAGES), shown.stdout


@pytest.mark.full
def test_a_pipeline_again_keeps_what_holds_and_makes_what_does_not(tmp_path):
    names = make_task(tmp_path, "llama")
    ended = call(tmp_path, "submit", "pipeline", *names, "--only", "tokenize")
    assert ended.returncode == 0, ended.stderr[-4000:]
    assert [job["name"] for job in ledger(tmp_path)] == STAGES[:2]
    tokens = tmp_path / "data/tokens/D0_text_document.json"
    assert json.loads(tokens.read_text())["documents"] == 120
    write_documents(tmp_path / "elsewhere" / "D0.jsonl", 200, 50)
    ended = call(tmp_path, "submit", "pipeline", *names)
    assert ended.returncode == 0, ended.stderr[-4000:]
    assert json.loads(tokens.read_text())["documents"] == 170, "appended documents are tokenized"
    run = tmp_path / "runs/t/own/S/main"
    kept = [run / "init/release/manifest.json", run / "checkpoints_hf/iter_0000008/config.json", tokens]
    times = [path.stat().st_mtime_ns for path in kept]

    ended = call(tmp_path, "submit", "pipeline", *names, "--soup-last", "2")
    assert ended.returncode == 0, ended.stderr[-4000:]
    assert [path.stat().st_mtime_ns for path in kept] == times, "what is made of the same inputs is kept"
    results = json.loads((run / "report/evaluation/forgetting.json").read_text())["results"]
    assert [result["model"] for result in results] == ["base", "cpt", "soup"], "the soup is evaluated"
    assert ended.stderr.count("kept, measured already on the same texts") == 2

    write_documents(tmp_path / "elsewhere" / "D0.jsonl", 300, 5)
    refused = call(tmp_path, "submit", "pipeline", *names)
    assert refused.returncode == 2 and "has trained 8 iterations on these tokens" in refused.stderr
    assert tokens.stat().st_mtime_ns == times[-1], "the tokens of a run that has begun are not replaced"
