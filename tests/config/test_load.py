"""Layers merge in order with their origins; every mistake of every layer is named at once."""

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_cpt.config.loading import sources
from megatron_cpt.config.loading.resolve import (
    add_run_arguments,
    load_config,
    load_from_arguments,
    read_resolved,
    resolved_text,
    write_resolved,
)
from megatron_cpt.config.settings.fields import setting_keys
from megatron_cpt.config.settings.schema import CorpusConfig
from megatron_cpt.config.settings.values import Duration
from megatron_cpt.errors import ConfigError

Refused = Callable[..., str]


def test_each_value_comes_from_the_last_layer_that_states_it(tree) -> None:
    loaded = tree.load("training.micro_batch_size=1", variant="replay", site="abci")
    config, origins = loaded.config, loaded.origins
    assert (config.task, config.params, config.size, config.variant) == ("ja", "tiny", "1M", "replay")
    assert config.model.num_layers == 4 and origins["model.num_layers"] == "params/tiny.yaml"
    assert config.optimizer.lr == 1e-4 and origins["optimizer.lr"] == "tasks/ja/task.yaml (variants.replay)"
    assert config.training.train_tokens == 10**6 and origins["training.train_tokens"] == "tasks/ja/task.yaml (sizes.1M)"
    assert config.launch.walltime == 86400 and origins["launch.walltime"] == "pbs/sites/abci.yaml"
    assert config.training.micro_batch_size == 1 and origins["training.micro_batch_size"] == "command line"
    assert config.optimizer.adam_beta2 == 0.95 and origins["optimizer.adam_beta2"] == "default"


def test_every_setting_has_an_origin(tree) -> None:
    assert set(tree.load().origins) == set(setting_keys())


def test_yaml_traps_become_the_number_that_was_meant(tree) -> None:
    tree.write(
        "tasks/ja/params/tiny.yaml",
        """
        model: {num_layers: 4, hidden_size: 64, ffn_hidden_size: 128, num_attention_heads: 8, vocab_size: 1_000}
        training: {seq_length: 64, micro_batch_size: 2, global_batch_size: 16, deterministic: no}
        optimizer: {lr: 3e-4, adam_eps: 1e-8}
        schedule: {lr_decay_style: WSD, lr_warmup: 2, lr_cooldown: 0.2}
        """,
    )
    config = tree.load("launch.walltime=1-00:00:00").config
    assert config.optimizer.lr == 3e-4 and config.optimizer.adam_eps == 1e-8
    assert config.training.deterministic is False and config.model.vocab_size == 1000
    assert config.schedule.lr_warmup == Duration(2, "iterations")
    assert config.schedule.lr_cooldown == Duration(0.2, "fraction")
    assert config.launch.walltime == 86400


def test_the_params_file_of_the_task_wins_over_the_common_one(tree) -> None:
    common = tree.root / "params/tiny.yaml"
    tree.write("tasks/ja/params/tiny.yaml", common.read_text().replace("num_layers: 4", "num_layers: 2"))
    assert tree.load().config.model.num_layers == 2


def test_params_and_site_may_be_paths(tree) -> None:
    tree.write("elsewhere/mine.yaml", (tree.root / "params/tiny.yaml").read_text())
    site = tree.write("elsewhere/site.yaml", "launch: {gpus_per_node: 4}")
    loaded = load_config(Path("tasks/ja"), "elsewhere/mine.yaml", "1M", site=site)
    assert loaded.config.params == "mine" and loaded.config.launch.gpus_per_node == 4


def test_a_task_is_found_by_its_name_and_in_the_checkout(tree, tmp_path, monkeypatch) -> None:
    assert load_config(Path("ja"), "tiny", "1M").config.task == "ja"
    (tmp_path / "somewhere").mkdir()
    monkeypatch.chdir(tmp_path / "somewhere")
    monkeypatch.setattr(sources, "CHECKOUT", tmp_path)
    loaded = load_config(Path("tasks/ja"), "tiny", "1M")
    assert loaded.origins["model.num_layers"] == "params/tiny.yaml"


def test_a_length_in_a_later_layer_replaces_any_earlier_length(tree) -> None:
    loaded = tree.load("training.train_iters=7")
    assert (loaded.config.training.train_iters, loaded.config.training.train_tokens) == (7, None)
    assert loaded.origins["training.train_tokens"] == "default"


def test_two_lengths_in_one_layer_are_refused(tree, refused: Refused) -> None:
    text = (tree.root / "tasks/ja/task.yaml").read_text()
    tree.write("tasks/ja/task.yaml", text.replace("train_tokens: 1M", "train_tokens: 1M, train_iters: 3"))
    message = refused()
    assert "tasks/ja/task.yaml (sizes.1M): training.train_tokens and training.train_iters: 2 lengths" in message


