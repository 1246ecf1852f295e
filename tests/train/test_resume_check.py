"""A resume compares its settings with the checkpoint's: what an older version did not know acted as its default."""

import dataclasses
import json

import pytest

from megatron_cpt.config.settings.schema import CorpusConfig
from megatron_cpt.config.settings.values import Duration, parse_ramp
from megatron_cpt.errors import ConfigError
from megatron_cpt.train.state.resume_check import check_unchanged
from tests.train.tiny import tiny_config


def stored(*missing):
    """Return the settings as a checkpoint's manifest holds them, without some that came later."""
    settings = json.loads(json.dumps(dataclasses.asdict(tiny_config())))
    for key in missing:
        section, name = key.split(".")
        del settings[section][name]
    return settings


def with_training(**changes):
    config = tiny_config()
    return dataclasses.replace(config, training=dataclasses.replace(config.training, **changes))


def test_a_run_of_an_older_version_goes_on(tmp_path):
    old = stored("training.neftune_alpha", "data.fim_rate", "schedule.lr_warmup", "model.kv_channels")
    assert check_unchanged(old, tiny_config(), tmp_path) == []


def test_a_setting_that_came_later_and_is_set_now_is_a_change(tmp_path):
    with pytest.raises(ConfigError, match=r"training\.neftune_alpha: 0\.0 -> 5\.0"):
        check_unchanged(stored("training.neftune_alpha"), with_training(neftune_alpha=5.0), tmp_path)


def test_each_setting_that_changes_results_needs_its_own_consent(tmp_path):
    """A resume with two changes and consent to one names the other, and how to consent."""
    old, new = stored(), with_training(train_iters=99, seed=7)

    def consenting(*keys):
        return dataclasses.replace(new, checkpoint=dataclasses.replace(new.checkpoint, accept_changes=keys))

    with pytest.raises(ConfigError) as error:
        check_unchanged(old, consenting("training.seed"), tmp_path)
    assert "training.train_iters: " in str(error.value) and "training.seed: " not in str(error.value)
    assert "checkpoint.accept_changes=[training.train_iters]" in str(error.value)
    for keys in (("training.seed", "training.train_iters"), ("training",), ("all",)):
        changes = check_unchanged(old, consenting(*keys), tmp_path)
        assert {line.split(":")[0] for line in changes} >= {"training.seed", "training.train_iters"}
    with pytest.raises(ConfigError, match="training.seed"):  # the name of another setting's beginning is not enough
        check_unchanged(old, consenting("training.see", "training.train_iters"), tmp_path)


def test_durations_and_ramps_are_compared_and_shown_as_written(tmp_path):
    config = tiny_config()
    ramp = parse_ramp([[2, "4 iterations"], [4, "1M tokens"]])
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, rampup_batch_size=ramp))
    old = json.loads(json.dumps(dataclasses.asdict(config)))
    assert check_unchanged(old, config, tmp_path) == []
    longer = dataclasses.replace(
        config, schedule=dataclasses.replace(config.schedule, lr_warmup=Duration(0.5, "fraction"))
    )
    with pytest.raises(ConfigError, match=r"schedule\.lr_warmup: 0 iterations -> 0\.5\."):
        check_unchanged(old, longer, tmp_path)


def test_held_out_shards_may_be_added_to_a_run(tmp_path):
    config = tiny_config()
    old = stored()
    old["data"]["corpora"] = {"D0": {"documents": [], "tokens": ["a"], "validation": [], "validation_documents": []}}
    corpora = {"D0": CorpusConfig(tokens=("a",), validation=("v",))}
    now = dataclasses.replace(config, data=dataclasses.replace(config.data, corpora=corpora))
    assert any("data.corpora.D0.validation" in line for line in check_unchanged(old, now, tmp_path))
    corpora = {"D0": CorpusConfig(tokens=("b",))}
    now = dataclasses.replace(config, data=dataclasses.replace(config.data, corpora=corpora))
    with pytest.raises(ConfigError, match=r"data\.corpora\.D0\.tokens"):
        check_unchanged(old, now, tmp_path)
