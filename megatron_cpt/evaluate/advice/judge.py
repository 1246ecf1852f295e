"""The CPT cookbook's next step for a stage: read its metrics, judge them, choose the rung, print the commands."""

import dataclasses
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_cpt.config.loading.resolve import read_resolved
from megatron_cpt.config.settings.derived import duration_samples, train_tokens
from megatron_cpt.config.settings.schema import DataConfig, InitConfig, RunConfig
from megatron_cpt.errors import DataError
from megatron_cpt.evaluate.advice.ladder import HELD, Position, Rung, Trial, ladder, next_rung
from megatron_cpt.evaluate.advice.recovery import (
    TOLERANCE,
    Recovery,
    heldout_recovery,
    training_recovery,
)
from megatron_cpt.evaluate.report.stages import Stage, read_metrics, read_stage
from megatron_cpt.evaluate.report.steps import STEP_FIELDS
from megatron_cpt.log import format_count
from megatron_cpt.run.directory import RunDir
from megatron_cpt.run.names import command_line_settings, run_names
from megatron_cpt.run.variants import labelled

LEARNED = 0.005
"""Relative fall of a new corpus's held-out loss below which a stage counts as not learning."""


@dataclass(frozen=True, kw_only=True)
class Advice:
    """The judgement of a stage, with the next step."""

    summary: str
    """One line: healthy, recovering, not recovering, not learning, or too little data."""
    evidence: tuple[str, ...]
    rungs: tuple[Rung, ...] = ()
    chosen: Rung | None = None
    commands: tuple[tuple[str, ...], ...] = ()
    """Words after `megatron-cpt submit train`."""
    training: Recovery | None = None
    old: dict[str, Recovery] = dataclasses.field(default_factory=dict)
    learned: dict[str, float] = dataclasses.field(default_factory=dict)
    """New corpus -> relative change of its held-out loss since before the first step."""


def advise(
    run_path: Path, previous: Path | None = None, old: Sequence[str] = (), tolerance: float = TOLERANCE
) -> Advice:
    """Return what to do next with the stage in `run_path`.

    The stage before is `previous`, else the run that init.from_path names. `old` lists the corpora that must not be
    forgotten; default: those of the previous stage, else the first one of the task.

    Raises: DataError where there are no metrics, ConfigError where the configuration cannot be read.
    """
    stage, config = read_stage(run_path, STEP_FIELDS), read_resolved(RunDir(run_path).config_path)
    before = previous or _previous_run(run_path, config.init)
    parent = read_stage(before, STEP_FIELDS) if before is not None else None
    parent_config = read_resolved(RunDir(before).config_path) if before is not None else None
    if parent is not None:
        _cut_at_fork(parent, config.init)
    old_names = _old_corpora(config.data, parent_config, old)

    training = _judge_training(stage, parent, config, tolerance)
    heldout = {name: heldout_recovery(_heldout(stage, name), tolerance) for name in old_names if _heldout(stage, name)}
    new = [name for name in config.data.mix if name not in (*old_names, "buffer")]
    learned = {
        name: values[-1] / values[0] - 1
        for name in new
        if len(values := _heldout(stage, name)) >= 2 and stage.train  # the first was measured before any step
    }
    evidence = _evidence(stage, config, training, heldout, learned, tolerance)
    judged = [found.verdict for found in heldout.values() if found.verdict != "unknown"]
    if training.verdict == "unknown" and not judged:
        return Advice(
            summary=f"too little data to judge: {training.note}. Wait, or set evaluation.eval_interval.",
            evidence=evidence, training=training, old=heldout, learned=learned,
        )  # fmt: skip
    is_forgetting = any(verdict in ("stuck", "rising") for verdict in judged)
    is_learning = not learned or min(learned.values()) <= -LEARNED
    loss_is_bad = training.verdict in ("stuck", "rising")
    # new data may be harder than old: a loss above the old trend is no harm where the held-out sets say so
    is_bad = is_forgetting or (loss_is_bad and not (judged and learned and is_learning))
    facts: dict[str, Any] = {"evidence": evidence, "training": training, "old": heldout, "learned": learned}
    if not is_bad and is_learning:
        return _go_on(run_path, stage, config, training, judged, facts)
    position = _position(run_path, config, stage, before, parent, parent_config, old_names, is_learning or is_bad)
    rungs = ladder(position)
    chosen = next_rung(rungs)
    tried = [trial.variant for trial in (chosen.trials if chosen else ()) if _has_begun(run_path, trial)]
    facts["evidence"] = (*evidence, *(f"{name} has begun already: advise that run next" for name in tried))
    what = "not recovering" if is_bad else "not learning the new data"
    step = f"next: {chosen.name} ({chosen.why})" if chosen else "the ladder is at its end: reconsider data or length"
    return Advice(
        summary=f"{what}; {step}",
        rungs=tuple(rungs),
        chosen=chosen,
        commands=tuple(_command(run_path, before, trial) for trial in (chosen.trials if chosen else ())),
        **facts,
    )


