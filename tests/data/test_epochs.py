"""A length in epochs becomes iterations of the corpus with the largest share."""

import dataclasses
import re

import pytest

from megatron_cpt.config.loading.resolve import LoadedConfig
from megatron_cpt.config.settings.derived import train_iters
from megatron_cpt.config.settings.values import Duration
from megatron_cpt.data.blend.epochs import with_iterations
from megatron_cpt.data.blend.plan import plan_blend
from megatron_cpt.errors import ConfigError, DataError
from tests.data.test_blend import run_config, write_shard


def loaded(tmp_path, epochs, mix, seq_length=64, batch=4, **shards):
    for name, lengths in shards.items():
        write_shard(tmp_path / name, lengths)
    config = run_config(tmp_path, mix=mix, corpora={name: [name] for name in mix}, train_tokens=None)
    training = dataclasses.replace(config.training, train_epochs=epochs, global_batch_size=batch)
    model = dataclasses.replace(config.model, max_position_embeddings=seq_length)
    config = dataclasses.replace(config, training=training, model=model)
    return LoadedConfig(config, {"training.train_epochs": "tasks/t/task.yaml"})


def test_epochs_of_a_single_corpus_are_its_samples_in_whole_batches(tmp_path):
    result = with_iterations(loaded(tmp_path, 3.0, {"chat": 1.0}, chat=[64] * 50))
    assert result.config.training.train_iters == 37  # 150 samples, batches of 4
    assert result.config.training.train_epochs is None
    assert result.origins["training.train_iters"] == (
        "3 epochs of chat, 3,200 tokens (1 of the mix), from tasks/t/task.yaml"
    )
    plan = plan_blend(result.config)
    assert plan.corpora[0].epochs <= 3


def test_the_largest_share_is_counted_and_the_others_come_besides(tmp_path):
    result = with_iterations(loaded(tmp_path, 2.0, {"D0": 0.2, "chat": 0.8}, chat=[64] * 80, D0=[640] * 10))
    assert result.config.training.train_iters == 50  # 160 samples of chat and 40 of D0
    plan = {row.corpus: row for row in plan_blend(result.config).corpora}
    assert plan["chat"].epochs == 2 and plan["D0"].num_samples == 40


def test_a_part_of_an_epoch_and_the_most_that_max_epochs_allows(tmp_path):
    assert with_iterations(loaded(tmp_path, 0.1, {"chat": 1.0}, chat=[64] * 50)).config.training.train_iters == 1
    four = with_iterations(loaded(tmp_path, 4.0, {"chat": 1.0}, chat=[64] * 51)).config
    assert train_iters(four.training) == 51 and plan_blend(four)
    five = with_iterations(loaded(tmp_path, 5.0, {"chat": 1.0})).config
    with pytest.raises(DataError, match="data.max_epochs is 4"):
        plan_blend(five)


@pytest.mark.parametrize(
    ("epochs", "mix", "message"),
    [
        (0.01, {"chat": 1.0}, "are 0 samples, not one batch of 4"),
        (1.0, {"chat": 0.5, "D0": 0.5}, "chat and D0 have the same share"),
        (1.0, {"chat": 0.9, "none": 0.1}, "the token files cannot be counted:\n  - corpus none"),
    ],
)
def test_epochs_that_cannot_be_counted_are_refused(tmp_path, epochs, mix, message):
    case = loaded(tmp_path, epochs, mix, chat=[64] * 50, D0=[64] * 50)
    with pytest.raises(DataError, match=re.escape(message)):
        with_iterations(case)


def test_a_length_in_epochs_is_held_against_the_schedule(tmp_path):
    case = loaded(tmp_path, 1.0, {"chat": 1.0}, chat=[64] * 50)
    schedule = dataclasses.replace(case.config.schedule, lr_warmup=Duration(13, "iterations"))
    with pytest.raises(ConfigError, match=r"longer than the\s+stage"):
        with_iterations(LoadedConfig(dataclasses.replace(case.config, schedule=schedule), case.origins))


def test_uncounted_epochs_have_no_iterations(tmp_path):
    with pytest.raises(ConfigError, match="the token files have not been counted"):
        train_iters(loaded(tmp_path, 1.0, {"chat": 1.0}).config.training)


def by_rules(tmp_path, epochs, rules, **shards):
    case = loaded(tmp_path, epochs, dict.fromkeys(shards, 1.0), **shards)
    data = dataclasses.replace(case.config.data, mix={}, rules=rules, max_epochs=100.0)
    return LoadedConfig(dataclasses.replace(case.config, data=data), case.origins)


@pytest.mark.parametrize(
    ("rules", "iterations", "corpus"),
    [
        ({"chat": "share 0.8", "D0": "share 0.2"}, 50, "chat"),  # as data.mix gives it
        ({"chat": "weight 4", "D0": "weight 1"}, 50, "chat"),
        ({"D0": "epochs 0.25", "chat": "weight 1"}, 46, "chat"),  # 160 samples of chat and 25 of D0, whole batches of 4
        ({"chat": "epochs 2", "D0": "weight 1"}, 90, "D0"),  # the longer the stage, the more of it is D0
    ],
)
def test_rules_give_the_longest_stage_with_the_largest_corpus_read_so_often(tmp_path, rules, iterations, corpus):
    result = with_iterations(by_rules(tmp_path, 2.0, rules, chat=[64] * 80, D0=[640] * 10))
    assert result.config.training.train_iters == iterations
    assert result.origins["training.train_iters"].startswith(f"2 epochs of {corpus}, ")
    plan = {row.corpus: row for row in plan_blend(result.config).corpora}
    assert plan[corpus].epochs <= 2 and plan[corpus].share == max(row.share for row in plan.values())
    longer = dataclasses.replace(result.config.training, train_iters=iterations + 1)
    after = {row.corpus: row for row in plan_blend(dataclasses.replace(result.config, training=longer)).corpora}
    assert after[corpus].epochs > 2


def test_rules_that_fit_no_length_are_refused_with_their_reason(tmp_path):
    case = by_rules(tmp_path, 1.0, {"*": "epochs 3"}, chat=[64] * 81)
    with pytest.raises(DataError, match="no length fits data.rules.*must make up 1"):
        with_iterations(case)
    case = by_rules(tmp_path, 0.01, {"*": "weight 1"}, chat=[64] * 81)
    with pytest.raises(DataError, match="chat would be read more often in 1 iterations"):
        with_iterations(case)