def test_null_resets_a_setting_to_its_default(tree) -> None:
    loaded = tree.load("model.num_query_groups=null", "optimizer.lr=null")
    assert loaded.config.model.num_query_groups is None and loaded.config.optimizer.lr == 3e-4
    assert loaded.origins["optimizer.lr"] == "default"


def test_a_required_setting_reset_by_null_is_missing(refused: Refused) -> None:
    assert "model: no num_layers. They have no default." in refused("model.num_layers=null")


def test_a_mix_is_replaced_whole_and_corpora_are_merged_by_name(tree) -> None:
    loaded = tree.load(variant="replay")
    assert loaded.config.data.mix == {"D1": 1.0} and set(loaded.config.data.corpora) == {"D0", "D1"}
    tree.write(
        "site.yaml",
        """
        data:
          corpora:
            D1: {tokens: [elsewhere/d1]}
            D2: {tokens: [d2]}
        """,
    )
    corpora = tree.load(site="./site.yaml").config.data.corpora
    assert corpora["D1"] == CorpusConfig(tokens=("elsewhere/d1",), validation=("v1",))
    assert list(corpora) == ["D0", "D1", "D2"]


def test_single_shares_change_on_the_command_line(tree) -> None:
    assert tree.load("data.mix.D0=0.5", "data.mix.D1=.5").config.data.mix == {"D0": 0.5, "D1": 0.5}
    assert tree.load("data.mix={D0: 1}").config.data.mix == {"D0": 1.0}


def test_the_last_of_two_equal_overrides_wins(tree) -> None:
    assert tree.load("optimizer.lr=1", "optimizer.lr=2e-4").config.optimizer.lr == 2e-4


def test_text_settings_are_taken_from_the_command_line_as_they_stand(tree) -> None:
    assert tree.load("init.from_path=variant:base@10").config.init.from_path == "variant:base@10"
    assert tree.load("data.tokenizer=100").config.data.tokenizer == "100"
    assert tree.load("data.tokenizer=null").config.data.tokenizer is None


def test_all_mistakes_come_at_once_each_with_file_and_key(tree, refused: Refused) -> None:
    tree.write(
        "tasks/ja/task.yaml",
        """
        data: {mix: {D9: 1.0}, corpora: {D0: {token: [x]}}}
        traning: {seed: 1}
        seq_length: 5
        task: other
        sizes: {1M: {training: {train_tokens: 1M, micro_batch_sze: 2, precision: fp16, deterministic: 1}}}
        """,
    )
    message = refused("optimizer.lr=fast", "nonsense", "training.seed=-1")
    expected = [
        "tasks/ja/task.yaml: data.corpora: D0: token is not a setting of a corpus. Did you mean tokens?",
        "tasks/ja/task.yaml: traning: no such section. Did you mean training?",
        "tasks/ja/task.yaml: seq_length: a setting outside its section. Write it below training:.",
        "tasks/ja/task.yaml: task: is given on the command line (--task), not in a file.",
        "tasks/ja/task.yaml (sizes.1M): training.micro_batch_sze: no such setting. Did you mean micro_batch_size?",
        "tasks/ja/task.yaml (sizes.1M): training.precision: 'fp16' is not one of bf16, fp32. Did you mean",
        "tasks/ja/task.yaml (sizes.1M): training.deterministic: 1 is not a truth value.",
        "command line: optimizer.lr: 'fast' is not a number.",
        "command line: 'nonsense'. Write section.key=value",
        "command line: training.seed: -1 is not a whole number of at least 0.",
    ]
    for line in expected:
        assert line in message
    assert message.startswith(f"{len(expected)} mistakes\n")


def test_a_value_that_cannot_be_read_causes_no_second_complaint(refused: Refused) -> None:
    message = refused("training.global_batch_size=many")
    assert message == (
        "command line: training.global_batch_size: 'many' is not a whole number of at least 0. "
        "Write 500, 1.5M, 50B or 1e9."
    )


def test_unknown_sizes_and_variants_name_the_known_ones_and_cause_no_second_complaint(tree, refused: Refused) -> None:
    assert refused(size="2M") == "tasks/ja/task.yaml: sizes has no '2M'. Known: 1M, short."
    text = (tree.root / "tasks/ja/task.yaml").read_text()
    mix = "  mix: {D0: 0.25, D1: 0.75}\n"
    assert mix in text
    tree.write("tasks/ja/task.yaml", text.replace(mix, ""))
    assert refused(variant="none") == "tasks/ja/task.yaml: variants has no 'none'. Known: main, replay."


def test_a_task_without_variants_has_the_variant_main_only(tree, refused: Refused) -> None:
    text = (tree.root / "tasks/ja/task.yaml").read_text()
    tree.write("tasks/ja/task.yaml", text[: text.index("variants:")])
    assert tree.load().config.variant == "main"
    assert "variants has no 'other'. Add it below variants:." in refused(variant="other")


