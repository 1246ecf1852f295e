"""The ladder of the CPT cookbook: changes for a stage that does not recover, gentle changes first.

1. more replay of the old data (5 % -> 10 % -> 25 %);
2. re-warm to another peak (LR_max / 2 where old data is forgotten, 2 LR_max where nothing is learned);
3. fork earlier: from a checkpoint before the cooldown;
4. the buffer mix: old / new / buffer 0.05 / 0.48 / 0.47, then 0 / 0.1 / 0.9;
5. decay first: the old mix from LR_max down to LR_max / 5, then the new mix from there down to LR_max / 100.

The current rungs of a stage follow from its configuration and its parent's metrics; no other state is kept.

Source: AuroraGPT's CPT cookbook for the order; 2403.08763 for replay and re-warming; 2407.07263 for rung 5.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from megatron_cpt.config.settings.schema import RunConfig
from megatron_cpt.run.variants import labelled, mix_text, scaled_mix

REPLAY_SHARES = (0.05, 0.10, 0.25)
"""From the usual share to the most worth trying; 1 % is for a shift so weak that nobody asks for advice."""
BUFFER_MIXES = ((0.05, 0.48, 0.47), (0.0, 0.1, 0.9))
"""Shares of old data, new data and buffer."""
HELD = 0.9
"""A learning rate of at least this part of the peak counts as held: the cooldown has not begun."""
DECAY_FRACTION = 0.2
"""Length of rung 5's decay on the old mix, as a part of the stage before."""

Settings = Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Position:
    """State of a stage: its settings, its parent, and its recovery."""

    config: RunConfig
    old: tuple[str, ...]
    """Corpora that must not be forgotten, without the buffer."""
    parent: RunConfig | None
    """Settings of the stage before; None where it is not a run of ours."""
    lr_max: float
    """Peak learning rate of the stage before."""
    lr_at_fork: float
    """Its learning rate at the checkpoint that this stage started from."""
    fork_iteration: int | None
    """Its last checkpoint on disk before its cooldown."""
    parent_tokens: int
    has_buffer: bool
    """Whether data.buffer exists and holds something."""
    is_learning: bool = True

    @property
    def replay(self) -> float:
        """Share of old data in the mix."""
        return math.fsum(self.config.data.mix.get(name, 0.0) for name in self.old)

    @property
    def buffer(self) -> float:
        """Share of the buffer in the mix."""
        return self.config.data.mix.get("buffer", 0.0)

    @property
    def has_decayed_first(self) -> bool:
        """Whether this stage began at a fraction of the peak, as rung 5 has it."""
        return self.config.optimizer.lr <= self.lr_max / 4


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One run to start: which variant of the task, in which run directory, with which settings."""

    variant: str
    settings: Settings
    is_of_parent: bool = False
    """Whether it is a trial of the stage before, whose own settings it then keeps."""


@dataclass(frozen=True, kw_only=True)
class Rung:
    """One step of the ladder, for this stage."""

    name: str
    why: str
    """The stage's position on the rung, with numbers."""
    trials: tuple[Trial, ...] = field(default=())
    """Runs to start one after the other; none where the rung was tried or is not possible."""


def ladder(at: Position) -> list[Rung]:
    """Return the rungs in order; the first one with trials is next."""
    rungs = [_replay(at), _rewarm(at), _fork_earlier(at), _buffer(at), _decay_first(at)]
    return rungs if at.is_learning else [rungs[1]]


def next_rung(rungs: list[Rung]) -> Rung | None:
    """Return the first rung that has something to try; None at the ladder's end."""
    return next((rung for rung in rungs if rung.trials), None)


def _replay(at: Position) -> Rung:
    name = "more replay"
    if not at.config.data.mix or not at.old:
        return Rung(name=name, why="the stage reads a list, not a mix: state data.mix, or rescale the list")
    share = next((step for step in REPLAY_SHARES if step > at.replay + 1e-9), None)
    found = f"old data ({', '.join(at.old)}) is {at.replay:.3g} of the mix"
    if share is None or share > 1 - at.buffer:
        return Rung(name=name, why=f"{found}, {REPLAY_SHARES[-1]} is the most worth trying")
    mix = scaled_mix(at.config.data.mix, {"old": share, "new": 1 - share - at.buffer, "buffer": at.buffer}, at.old)
    trial = Trial(variant=labelled(at.config.variant, f"replay-{share:g}"), settings={"data.mix": mix_text(mix)})
    return Rung(name=name, why=f"{found}; next {share:g}", trials=(trial,))


def _rewarm(at: Position) -> Rung:
    name, lr = "re-warm to another peak", at.config.optimizer.lr
    factor = 0.5 if at.is_learning else 2.0
    found = f"the peak is {lr:.3g}, {lr / at.lr_max:.2g} of the {at.lr_max:.3g} of the stage before"
    if abs(lr / at.lr_max - 1) > 0.05:
        return Rung(name=name, why=f"{found}: tried")
    settings = {"optimizer.lr": f"{lr * factor:.6g}", **_bounded(at.config, lr * factor)}
    if not at.config.schedule.lr_warmup.amount:
        settings["schedule.lr_warmup"] = "0.01"
    trial = Trial(variant=labelled(at.config.variant, f"peak-{factor:g}"), settings=settings)
    return Rung(name=name, why=f"{found}; next {factor:g} of it", trials=(trial,))


