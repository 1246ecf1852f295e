"""`launch.device`: no rank trains on another device than the site says."""

import dataclasses

import pytest

from megatron_cpt.config.settings.schema import LaunchConfig
from megatron_cpt.errors import ConfigError
from megatron_cpt.train.backend import cpu
from megatron_cpt.train.backend.parallel import check_device
from tests.train.tiny import tiny_config


@pytest.mark.parametrize(
    ("wanted", "is_cpu", "message"),
    [
        (None, True, None),
        (None, False, None),
        ("cpu", True, None),
        ("cuda", False, None),
        ("cuda", True, "launch.device is cuda, and torch .* finds cpu on .*nvidia-smi"),
        ("cpu", False, "launch.device is cpu, and torch .* finds cuda on "),
        ("xpu", True, "launch.device is xpu, and training does not drive Intel GPUs; on .* it would run on cpu"),
        ("xpu", False, "launch.device is xpu"),
    ],
)
def test_training_refuses_another_device_than_the_sites(monkeypatch, wanted, is_cpu, message):
    monkeypatch.setattr(cpu, "is_cpu", lambda: is_cpu)
    config = dataclasses.replace(tiny_config(), launch=LaunchConfig(device=wanted))
    if message is None:
        check_device(config.launch)
        return
    with pytest.raises(ConfigError, match=message):
        check_device(config.launch)