def advice_text(advice: Advice) -> str:
    """Return the advice as a person reads it: the conclusion, its numbers, the ladder, the commands."""
    lines = [advice.summary, "", *(f"  {line}" for line in advice.evidence)]
    if advice.rungs:
        lines += ["", "The ladder:"]
        for number, rung in enumerate(advice.rungs, 1):
            mark = "->" if rung is advice.chosen else "  "
            lines.append(f"{mark} {number}. {rung.name}: {rung.why}")
    if advice.commands:
        lines += ["", "Next (show-config in place of submit train shows the settings):"]
        lines += [shlex.join(("megatron-cpt", "submit", "train", *command)) for command in advice.commands]
    return "\n".join(lines) + "\n"


def advice_json(advice: Advice) -> dict[str, Any]:
    """Return the advice for programs: every number behind it."""
    return {
        "format": 1,
        "summary": advice.summary,
        "training": _numbers(advice.training) if advice.training else None,
        "old": {name: _numbers(found) for name, found in advice.old.items()},
        "learned": advice.learned,
        "rungs": [{"name": rung.name, "why": rung.why} for rung in advice.rungs],
        "next": advice.chosen.name if advice.chosen else None,
        "commands": [list(command) for command in advice.commands],
    }


def _numbers(found: Recovery) -> dict[str, Any]:
    """Return a judgement's fields; unknown values are null, because JSON has no NaN."""
    return {key: None if isinstance(value, float) and value != value else value for key, value in vars(found).items()}


def _previous_run(run_path: Path, init: InitConfig) -> Path | None:
    """Return the run that the stage's weights came from; None where it was not trained here."""
    text = init.from_path
    if text is None:
        return None
    if text.startswith("variant:"):
        candidate = run_path.absolute().parent / text.removeprefix("variant:").partition("@")[0]
        return candidate if RunDir(candidate).metrics_path.is_file() else None
    for folder in (Path(text), *Path(text).parents[:2]):
        if RunDir(folder).metrics_path.is_file() and RunDir(folder).config_path.is_file():
            return folder
    return None


def _cut_at_fork(parent: Stage, init: InitConfig) -> None:
    """Forget what the stage before did after the checkpoint that was forked."""
    text = init.from_path or ""
    name = text.partition("@")[2] if text.startswith("variant:") else Path(text).name.removeprefix("iter_")
    if name.isdigit():
        parent.train = [record for record in parent.train if record["iteration"] <= int(name)]


def _old_corpora(data: DataConfig, parent: RunConfig | None, stated: Sequence[str]) -> tuple[str, ...]:
    unknown = [name for name in stated if name not in data.corpora]
    if unknown:
        known = ", ".join(data.corpora)
        raise DataError(f"--old {unknown[0]}: no corpus of the task. There are {known}. Name one of them.")
    if stated:
        return tuple(stated)
    if parent is not None and parent.data.mix:
        return tuple(name for name in parent.data.mix if name in data.corpora)
    return tuple(data.corpora)[:1]


def _heldout(stage: Stage, corpus: str) -> list[float]:
    """Return the corpus's held-out bits per byte (else losses) in order, one per iteration."""
    found = {record["iteration"]: record for record in stage.validation if record["corpus"] == corpus}
    return [record.get("bits_per_byte") or record["loss"] for _, record in sorted(found.items())]


def _judge_training(stage: Stage, parent: Stage | None, config: RunConfig, tolerance: float) -> Recovery:
    warmup = duration_samples(config.schedule.lr_warmup, config.training) * config.training.seq_length
    after = [(r["consumed_tokens"], r["loss"]) for r in stage.train if r["consumed_tokens"] > warmup]
    before = [(r["consumed_tokens"], r["loss"]) for r in parent.train] if parent else []
    return training_recovery(before, after, tolerance)


