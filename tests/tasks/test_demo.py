"""The demo's parts; the demo itself is `make demo`."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_cpt.config.loading.resolve import load_config
from tests.tolerances import assert_fp64_rounding

DEMO = Path(__file__).resolve().parents[2] / "tasks" / "demo"


def load_program(name: str):
    spec = importlib.util.spec_from_file_location(f"demo_{name}", DEMO / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def corpora():
    return load_program("make_corpora")


@pytest.fixture
def driver(tmp_path, monkeypatch):
    monkeypatch.chdir(DEMO.parents[1])
    module = load_program("run")
    monkeypatch.setattr(module, "DEMO", tmp_path)
    return module


PROSE = "This is a sentence about the weather in the north, and it goes on for a while."


def test_prose_leaves_out_code_tables_and_lists(corpora):
    text = f"""{PROSE}

>>> print("the value of a")
3

| a | table | of | the | cells | and | more | of | them |

```python
x = [value for value in the_list if value is a number and not a word]
```

- [link](https://example.org) to the page of the project, which is a list.

A second
paragraph, broken over the lines of a file, is joined to one line."""
    second = "A second paragraph, broken over the lines of a file, is joined to one line."
    assert corpora.prose(text) == f"{PROSE}\n\n{second}"


def test_a_paragraph_appears_once_however_many_packages_have_it(corpora):
    licence = " ".join([PROSE] * 6)
    documents = [corpora.Document(f"{licence}\n\n{n}: {' '.join([PROSE] * 6)}", str(n)) for n in range(3)]
    documents.append(corpora.Document(licence, "same licence"))
    kept = list(corpora.once(documents))
    assert [document.source for document in kept] == ["0", "1", "2"]
    assert sum(document.text.count(licence) for document in kept[1:]) == 2
    assert all(f"{n}:" in document.text for n, document in enumerate(kept))


def test_docstrings_come_in_the_order_of_the_source_and_broken_source_has_none(corpora):
    source = 'class A:\n    "a"\n    def f(self):\n        "f"\ndef g():\n    "g"\n'
    assert [text for text in corpora.docstrings(source) if text] == ["a", "f", "g"]
    assert list(corpora.docstrings("def (:")) == []


def test_a_documents_own_text_decides_whether_it_is_held_out(corpora):
    documents = [corpora.Document(f"{PROSE} {n}", str(n)) for n in range(2000)]
    kept, held_out = corpora.split_held_out(documents, 0.05)
    assert 60 < len(held_out) < 140
    assert corpora.split_held_out(held_out + kept[:10], 0.05) == (kept[:10], held_out)
    assert corpora.split_held_out([corpora.Document(PROSE * 1000, "long")], 1.0)[1] == []


def test_the_source_corpus_has_no_tests_tables_or_machine_files(corpora):
    sources = [document.source for document in corpora.source_documents()]
    assert "argparse.py" in sources and sources == sorted(sources)
    assert not [
        name for name in sources if "test" in name.split("/") or "site-packages" in name or "_sysconfig" in name
    ]


def test_the_tokenizer_is_the_same_each_time_and_loads_as_a_hugging_face_tokenizer(corpora, tmp_path, monkeypatch):
    from transformers import AutoTokenizer

    monkeypatch.setattr(corpora, "VOCAB_SIZE", 300)
    for name in "ab":
        corpora.train_tokenizer([PROSE, "def f(x): return x"], tmp_path / name)
    assert (tmp_path / "a" / "tokenizer.json").read_bytes() == (tmp_path / "b" / "tokenizer.json").read_bytes()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "a")
    text = "def weather():\n    return 'déjà vu'"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert (len(tokenizer), tokenizer.eos_token_id) == (300, 0)


def test_the_untrained_base_has_the_shape_that_the_params_say_and_one_seed(corpora, tmp_path):
    corpora.train_tokenizer([PROSE], tmp_path / "data" / "tokenizer")
    config = load_config(DEMO, "demo-5m", "300K", "base").config
    task = tmp_path / "task"
    task.mkdir()
    text = (DEMO / "task.yaml").read_text().replace("data_dir: runs/demo/data", f"data_dir: {tmp_path / 'data'}")
    (task / "task.yaml").write_text(text)
    hashes = set()
    for name in "ab":
        output = tmp_path / name
        command = [sys.executable, DEMO / "make_base.py", task, "demo-5m", "300K", "base", output]
        subprocess.run(command, check=True, capture_output=True, cwd=DEMO.parents[1], env=_environment())
        hashes.add((output / "model.safetensors").read_bytes())
    settings = json.loads((tmp_path / "a" / "config.json").read_text())
    assert settings["num_hidden_layers"] == config.model.num_layers
    assert settings["num_key_value_heads"] == config.model.num_query_groups
    assert (settings["bos_token_id"], settings["eos_token_id"]) == (None, 0)
    assert len(hashes) == 1


@pytest.mark.parametrize("variant", ["base", "replay", "no-replay"])
@pytest.mark.parametrize("overrides", ["FIRST_LAYOUT", "SECOND_LAYOUT", None])
def test_every_variant_is_a_valid_run_in_every_layout_of_the_demo(driver, variant, overrides):
    layout = getattr(driver, overrides) if overrides else ()
    config = load_config(DEMO, "demo-5m", "300K", variant, overrides=layout).config
    assert_fp64_rounding(sum(config.data.mix.values()), 1.0)


def test_each_verb_of_the_demo_exists_and_the_replay_command_is_the_same_before_and_after_the_kill(driver):
    from megatron_cpt.cli import VERBS

    steps = driver.steps("300K")
    commands = [command for step in steps for command in step.commands]
    assert {command[1] for command in commands if command[0] == "megatron-cpt"} <= set(VERBS)
    assert all((DEMO.parents[1] / command[1]).exists() for command in commands if command[0] == "python")
    replay = [command for command in commands if command[1:3] == ["submit", "train"] and "replay" in command]
    before, after = ([word for word in command if "=" not in word] for command in replay)
    assert before == after


def test_nothing_is_done_at_first_and_a_finished_stage_is_told_from_a_killed_one(driver, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    train = {"kind": "train", "iteration": 40}
    lines = [json.dumps(record) + "\n" for record in (train, {"kind": "end", "reason": "signal"})]
    assert not driver.is_finished(run)
    (run / "metrics.jsonl").write_text("".join(lines))
    assert not driver.is_finished(run)
    assert driver.has_trained(run, 40) and not driver.has_trained(run, 41)
    (run / "metrics.jsonl").write_text("".join(lines) + json.dumps({"kind": "end", "reason": "finished"}) + "\n")
    assert driver.is_finished(run)


def test_a_job_that_ends_before_it_was_killed_stops_the_demo(driver, tmp_path):
    with pytest.raises(SystemExit, match="exit code 2"):
        driver.run_and_kill(["python", "-c", "raise SystemExit(2)"], tmp_path, 10)


def _environment() -> dict[str, str]:
    import os

    return {**os.environ, "PYTHONPATH": str(DEMO.parents[1])}
