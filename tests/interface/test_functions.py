"""The functions of `import megatron_cpt as cpt`, each against what the command line's functions give."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import megatron_cpt as cpt
from megatron_cpt.config.loading.resolve import load_config
from megatron_cpt.errors import ConfigError, CptError, DataError
from tests.guide_scratch import build_base, build_tokenizer
from tests.tolerances import assert_fp32_rounding

NAMES = "config init dedup tokenize shard plan train run convert soup evaluate generate".split()


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    build_tokenizer(folder / "tokenizer")
    build_base(folder / "base", folder / "tokenizer")
    return folder


@pytest.fixture
def texts(tmp_path, monkeypatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    documents = ["the model learns text slowly", "books and letters with care", "the model learns text slowly", "a"]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in documents)
    Path("old.jsonl").write_text(lines)
    return documents


def test_the_interface_is_these_twelve_functions_and_they_cost_nothing_to_import():
    program = (
        "import sys, megatron_cpt as cpt\n"
        f"assert set({NAMES!r}) <= set(dir(cpt))\n"
        "assert not {'torch', 'numpy', 'yaml', 'transformers'} & set(sys.modules), sorted(sys.modules)\n"
        f"assert all(callable(getattr(cpt, name)) for name in {NAMES!r})\n"
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    with pytest.raises(AttributeError, match="no attribute 'tain'"):
        _ = cpt.tain


def test_a_name_that_is_a_package_too_is_both(monkeypatch, tmp_path):
    program = (
        "import megatron_cpt as cpt, inspect, pickle\n"
        "from megatron_cpt.config.settings import schema\n"  # before and after the package was bound
        "assert callable(cpt.config) and callable(cpt.run) and callable(cpt.evaluate) and callable(cpt.train)\n"
        "import megatron_cpt.evaluate.page.curves as curves\n"
        "assert curves.MOST_POINTS and cpt.evaluate.page.curves is curves\n"
        "assert pickle.loads(pickle.dumps(schema.InitConfig())) == schema.InitConfig()\n"
        "try: cpt.run('nowhere')\n"
        "except cpt.errors.ConfigError as problem: print(problem)\n"
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert answer.returncode == 0, answer.stderr
    assert "nowhere: no run directory" in answer.stdout


def test_settings_and_plan_are_those_of_the_command_line(tmp_path, monkeypatch):
    settings = cpt.config("tasks/template", params="llama3-8b", size="50B", settings=["optimizer.lr=1e-5"])
    assert (
        settings.config
        == load_config(Path("tasks/template"), "llama3-8b", "50B", overrides=["optimizer.lr=1e-5"]).config
    )
    assert settings["optimizer.lr"] == 1e-5 and settings.origins["optimizer.lr"] == "command line"
    assert settings.stated["model.num_layers"] == 32 and "model.qk_layernorm" not in settings.stated
    assert "<td>command line</td>" in settings._repr_html_()
    plan = cpt.plan("tasks/template", params="llama3-8b", size="50B", gpu_memory_gib=80)
    assert "fits" in str(plan).lower() and "<table>" in plan._repr_html_()
    with pytest.raises(ConfigError, match="no such params"):
        cpt.config("tasks/template", params="llama9", size="50B")


def test_documents_become_a_shard_that_is_a_sequence(models, texts):
    clean = cpt.dedup({"old": "old.jsonl"}, output="clean", exact=True, workers=1)
    assert "<table>" in clean._repr_html_()
    made = cpt.tokenize("old.jsonl", tokenizer=models / "tokenizer", output_prefix="tokens/old", workers=1)
    assert made.prefixes == [Path("tokens/old_text_document")]
    shard = cpt.shard("tokens/old_text_document.bin", tokenizer=models / "tokenizer")
    assert len(shard) == len(texts) and shard.num_tokens == sum(len(one) for one in shard)
    assert [shard.text(number).removesuffix("<|endoftext|>") for number in range(4)] == texts
    assert np.array_equal(shard[-1], shard[3]) and shard.text(-1) == shard.text(3)
    assert "old.jsonl" in str(shard.origin(1))
    with pytest.raises(IndexError):
        shard[4]
    with pytest.raises(ConfigError, match="Text needs one"):
        cpt.shard("tokens/old_text_document").text(0)
    with pytest.raises(DataError):
        cpt.shard("tokens/none")
    with pytest.raises(ConfigError, match="exactly one"):
        cpt.tokenize("old.jsonl", tokenizer=models / "tokenizer")
    kept = cpt.tokenize("clean/old", tokenizer=models / "tokenizer", output_dir="tree", workers=1)
    assert sum(len(one) for one in kept.shards()) == 3 and "<td>3</td>" in kept._repr_html_()


def test_models_are_converted_averaged_measured_and_asked(models, texts):
    release = cpt.convert(models / "base", "mcore", verify=True)
    back = cpt.convert("mcore", "hf", tokenizer=models / "tokenizer")
    assert release == Path("mcore/release") and (back / "config.json").exists()
    mean = cpt.soup([models / "base", back], output="soup")
    found = cpt.evaluate({"base": models / "base", "back": back, "soup": mean}, texts={"old": "old.jsonl"})
    assert found.bits_per_byte("back", "old") == found.bits_per_byte("base", "old")
    assert_fp32_rounding(found.bits_per_byte("soup", "old"), found.bits_per_byte("base", "old"))
    assert "reference" in found._repr_html_()
    written = cpt.generate({"base": models / "base", "back": back}, ["the <model>"], tokens=3)
    assert written.texts["base"] == written.texts["back"]
    assert "the &lt;model&gt;" in written._repr_html_()


def test_a_run_is_columns_jobs_and_a_page(tmp_path):
    run_path = tmp_path / "runs" / "t" / "p" / "s" / "main"
    run_path.mkdir(parents=True)
    with pytest.raises(CptError, match="no run directory"):
        cpt.run(run_path)
    train = [
        {"kind": "train", "iteration": i, "consumed_tokens": i * 10, "loss": 3.0 / i, "lr": 0.1} for i in range(1, 4)
    ]
    held = {
        "kind": "validation",
        "iteration": 3,
        "consumed_tokens": 30,
        "corpus": "x",
        "loss": 1.0,
        "bits_per_byte": 0.5,
    }
    records = [*train, held, {"kind": "end", "iteration": 3, "reason": "finished"}]
    (run_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    found = cpt.run(run_path)
    assert found.metrics["loss"] == [3.0, 1.5, 1.0] and found.metrics["iteration"] == [1, 2, 3]
    assert found.validation["bits_per_byte"] == [0.5]
    assert found.checkpoints == [] and found.exports == [] and found.jobs == []
    assert "finished" in found._repr_html_() and str(run_path) in found.status
    assert found.page().read_text().startswith("<!doctype html>")
