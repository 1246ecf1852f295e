"""Branches of a run: another stage, or a decay to a usable model, from any iteration that was kept. No torch here.

Nothing is written into `tasks/`: the branch is a variant of the task, or a label of the source's variant (`main+NAME`),
and `key=value` overrides set the differences. It reads one of two orders:

- `continue` (`data.order: continue`): the very samples that the source would have read next. The default of a decay branch of
  the same data, whose result is then that of a run which had cooled down there.
- `own`: sample 0 of an order of its own. The default of another stage. `training.seed` is the source's plus the iteration, so that a
  branch does not start with the source's first samples; documents can repeat, unless a replay buffer (`data.buffer`) draws
  without replacement.

A decay branch (`--decay`) is a stage of that length that does nothing but cool down, from the learning rate that the source
had at the iteration to `optimizer.min_lr` (WSD's decay phase, arXiv:2405.18392, section 3), with the weight decay of that
iteration.
"""

import shlex
from dataclasses import dataclass
from pathlib import Path

from megatron_cpt.checkpoint.torch_dist.mcore import (
    checkpoint_dir,
    newest_good_checkpoint,
    read_manifest,
    verify_checkpoint,
)
from megatron_cpt.config.loading.resolve import LoadedConfig, load_config, read_resolved
from megatron_cpt.config.loading.sources import read_yaml
from megatron_cpt.config.settings.batch_sizes import batch_sizes
from megatron_cpt.config.settings.derived import duration_samples
from megatron_cpt.config.settings.schema import CheckpointConfig, RunConfig
from megatron_cpt.config.settings.values import parse_duration
from megatron_cpt.data.blend.start_position import data_differences
from megatron_cpt.errors import CheckpointError, ConfigError
from megatron_cpt.run.directory import RunDir, run_dir
from megatron_cpt.run.names import command_line_settings, run_names
from megatron_cpt.train.stage.schedule import schedule

NOT_INHERITED = ("init.", "checkpoint.accept_changes", "data.skip_iterations", "data.order", "training.seed")
LAYOUT = ("launch.", "parallel.", "paths.", "training.micro_batch_size", "logging.")
"""Settings that a stage of another variant copies from the source's command line."""


@dataclass(frozen=True)
class Fork:
    """A branch that can be submitted."""

    source: Path
    """The verified checkpoint that it begins with."""
    iteration: int
    loaded: LoadedConfig
    arguments: list[str]
    """Arguments of `megatron-cpt train` or `submit train`."""

    @property
    def target(self) -> RunDir:
        """The branch's run directory."""
        return run_dir(self.loaded.config)

    @property
    def command(self) -> str:
        """The line to type."""
        return f"megatron-cpt submit train {shlex.join(self.arguments)}"


def plan_fork(
    path: Path,
    name: str,
    overrides: list[str],
    *,
    iteration: int | None = None,
    task: str | None = None,
    decay: str | None = None,
    load: str = "full",
    data: str | None = None,
) -> Fork:
    """Return the branch `name` of the run at `path`; `iteration` None is the newest good checkpoint.

    `data` is `continue` or `own`; None: continue for a decay branch that reads what the source reads.

    Raises: ConfigError or CheckpointError when the branch could not begin.
    """
    run = RunDir(path)
    if not run.config_path.exists():
        raise ConfigError(
            f"{path}: no config.yaml. A run directory is needed: <runs_dir>/<task>/<params>/<size>/<variant>."
        )
    source = read_resolved(run.config_path)
    directory = _source_checkpoint(run, iteration, source.checkpoint)
    iteration = int(read_manifest(directory)["iteration"])
    words = run_names(run, {"--task": task or f"tasks/{source.task}", "--params": source.params, "--size": source.size})
    names = dict(zip(words[::2], words[1::2], strict=True))
    if task is not None:
        names["--task"] = task
    variant, is_label = _variant(Path(names["--task"]), source.variant, name)
    if variant == source.variant:
        raise ConfigError(f"--to-variant {name}: is the run itself. Name another variant, or any label.")
    kept = command_line_settings(run.config_path)
    settings = {
        key: value
        for key, value in kept.items()
        if not key.startswith(NOT_INHERITED) and (is_label or key.startswith(LAYOUT))
    }
    settings |= {
        "init.from_path": f"variant:{source.variant}@{iteration}",
        "init.load": load,
        "training.seed": str(source.training.seed + iteration),
        "paths.runs_dir": source.paths.runs_dir,
    }
    if decay is not None:
        settings |= _decay_settings(source, iteration, decay, overrides)
    stated = [word.partition("=")[0] for word in overrides]
    settings = {key: value for key, value in settings.items() if key not in stated}

    def load_branch() -> LoadedConfig:
        words = [*(f"{key}={value}" for key, value in settings.items()), *overrides]
        return load_config(
            Path(names["--task"]), names["--params"], names["--size"], variant, names.get("--site"), words
        )

    loaded = load_branch()
    if "data.order" not in stated and _continues(data, decay, source, loaded.config):
        settings["data.order"] = "continue"
        if "training.seed" in settings:  # what it still decides is dropout and noise
            settings["training.seed"] = str(source.training.seed)
        loaded = load_branch()
    arguments = [word for key, value in names.items() for word in (key, value)]
    arguments += ["--variant", variant, *(f"{key}={value}" for key, value in settings.items()), *overrides]
    return Fork(directory, iteration, loaded, arguments)


