"""Whether a learning-rate range test (`lr-find`) can run as asked; on the login node, before it is queued."""

from megatron_cpt.config.settings.derived import train_iters
from megatron_cpt.config.settings.schema import TrainingConfig
from megatron_cpt.errors import ConfigError

FEWEST = 10
"""Steps below which no curve can be read."""


def check_range_test(training: TrainingConfig, lr_min: float, lr_max: float, iterations: int) -> None:
    """Raise ConfigError unless the rates rise, and the stage has as many iterations as are asked for."""
    if not 0 < lr_min < lr_max < float("inf") or iterations < FEWEST:
        raise ConfigError(
            f"lr-find: {lr_min:g} to {lr_max:g} in {iterations} iterations. 0 < --lr-min < --lr-max and at least {FEWEST} are needed."
        )
    if iterations > train_iters(training):
        raise ConfigError(
            f"lr-find: --iterations {iterations}, and the stage has {train_iters(training)}. Use fewer, or a longer stage."
        )