@pytest.mark.parametrize(
    ("task", "params", "site", "message"),
    [
        ("tasks/en", "tiny", None, "tasks/en: no such task folder. Known in tasks/: ja."),
        ("params", "tiny", None, "params: has no task.yaml."),
        ("tasks/ja", "huge", None, "huge: no such params. Known: tiny."),
        ("tasks/ja", "other/huge.yaml", None, "other/huge.yaml: no such params file."),
        ("tasks/ja", "tiny", "moon", "moon: no such site. Known: abci."),
    ],
)
def test_missing_files_name_what_there_is(tree, task, params, site, message) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(Path(task), params, "1M", site=site)
    assert message in str(error.value)


def test_a_site_name_that_both_schedulers_have_is_refused(tree, refused: Refused) -> None:
    tree.write("slurm/sites/abci.yaml", "launch: {scheduler: slurm}")
    assert "both pbs/sites and slurm/sites have it" in refused(site="abci")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("training:\n  seed: 1\n  seed: 2\n", "line 3: seed is stated twice, first in line 2. Keep one of them."),
        ("training: {seed: 1\nmodel:", "not valid YAML"),
        ("- a\n- b\n", "holds a list. A mapping of sections is needed."),
        ("training: 5\n", "training: 5 is no section."),
        ("? [a, b]\n: 1\n", "A key must be a plain name."),
    ],
)
def test_malformed_files_are_named_with_the_line(tree, refused: Refused, text: str, message: str) -> None:
    tree.write("tasks/ja/task.yaml", text)
    found = refused()
    assert "tasks/ja/task.yaml: " in found and message in found


def test_a_file_that_is_not_utf8_is_named(tree, refused: Refused) -> None:
    (tree.root / "params/tiny.yaml").write_bytes(b"description: \xff\n")
    assert refused() == "params/tiny.yaml: byte 13 is not UTF-8. Save the file as UTF-8."


def test_the_resolved_configuration_reads_back_equal(tree) -> None:
    loaded = tree.load(
        "schedule.lr_decay_style=WSD",
        "schedule.lr_warmup=123456789 samples",
        "schedule.lr_cooldown=0.1234567",
        "training.train_tokens=1T",
        "optimizer.lr=0.1",
        "optimizer.min_lr=1e-17",
        "init.from_path=a: b # c",
        "data.tokenizer=no",
        "model.window_size=32",
        variant="replay",
        site="abci",
    )
    path = tree.root / "run/config.yaml"
    write_resolved(loaded, path)
    assert read_resolved(path) == loaded.config
    assert "  lr: 0.1  # command line\n" in path.read_text()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50, deadline=None)
@given(text=st.text(min_size=1).filter(str.strip), rate=st.floats(1e-30, 1e30))
def test_any_text_and_any_number_read_back_equal(tree, text: str, rate: float) -> None:
    loaded = tree.load()
    config = replace(
        loaded.config,
        data=replace(loaded.config.data, tokenizer=text),
        optimizer=replace(loaded.config.optimizer, lr=rate),
    )
    path = tree.root / "config.yaml"
    write_resolved(replace(loaded, config=config), path)
    assert read_resolved(path) == config


def test_the_resolved_text_names_every_setting_and_its_origin(tree) -> None:
    lines = resolved_text(tree.load()).splitlines()
    assert "  num_layers: 4  # params/tiny.yaml" in lines
    assert "  adam_beta2: 0.95  # default" in lines
    assert sum(line.startswith("  ") for line in lines) == len(setting_keys()) - 4


def test_a_file_that_is_no_resolved_configuration_is_refused(tree) -> None:
    path = tree.write("config.yaml", "model: {num_layers: 4}")
    with pytest.raises(ConfigError, match="no task, params, size, variant"):
        read_resolved(path)


def test_the_arguments_of_a_run_load_it(tree) -> None:
    parser = argparse.ArgumentParser()
    add_run_arguments(parser)
    words = "--task tasks/ja --params tiny --size short --variant replay --site abci optimizer.lr=1e-5".split()
    config = load_from_arguments(parser.parse_args(words)).config
    assert (config.training.train_iters, config.launch.scheduler, config.optimizer.lr) == (10, "pbs", 1e-5)


def test_a_label_behind_a_variant_names_a_run_of_its_own_with_the_variants_settings(tree) -> None:
    parser = argparse.ArgumentParser()
    add_run_arguments(parser)
    words = "--task tasks/ja --params tiny --size short --variant replay+lr-2 optimizer.lr=1e-5".split()
    labelled = load_from_arguments(parser.parse_args(words)).config
    words[7] = "replay"
    assert labelled.variant == "replay+lr-2"
    assert replace(labelled, variant="replay") == load_from_arguments(parser.parse_args(words)).config
    words[7] = "replay+../x"
    with pytest.raises(ConfigError, match=r"--variant replay\+../x: '../x' is no label"):
        load_from_arguments(parser.parse_args(words))
