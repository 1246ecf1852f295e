"""Learning rate and weight decay as pure functions of the samples consumed in a stage.

The scheduler is ours because megatron-core's keeps its bounds in the optimizer's param groups, where a resume with
another learning rate raises or silently keeps the old one. Warm-up and decay shapes are Megatron-LM's
(`megatron/core/optimizer_param_scheduler.py`, 0.19); the infinite forms (cool to a constant, hold, anneal) are those
of arXiv:2403.08763, section 7, whose last phase is the cooldown style `geometric`; re-warming is a stage with a warm-up of
its own. Weight decay follows the same file's `get_wd`.

The place of an iteration is the samples consumed before it, so that the first iteration of a stage without a warm-up
has the peak and the last one is one step before the end of its decay.
"""

import math
from dataclasses import dataclass

from megatron_cpt.config.settings.derived import duration_samples, train_samples
from megatron_cpt.config.settings.schema import RunConfig

# Shape of the anneal over its progress r in [0, 1]: 1 at its start, 0 at its end.
ANNEAL = {
    "linear": lambda r: 1 - r,
    "cosine": lambda r: 0.5 * (math.cos(math.pi * r) + 1),
    "exponential": lambda r: 2 * 0.5**r - 1,
    "minus_sqrt": lambda r: 1 - math.sqrt(r),
}
STEEPNESS = 10.0
"""Steepness of the infinite inverse square root's first decay (alpha in arXiv:2403.08763)."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A stage's learning-rate curve; lengths in samples."""

    style: str
    lr: float
    min_lr: float
    warmup_init: float
    warmup: int
    cooldown: int
    cooldown_style: str
    total: int
    decay: int
    """End of the decay of cosine and linear, where they reach min_lr; other styles ignore it."""
    hold: float | None = None
    hold_start: int | None = None
    weight_decay_style: str = "constant"
    weight_decay_start: float = 0.0
    weight_decay_end: float = 0.0
    weight_decay_samples: int = 0
    """Samples over which weight decay runs to its end."""

    def weight_decay(self, samples: int) -> float:
        """Return the weight decay of the iteration that starts after `samples` samples of the stage."""
        if self.weight_decay_style == "constant":
            return self.weight_decay_end
        progress = min(samples / self.weight_decay_samples, 1.0) if self.weight_decay_samples else 1.0
        risen = 0.5 * (math.cos(math.pi * (1 - progress)) + 1) if self.weight_decay_style == "cosine" else progress
        return self.weight_decay_start + (self.weight_decay_end - self.weight_decay_start) * risen

    def learning_rate(self, samples: int) -> float:
        """Return the learning rate of the iteration that starts after `samples` samples of the stage."""
        if samples < self.warmup:
            return self.warmup_init + (self.lr - self.warmup_init) * samples / self.warmup
        cooldown_start = self.total - self.cooldown
        if self.cooldown and samples > cooldown_start:
            held = self._before_cooldown(cooldown_start)
            progress = min((samples - cooldown_start) / self.cooldown, 1.0)
            if self.cooldown_style == "geometric":
                return held * (self.min_lr / held) ** progress
            return self.min_lr + (held - self.min_lr) * ANNEAL[self.cooldown_style](progress)
        return self._before_cooldown(samples)

    def _before_cooldown(self, samples: int) -> float:
        if self.style in ("constant", "WSD"):
            return self.lr
        if self.style == "inverse-square-root":
            # Megatron-LM: lr * sqrt(warmup) / sqrt(samples), at least min_lr
            return max(self.min_lr, self.lr * math.sqrt(max(self.warmup, 1)) / math.sqrt(max(samples, 1)))
        if self.style.startswith("infinite"):
            return self._infinite(samples)
        length = max(self.decay - self.warmup, 1)
        progress = min((samples - self.warmup) / length, 1.0)
        shape = ANNEAL["cosine" if self.style == "cosine" else "linear"](progress)
        return self.min_lr + (self.lr - self.min_lr) * shape

    def _infinite(self, samples: int) -> float:
        assert self.hold is not None and self.hold_start is not None
        if self.hold_start <= self.warmup:
            return self.hold
        progress = min((samples - self.warmup) / (self.hold_start - self.warmup), 1.0)
        if self.style == "infinite-cosine":
            return self.hold + (self.lr - self.hold) * ANNEAL["cosine"](progress)
        drop = (1 / math.sqrt(1 + STEEPNESS * progress) - 1) / (1 / math.sqrt(1 + STEEPNESS) - 1)
        return self.lr + (self.hold - self.lr) * drop


def schedule(config: RunConfig) -> Schedule:
    """Return the learning-rate curve of a stage from its settings."""
    training, settings, optimizer = config.training, config.schedule, config.optimizer
    start, end = optimizer.weight_decay_start, optimizer.weight_decay_end
    total = train_samples(training)
    return Schedule(
        style=settings.lr_decay_style,
        lr=optimizer.lr,
        min_lr=optimizer.min_lr,
        warmup_init=settings.lr_warmup_init,
        warmup=duration_samples(settings.lr_warmup, training),
        cooldown=duration_samples(settings.lr_cooldown, training, is_at_end=True),
        cooldown_style=settings.lr_cooldown_style,
        total=total,
        decay=total if settings.lr_decay is None else duration_samples(settings.lr_decay, training),
        hold=settings.lr_hold,
        hold_start=duration_samples(settings.lr_hold_start, training) if settings.lr_hold_start else None,
        weight_decay_style=optimizer.weight_decay_incr_style,
        weight_decay_start=optimizer.weight_decay if start is None else start,
        weight_decay_end=optimizer.weight_decay if end is None else end,
        weight_decay_samples=duration_samples(optimizer.weight_decay_incr, training),
    )
