"""What names a run: the only params file and size there are, a word instead of --task, a run's own directory; and paths."""

import argparse
from pathlib import Path

import pytest

from megatron_cpt.cli import main
from megatron_cpt.config.loading.resolve import add_run_arguments, load_config, load_from_arguments, write_resolved
from megatron_cpt.errors import ConfigError
from megatron_cpt.run.directory import run_dir
from megatron_cpt.verbs.dispatch import parse_words

PARAMS = """\
model: {num_layers: 2, hidden_size: 32, ffn_hidden_size: 64, num_attention_heads: 4, vocab_size: 400, max_position_embeddings: 64}
training: {seq_length: 32, micro_batch_size: 2, global_batch_size: 8}
optimizer: {lr: 5e-3}
"""
TASK = """\
paths: {data_dir: data/t, runs_dir: runs}
data:
  tokenizer: tokenizer
  corpora:
    x: {documents: [x.jsonl], held_out: 1/100}
  mix: {x: 1.0}
init: {from_path: models/base}
sizes: {short: {training: {train_iters: 8}}}
variants:
  main:
  other: {init: {from_path: "variant:main"}}
"""


@pytest.fixture
def task(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t" / "params").mkdir(parents=True)
    (tmp_path / "t" / "params" / "small.yaml").write_text(PARAMS)
    (tmp_path / "t" / "task.yaml").write_text(TASK)
    return Path("t")


def load(*words: str):
    parser = argparse.ArgumentParser()
    add_run_arguments(parser)
    return load_from_arguments(parse_words(parser, words))


def test_the_only_params_and_size_need_no_name(task):
    full = load("--task", "t", "--params", "small", "--size", "short")
    assert load("--task", "t") == load("t") == load("t", "--variant", "main") == full
    assert load("t", "training.micro_batch_size=1").config.training.micro_batch_size == 1


def test_two_of_them_are_named_in_the_refusal(task):
    (task / "params" / "large.yaml").write_text(PARAMS)
    with pytest.raises(ConfigError, match=r"--params: not given, and t/params has large, small\. Name one"):
        load("t")
    (task / "task.yaml").write_text(TASK.replace("sizes: {", "sizes: {long: {training: {train_iters: 9}}, "))
    with pytest.raises(ConfigError, match=r"--size: not given, .*has the sizes long, short\. Name one"):
        load("t", "--params", "small")


def test_without_a_task_or_with_two_the_word_is_asked_for(task):
    with pytest.raises(ConfigError, match="names no task"):
        load()
    with pytest.raises(ConfigError, match="t u: 2 words"):
        load("t", "u")


def test_a_run_directory_names_its_run_with_the_settings_it_has(task):
    loaded = load("t", "--variant", "other", "optimizer.lr=1e-3")
    run = run_dir(loaded.config)
    write_resolved(loaded, run.config_path)
    again = load(str(run.path))
    assert again.config == loaded.config
    assert again.origins["optimizer.lr"] == "runs/t/small/short/other/config.yaml"
    assert load("--task", str(run.path), "optimizer.lr=2e-3").config.optimizer.lr == 2e-3
    with pytest.raises(ConfigError, match="a run directory, and --size"):
        load(str(run.path), "--size", "long")


def test_a_run_that_was_moved_is_found_where_it_is(task, tmp_path):
    loaded = load("t")
    run = run_dir(loaded.config)
    write_resolved(loaded, run.config_path)
    (tmp_path / "elsewhere").mkdir()
    Path("runs").rename("elsewhere/runs")
    moved = load("elsewhere/runs/t/small/short/main")
    assert run_dir(moved.config).path == Path("elsewhere/runs/t/small/short/main")
    Path("elsewhere/runs/t/small/short/main").rename("elsewhere/runs/t/small/short/renamed")
    with pytest.raises(ConfigError, match="Name them so again"):
        load("elsewhere/runs/t/small/short/renamed")


def test_a_relative_start_of_a_file_is_seen_from_the_data_folder_and_one_of_the_command_line_from_here(task, tmp_path):
    assert load("t").config.init.from_path == "data/t/models/base"
    assert load("t", "paths.data_dir=/elsewhere").config.init.from_path == "/elsewhere/models/base"
    assert load("t", "init.from_path=models/base").config.init.from_path == "models/base"
    assert load("t", "--variant", "other").config.init.from_path == "variant:main"
    for written, found in (("/abs/base", "/abs/base"), ("../../models/base", "models/base"), ("null", None)):
        (task / "task.yaml").write_text(TASK.replace("from_path: models/base", f"from_path: {written}"))
        assert load("t").config.init.from_path == found


def test_a_data_folder_that_is_a_link_keeps_the_meaning_of_dots(task, tmp_path):
    (tmp_path / "disk" / "deep" / "t").mkdir(parents=True)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "t").symlink_to(tmp_path / "disk" / "deep" / "t")
    (task / "task.yaml").write_text(TASK.replace("from_path: models/base", "from_path: ../base"))
    assert Path(load("t").config.init.from_path or "").resolve() == tmp_path / "disk" / "deep" / "base"