def _bounded(config: RunConfig, lr: float) -> dict[str, str]:
    """Return the overrides that a lower peak requires: the rates that must not exceed it."""
    settings = {}
    if config.optimizer.min_lr > lr:
        settings["optimizer.min_lr"] = f"{lr:.6g}"
    if config.schedule.lr_hold is not None and config.schedule.lr_hold > lr:
        settings["schedule.lr_hold"] = f"{lr:.6g}"
    return settings


def _fork_earlier(at: Position) -> Rung:
    name = "fork earlier"
    if at.parent is None:
        return Rung(name=name, why="the stage before is not a run of this task: its checkpoints are not known")
    found = f"the stage before stood at {at.lr_at_fork:.3g} of {at.lr_max:.3g} when this one was forked"
    if at.has_decayed_first:
        return Rung(name=name, why=f"{found}, as decaying first wants it")
    if at.lr_at_fork >= HELD * at.lr_max:
        return Rung(name=name, why=f"{found}: before its cooldown already")
    if at.fork_iteration is None:
        return Rung(name=name, why=f"{found}, and no checkpoint from before its cooldown is left")
    source = f"variant:{at.parent.variant}@{at.fork_iteration}"
    trial = Trial(
        variant=labelled(at.config.variant, f"fork-{at.fork_iteration}"),
        settings={"init.from_path": source, "init.load": "full"},
    )
    return Rung(name=name, why=f"{found}; iteration {at.fork_iteration} is before its cooldown", trials=(trial,))


def _buffer(at: Position) -> Rung:
    name = "buffer mix"
    if not at.config.data.mix or at.config.data.buffer is None:
        return Rung(name=name, why="the task has no data.buffer: name one, so that finished stages fill it")
    if not at.has_buffer:
        return Rung(name=name, why=f"{at.config.data.buffer} holds nothing yet: a stage fills it when it finishes")
    step = next((parts for parts in BUFFER_MIXES if parts[2] > at.buffer + 1e-9), None)
    found = f"the buffer is {at.buffer:.3g} of the mix"
    if step is None:
        return Rung(name=name, why=f"{found}: both mixes were tried")
    parts = dict(zip(("old", "new", "buffer"), step, strict=True))
    mix = scaled_mix(at.config.data.mix, parts, at.old)
    trial = Trial(variant=labelled(at.config.variant, f"buffer-{step[2]:g}"), settings={"data.mix": mix_text(mix)})
    shares = " / ".join(f"{share:g}" for share in step)
    return Rung(name=name, why=f"{found}; next old / new / buffer {shares}", trials=(trial,))


def _decay_first(at: Position) -> Rung:
    name = "decay first"
    if at.parent is None:
        return Rung(name=name, why="the stage before is not a run of this task: its data cannot be continued")
    if at.has_decayed_first:
        return Rung(name=name, why=f"the peak is {at.config.optimizer.lr:.3g}, at most a quarter of LR_max: tried")
    before = at.parent.variant
    iteration = f"@{at.fork_iteration}" if at.fork_iteration is not None and at.lr_at_fork < HELD * at.lr_max else ""
    shape = {"schedule.lr_decay_style": "cosine", "schedule.lr_warmup": "0", "schedule.lr_cooldown": "0"}
    for key in ("lr_hold", "lr_hold_start"):
        if getattr(at.parent.schedule, key) is not None or getattr(at.config.schedule, key) is not None:
            shape[f"schedule.{key}"] = "null"
    for config in (at.parent, at.config):
        if config.schedule.lr_warmup_init:
            shape["schedule.lr_warmup_init"] = "0"
    decayed = labelled(before, "decay")
    first = Trial(
        variant=decayed,
        settings={
            "init.from_path": f"variant:{before}{iteration}",
            "init.load": "full",
            "training.train_tokens": str(max(int(at.parent_tokens * DECAY_FRACTION), 1)),
            "optimizer.lr": f"{at.lr_max:.6g}",
            "optimizer.min_lr": f"{at.lr_max / 5:.6g}",
            **shape,
        },
        is_of_parent=True,
    )
    settings = {
        "init.from_path": f"variant:{decayed}",
        "init.load": "full",
        "optimizer.lr": f"{at.lr_max / 5:.6g}",
        "optimizer.min_lr": f"{at.lr_max / 100:.6g}",
        **shape,
    }
    if at.config.data.mix and at.replay == 0 and at.old:  # the new data never comes alone
        settings["data.mix"] = mix_text(scaled_mix(at.config.data.mix, {"old": 0.05, "new": 0.95}, at.old))
    second = Trial(variant=labelled(at.config.variant, "after-decay"), settings=settings)
    why = f"the old mix from {at.lr_max:.3g} to {at.lr_max / 5:.3g}, then the new one to {at.lr_max / 100:.3g}"
    return Rung(name=name, why=why, trials=(first, second))