def _evidence(
    stage: Stage,
    config: RunConfig,
    training: Recovery,
    heldout: dict[str, Recovery],
    learned: dict[str, float],
    tolerance: float,
) -> tuple[str, ...]:
    total = train_tokens(config.training)
    lines = [
        f"{stage.name}: {format_count(stage.tokens)} of {format_count(total)} tokens, within {tolerance:.0%} counts"
    ]
    if training.verdict == "unknown":
        lines.append(f"training loss: unknown ({training.note})")
    else:
        lines.append(
            f"training loss: {training.verdict}: {training.now:.4f}, where the stage before was heading "
            f"{training.reference:.4f} ({training.distance:+.1%}), peak {training.peak:.4f}, {training.change:+.1%} since "
            "the second quarter"
        )
    for name, found in heldout.items():
        if found.verdict == "unknown":
            lines.append(f"held-out {name} (old): unknown ({found.note})")
        else:
            lines.append(
                f"held-out {name} (old): {found.verdict}: {found.now:.4f} bits per byte, before the first step "
                f"{found.reference:.4f} ({found.distance:+.1%}), peak {found.peak:.4f}"
            )
    if not heldout:
        lines.append("held-out loss of the old data: none measured; forgetting cannot be seen")
    lines += [f"held-out {name} (new): {change:+.1%} since before the first step" for name, change in learned.items()]
    return tuple(lines)


def _go_on(
    run_path: Path, stage: Stage, config: RunConfig, training: Recovery, judged: Sequence[str], facts: dict[str, Any]
) -> Advice:
    states = [training.verdict, *judged]
    word = "recovering" if "recovering" in states else "recovered"
    if stage.end_reason != "finished":
        return Advice(summary=f"{word}: let it continue", **facts)
    peak, last = max(r["lr"] for r in stage.train), stage.train[-1]["lr"]
    if last < HELD * peak:
        return Advice(summary=f"{word}, finished and cooled down: evaluate it", **facts)
    trial = Trial(
        variant=labelled(config.variant, "cooldown"),
        settings={
            "init.from_path": f"variant:{config.variant}",
            "init.load": "full",
            "training.train_tokens": str(max(stage.tokens // 10, 1)),
            "optimizer.lr": f"{last:.6g}",
            "schedule.lr_decay_style": "WSD",
            "schedule.lr_warmup": "0",
            "schedule.lr_cooldown": "1.0",
            **{f"schedule.{key}": "null" for key in ("lr_hold", "lr_hold_start") if getattr(config.schedule, key)},
        },
    )
    summary = f"{word} and finished at {last:.3g}: fork the next stage from here, and cool a branch down for use"
    return Advice(summary=summary, commands=(_command(run_path, None, trial),), **facts)


def _has_begun(run_path: Path, trial: Trial) -> bool:
    return RunDir(run_path.absolute().parent / trial.variant).metrics_path.is_file()


def _position(
    run_path: Path,
    config: RunConfig,
    stage: Stage,
    before: Path | None,
    parent: Stage | None,
    parent_config: RunConfig | None,
    old: tuple[str, ...],
    is_learning: bool,
) -> Position:
    is_variant = (config.init.from_path or "").startswith("variant:")
    rates = [record["lr"] for record in parent.train] if parent else []
    lr_max = max(rates, default=config.optimizer.lr) or config.optimizer.lr
    buffer = Path(config.paths.data_dir) / (config.data.buffer or "")
    return Position(
        config=config,
        old=old,
        parent=parent_config if is_variant else None,
        lr_max=lr_max,
        lr_at_fork=rates[-1] if rates else lr_max,
        fork_iteration=_before_cooldown(before, lr_max) if before is not None else None,
        parent_tokens=parent.tokens if parent else 0,
        has_buffer=config.data.buffer is not None and buffer.is_file() and buffer.stat().st_size > 0,
        is_learning=is_learning,
    )


def _before_cooldown(before: Path, lr_max: float) -> int | None:
    """Return the last checkpoint on disk that was saved while the learning rate was held at its peak."""
    run = RunDir(before)
    held = None
    for record in read_metrics(run.metrics_path):
        if record["kind"] == "train" and record["lr"] >= HELD * lr_max:
            held = record["iteration"]
    saved = [int(path.name.removeprefix("iter_")) for path in run.checkpoints.glob("iter_*") if path.is_dir()]
    return max((iteration for iteration in saved if held is not None and iteration <= held), default=None)


def _command(run_path: Path, before: Path | None, trial: Trial) -> tuple[str, ...]:
    """Return the arguments that start a trial: named as the run of that variant was, with its own settings kept."""
    source = RunDir(before if trial.is_of_parent and before is not None else run_path)
    config = read_resolved(source.config_path)
    names = run_names(source, {"--task": config.task, "--params": config.params, "--size": config.size})
    kept = command_line_settings(source.config_path) | dict(trial.settings)
    if any(key.startswith("training.train_") for key in trial.settings):
        kept = {k: v for k, v in kept.items() if not k.startswith("training.train_") or k in trial.settings}
    return (*names, "--variant", trial.variant, *(f"{key}={value}" for key, value in kept.items()))