def test_a_held_out_part_names_its_files(task):
    corpus = load("t").config.data.corpora["x"]
    assert corpus.held_out == 0.01
    assert corpus.tokens == ("tokens/x_text_document",)
    assert corpus.validation == ("tokens/x.validation_text_document",)
    assert corpus.validation_documents == ("split/x/documents/validation",)


@pytest.mark.parametrize("value", ["0", "1", "2", "-1/2", "1/0", "true", "some", "[1]"])
def test_a_held_out_part_that_is_none_is_refused(task, value):
    (task / "task.yaml").write_text(TASK.replace("held_out: 1/100", f"held_out: {value}"))
    with pytest.raises(ConfigError, match="is not a part between 0 and 1"):
        load("t")


@pytest.mark.parametrize(
    ("corpus", "message"),
    [
        ("{held_out: 1/100, tokens: [x]}", "without documents"),
        ("{documents: [x], held_out: 1/100, validation: [v]}", "together with validation"),
        ("{documents: [x], held_out: 1/100, validation_documents: [v]}", "together with validation"),
    ],
)
def test_a_held_out_part_with_what_contradicts_it_is_refused(task, corpus, message):
    (task / "task.yaml").write_text(TASK.replace("{documents: [x.jsonl], held_out: 1/100}", corpus))
    with pytest.raises(ConfigError, match=message):
        load("t")


def test_status_takes_a_task_a_run_or_a_folder(task, capsys):
    loaded = load("t")
    run = run_dir(loaded.config)
    write_resolved(loaded, run.config_path)
    (run.jobs).mkdir()
    (run.jobs / "ledger.jsonl").write_text('{"job": "j1", "time": 1, "stage": "train", "state": "finished"}\n')
    for words in (["t"], [str(run.path)], ["runs"], []):
        with pytest.raises(SystemExit) as ended:
            main(["status", *words])
        assert not ended.value.code
        assert "j1" in capsys.readouterr().out
    (run.jobs / "ledger.jsonl").unlink()
    with pytest.raises(SystemExit) as ended:
        main(["status"])
    assert ended.value.code == 1 and "no run below runs" in capsys.readouterr().err


def test_what_a_job_is_told_loads_the_same_run(task):
    from megatron_cpt.verbs.submit import run_arguments

    loaded = load("t", "--variant", "other")
    write_resolved(loaded, run_dir(loaded.config).config_path)
    for words in (["t"], ["t", "--variant", "other", "optimizer.lr=1e-3"], [str(run_dir(loaded.config).path)]):
        parser = argparse.ArgumentParser()
        add_run_arguments(parser)
        arguments = parse_words(parser, words)
        first = load_from_arguments(arguments).config
        assert load(*run_arguments(arguments)).config == first
        assert load_config(Path("t"), "small", "short").config.task == "t"
