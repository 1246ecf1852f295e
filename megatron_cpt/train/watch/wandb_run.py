"""A run at Weights & Biases, where `logging.wandb_project` asks for one; only rank 0 imports the package.

A run keeps its id over restarts, so that its curves continue: it is a hash of the run directory's path. Curves are
drawn over `iteration`: W&B drops what is logged for a step of its own that has passed, as after a roll-back.
"""

import importlib.util
import os
from typing import Any

from megatron_cpt.config.settings.schema import LoggingConfig, RunConfig
from megatron_cpt.errors import ConfigError
from megatron_cpt.files import text_hash
from megatron_cpt.run.directory import RunDir


def check_wandb(logging: LoggingConfig) -> None:
    """Raise ConfigError when a run wants W&B and the package is not installed."""
    if logging.wandb_project is not None and importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            f"logging.wandb_project is {logging.wandb_project}, and the package wandb is not installed. "
            "Install the extra wandb (pip install -e '.[wandb]' in the checkout, or pip install wandb), or set "
            "logging.wandb_project=null."
        )


def start_wandb(run: RunDir, config: RunConfig) -> Any:
    """Return the W&B run of a run directory, new or continued; its files lie in the run directory."""
    import wandb  # an optional package, needed on one rank only

    started = wandb.init(
        project=config.logging.wandb_project,
        name=f"{config.task}/{config.params}/{config.size}/{config.variant}",
        id=text_hash(os.path.abspath(run.path))[:16],
        resume="allow",
        dir=os.fspath(run.path),
        mode=os.environ.get("WANDB_MODE") or config.logging.wandb_mode,
        config={"megatron_cpt": config_values(config)},
    )
    started.define_metric("iteration")
    started.define_metric("*", step_metric="iteration")
    return started


def config_values(config: RunConfig) -> dict[str, Any]:
    """Return the settings as plain values."""
    from megatron_cpt.config.settings.fields import plain

    return {name: plain(value) for name, value in vars(config).items()}