def _continues(data: str | None, decay: str | None, source: RunConfig, branch: RunConfig) -> bool:
    """Return whether a branch reads on in its source's order.

    Raises: ConfigError when it should and reads other data.
    """
    if data == "own" or (data is None and decay is None):
        return False
    different = data_differences(source, branch)
    if different and data == "continue":
        raise ConfigError(
            f"--data continue: the branch reads other data than the run: {'; '.join(different)}. Use --data own, or the same data."
        )
    return not different


def _source_checkpoint(run: RunDir, iteration: int | None, checkpoint: CheckpointConfig) -> Path:
    if iteration is None:
        directory = newest_good_checkpoint(run.checkpoints, checkpoint.verify_on_load)
        if directory is None:
            raise CheckpointError(f"{run.checkpoints}: no checkpoint. The run must have saved one. Train it first.")
        return directory
    directory = checkpoint_dir(run.checkpoints, iteration)
    verify_checkpoint(directory, checkpoint.verify_on_load)
    return directory


def _variant(task: Path, source: str, name: str) -> tuple[str, bool]:
    """Return the variant that a name means, and whether it is a label of the source's."""
    path = next(
        (folder / "task.yaml" for folder in (task, Path("tasks") / task) if (folder / "task.yaml").exists()), None
    )
    if path is None:
        raise ConfigError(
            f"{task}: no task.yaml. The branch is a variant of the run's task. Give its folder with --task."
        )
    variants = read_yaml(path).get("variants") or {}
    if name.partition("+")[0] in variants:
        return name, False
    return f"{source.partition('+')[0]}+{name}", True


def _decay_settings(source: RunConfig, iteration: int, text: str, overrides: list[str]) -> dict[str, str]:
    """Return the settings of a stage that cools the source's learning rate down over `text`, a duration."""
    try:
        duration = parse_duration(text)
    except ValueError as problem:
        raise ConfigError(f"--decay: {problem}.") from None
    key, amount = {
        "tokens": ("train_tokens", int(duration.amount)),
        "iterations": ("train_iters", int(duration.amount)),
        "samples": ("train_samples", int(duration.amount)),
        "fraction": ("train_samples", duration_samples(duration, source.training)),
    }[duration.unit]
    if amount < 1:
        raise ConfigError(f"--decay {text}: is nothing. A length is needed, such as '5B tokens' or 500.")
    curve, place = schedule(source), batch_sizes(source.training).samples(iteration)
    rate = curve.learning_rate(place)
    if rate <= source.optimizer.min_lr and not any(
        word.startswith(("optimizer.lr=", "optimizer.min_lr=")) for word in overrides
    ):
        raise ConfigError(
            f"--decay: the learning rate after iteration {iteration} is {rate:g}, not above optimizer.min_lr "
            f"({source.optimizer.min_lr:g}): there is nothing to cool down from. Fork another iteration, or state optimizer.lr."
        )
    weight_decay = {
        "optimizer.weight_decay": repr(curve.weight_decay(place)),
        "optimizer.weight_decay_incr_style": "constant",
        "optimizer.weight_decay_start": "null",
        "optimizer.weight_decay_end": "null",
        "optimizer.weight_decay_incr": "1.0",
    }
    return (weight_decay if source.optimizer.weight_decay_incr_style != "constant" else {}) | {
        f"training.{key}": str(amount),
        "training.rampup_batch_size": "null",
        "optimizer.lr": repr(rate),
        "schedule.lr_decay_style": "WSD",
        "schedule.lr_warmup": "0",
        "schedule.lr_warmup_init": "0.0",
        "schedule.lr_cooldown": "1.0",
        "schedule.lr_decay": "null",
        "schedule.lr_hold": "null",
        "schedule.lr_hold_start": "null",
    }
