"""The Hub, with a server made up here: what would be sent, what is sent, and what a missing network leaves."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_cpt import cli
from megatron_cpt.checkpoint.huggingface.folder import HFFolder
from megatron_cpt.checkpoint.huggingface.hub import check_repo_name, download, plan_push, push
from megatron_cpt.errors import CheckpointError


class Server:
    """What of `HfApi` a push calls; keeps the bytes that it is sent."""

    def __init__(self):
        self.calls, self.files = [], {}

    def create_repo(self, repo, **options):
        self.calls.append(("create_repo", repo, options))

    def create_branch(self, repo, **options):
        self.calls.append(("create_branch", repo, options))

    def create_commit(self, repo, operations, **options):
        self.calls.append(("create_commit", repo, options))
        contents = {each.path_in_repo: each.path_or_fileobj for each in operations}
        self.files = {
            name: value if isinstance(value, bytes) else Path(value).read_bytes() for name, value in contents.items()
        }
        return SimpleNamespace(commit_url=f"https://hub.invalid/{repo}/commit/1")


@pytest.fixture
def model(hf_models, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for file in hf_models("llama").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / ".hidden").write_text("stays here")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "README.md").write_text("card")
    return folder


def snapshot(folder):
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")}


def run(*arguments):
    with pytest.raises(SystemExit) as left:
        cli.main([str(argument) for argument in arguments])
    return left.value.code


def test_files_of_allowed_size_go_as_they_are(model):
    server = Server()
    address = push(plan_push(model, 10**9), "team/model", 10**9, private=True, revision="iter-100", api=server)
    assert address == "https://hub.invalid/team/model/commit/1"
    assert server.files == {path.name: path.read_bytes() for path in model.iterdir() if path.name != ".hidden"}
    assert server.calls[0] == ("create_repo", "team/model", {"repo_type": "model", "private": True, "exist_ok": True})
    assert server.calls[1][2]["branch"] == "iter-100" and server.calls[2][2]["revision"] == "iter-100"


def test_larger_weight_files_are_cut_anew_without_touching_the_folder(model, tmp_path):
    before = snapshot(tmp_path)
    plan = plan_push(model, 20_000)
    assert plan.replaced == ("model.safetensors",) and len(plan.new_shards) > 2
    server = Server()
    push(plan, "team/model", 20_000, api=server)
    assert snapshot(tmp_path) == before
    weights = {name: data for name, data in server.files.items() if name.endswith(".safetensors")}
    assert [(name, len(data) < 20_000) for name, data in sorted(weights.items())] == [
        (name, True) for name, _ in plan.new_shards
    ]
    assert "model.safetensors" not in weights and "model.safetensors.index.json" in server.files
    sent = tmp_path / "sent"
    sent.mkdir()
    for name, data in server.files.items():
        (sent / name).write_bytes(data)
    one, other = HFFolder(model), HFFolder(sent)
    assert sorted(one.names()) == sorted(other.names())
    assert all(torch.equal(one.read(name), other.read(name)) for name in one.names())


def test_a_dry_run_says_what_would_be_sent(model, tmp_path, capsys):
    before = snapshot(tmp_path)
    assert run("hub", "push", model, "--repo", "team/model", "--max-shard-size", "20KB", "--dry-run") == 0
    said = capsys.readouterr().out
    assert "tokenizer.json" in said and ".hidden" not in said and "instead of model.safetensors" in said
    assert "model-00001-of-" in said and "nothing was sent to the model team/model" in said
    assert snapshot(tmp_path) == before


def test_without_a_network_a_push_fails_on_one_line_and_changes_nothing(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_TOKEN", "not a token")
    before = snapshot(tmp_path)
    assert run("hub", "push", model, "--repo", "team/model", "--max-shard-size", "20KB") == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error and "http://127.0.0.1:9 refused or cannot be reached" in error
    assert "Nothing here was changed" in error
    assert snapshot(tmp_path) == before


def test_an_incomplete_model_is_not_sent(model):
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="truncated"):
        plan_push(model, 10**9)
    with pytest.raises(CheckpointError, match="no such folder"):
        plan_push(model / "x", 10**9)


def test_a_data_set_goes_as_it_is(tmp_path):
    (tmp_path / "eu").mkdir()
    (tmp_path / "eu/train.jsonl").write_text("{}\n")
    server = Server()
    push(plan_push(tmp_path, 1, "dataset"), "team/data", 1, kind="dataset", api=server)
    assert server.files == {"eu/train.jsonl": b"{}\n"}
    assert server.calls[0][2]["repo_type"] == "dataset"


def test_a_download_passes_on_what_is_wanted_and_counts_what_came(tmp_path):
    asked = {}

    def fetch(repo, **options):
        asked.update(options, repo=repo)
        folder = Path(options["local_dir"])
        (folder / ".cache/huggingface").mkdir(parents=True)
        (folder / ".cache/huggingface/x.lock").write_text("")
        (folder / "a.parquet").write_bytes(b"1234")

    assert download("team/data", tmp_path / "d", kind="dataset", include=["*.parquet"], fetch=fetch) == (1, 4)
    assert (asked["repo"], asked["repo_type"], asked["allow_patterns"]) == ("team/data", "dataset", ["*.parquet"])
    assert asked["ignore_patterns"] is None

    def fail(repo, **options):
        raise ConnectionError("no route to host")

    with pytest.raises(CheckpointError, match=r"no route to host.*What was fetched stays"):
        download("team/data", tmp_path / "d", fetch=fail)
    with pytest.raises(CheckpointError, match="no file matches"):
        download("team/data", tmp_path / "empty", fetch=lambda repo, **options: None)


@pytest.mark.parametrize(
    "name", ["team/-x", "team/x.git", "a/b/c", "team/x--y", "team/", "team/mod el", "team/x..y", "x" * 97]
)
def test_a_name_that_the_hub_refuses_is_refused_before_anything_is_read(name):
    with pytest.raises(CheckpointError, match="is no name on the Hub"):
        check_repo_name(name)


@pytest.mark.parametrize("name", ["team/main", "gpt2", "Qwen/Qwen2.5-7B", "a_b/c.d-e"])
def test_a_name_of_the_hub_passes(name):
    check_repo_name(name)


def test_a_trained_model_goes_with_a_card_and_without_local_paths(model, tmp_path):
    folder = shutil.copytree(model, tmp_path / "danish")
    (folder / "README.md").unlink()
    secret = "/scratch/project/someone/base"
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "_name_or_path": secret}))
    (folder / "mergekit_config.yml").write_text(f"models: [{{model: {secret}}}]\n")
    (folder / "BASE_MODEL_CARD.md").write_text("---\nlicense: apache-2.0\nlanguage: [da]\n---\n# Base\n")
    (folder / "LICENSE").write_text("text")
    training = {
        "iteration": 1000, "tokens": 2_000_000, "tokens_per_corpus": {"web": 1_500_000, "wiki": 500_000}, "lr": 3e-4,
        "min_lr": 3e-5, "schedule": {"lr_decay_style": "WSD"}, "base": "team/base-7b", "seq_length": 2048,
        "global_batch_size": 64, "precision": "bf16",
    }  # fmt: skip
    (folder / "conversion.json").write_text(json.dumps({"training": training}))
    report = tmp_path / "report.md"
    report.write_text("| set | bits per byte |\n")
    plan = plan_push(folder, 10**9, evaluation=report)
    written = dict(plan.written)
    assert json.loads(written["config.json"])["_name_or_path"] == "base"
    assert not any(b"/scratch" in text for text in written.values())
    assert set(written) & {name for name, _ in plan.files} == set()
    card = written["README.md"].decode()
    for words in (
        "license: apache-2.0",
        "base_model: team/base-7b",
        "| web | 1,500,000 | 75.0 % |",
        "WSD",
        "bits per byte",
    ):
        assert words in card
    server = Server()
    push(plan, "team/danish", 10**9, api=server)
    assert server.files["README.md"].decode() == card and b"/scratch" not in server.files["config.json"]


def test_a_card_that_is_there_stays(model, tmp_path):
    folder = shutil.copytree(model, tmp_path / "mine")
    (folder / "README.md").write_text("mine")
    assert "README.md" not in dict(plan_push(folder, 10**9).written)


def test_weights_in_few_bits_are_sent_as_they_are_stored(model, tmp_path):
    folder = shutil.copytree(model, tmp_path / "few-bits")
    settings = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": settings}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    tensors[name + "_scale_inv"] = torch.rand(2, 3)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    server = Server()
    push(plan_push(folder, 20_000), "team/model", 20_000, api=server)
    received = tmp_path / "received"
    received.mkdir()
    for sent, content in server.files.items():
        (received / sent).write_bytes(content)
    there = HFFolder(received, as_stored=True)
    assert set(there.names()) == set(tensors) and there.dtype(name) == torch.float8_e4m3fn
    assert torch.equal(there.read(name).view(torch.uint8), tensors[name].view(torch.uint8))


def test_a_folder_in_a_format_that_does_not_convert_is_still_sent(model, tmp_path):
    folder = shutil.copytree(model, tmp_path / "awq")
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": {"quant_method": "awq"}}
    (folder / "config.json").write_text(json.dumps(config))
    assert plan_push(folder, 10**9).num_bytes > 0
