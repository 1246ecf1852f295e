"""A resume compares its settings with the checkpoint's: what an older version did not know acted as its default."""

import dataclasses
import json

import pytest

from megatron_cpt.errors import ConfigError
from megatron_cpt.train.resume_check import check_unchanged
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
