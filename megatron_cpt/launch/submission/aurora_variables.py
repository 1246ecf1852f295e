"""Aurora's way of steering a run: environment variables and two flags, turned into settings of the run.

    DATA_FILE_LIST=list.txt LOAD=ckpt TRAIN_TOKENS=22000000000 GRAD_ACC_STEPS=16 LR=2e-4 LR_WARMUP_FRACTION=0.01 \\
        tools/train.sh --task tasks/t --params 7b --size 22B --universal-checkpoint --finetune

Every variable of the family is honoured or refused; none is ignored. The checkpoints of this toolkit are universal, so
`--universal-checkpoint` says only that optimizer state is loaded too, unless `--finetune` is given.

Source: the variables of `train_alcf.sh` in argonne-lcf/Megatron-DeepSpeed.
"""

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_cpt.config.loading.resolve import load_from_arguments
from megatron_cpt.config.settings.derived import data_parallel_size
from megatron_cpt.config.settings.schema import RunConfig
from megatron_cpt.errors import ConfigError

SETTINGS = {
    "TRAIN_TOKENS": "training.train_tokens",
    "TRAIN_ITERS": "training.train_iters",
    "MICRO_BATCH": "training.micro_batch_size",
    "GLOBAL_BATCH": "training.global_batch_size",
    "LR": "optimizer.lr",
    "LR_WARMUP_FRACTION": "schedule.lr_warmup",
    "LR_DECAY_STYLE": "schedule.lr_decay_style",
    "LOAD": "init.from_path",
    "SAVE": "paths.runs_dir",
    "SAVE_INTERVAL": "checkpoint.save_interval",
}
"""Variable -> setting. SAVE names the folder under which the run directory, with its checkpoints, is made."""
SPECIAL = ("DATA_FILE_LIST", "GRAD_ACC_STEPS")
ANY_LAYOUT_BATCH = 2**10 * 3**3 * 5**2 * 7 * 11 * 13
"""A multiple of every micro-batch x data-parallel size in use."""
_FAMILY = re.compile(r"(TRAIN|LR|MICRO|GLOBAL|GRAD|GRAD_ACC|DATA_FILE|LOAD|SAVE|ZERO|WARMUP)(_[A-Z_]+)?")
_FOREIGN = ("LOADEDMODULES", "LOAD_AVERAGE")


def overrides_from(environment: Mapping[str, str], flags: Sequence[str] = ()) -> list[str]:
    """Return `key=value` settings for the variables and flags, GRAD_ACC_STEPS apart, which needs the layout.

    Raises: ConfigError naming every variable of the family that is unknown or malformed.
    """
    known = {*SETTINGS, *SPECIAL}
    mistakes = [
        f"{name}: not a variable that tools/train.sh knows. Known: {', '.join(sorted(known))}. Unset it, or give the "
        "setting as KEY=VALUE."
        for name in sorted(environment)
        if _FAMILY.fullmatch(name) and name not in known and name not in _FOREIGN
    ]
    if "GRAD_ACC_STEPS" in environment and "GLOBAL_BATCH" in environment:
        mistakes.append("GLOBAL_BATCH: given together with GRAD_ACC_STEPS, which decides the same. Unset one of them.")
    if "TRAIN_TOKENS" in environment and "TRAIN_ITERS" in environment:
        mistakes.append("TRAIN_ITERS: given together with TRAIN_TOKENS. A run has one length. Unset one of them.")
    settings = [f"{key}={environment[name]}" for name, key in SETTINGS.items() if environment.get(name)]
    fraction = environment.get("LR_WARMUP_FRACTION")
    if fraction:
        try:
            is_fraction = 0 <= float(fraction) <= 1
        except ValueError:
            is_fraction = False
        if not is_fraction:
            mistakes.append(f"LR_WARMUP_FRACTION: {fraction!r}. A number from 0 to 1 is needed, such as 0.01.")
        settings = [item for item in settings if not item.startswith("schedule.lr_warmup=")]
        settings += [f"schedule.lr_warmup={float(fraction):f}"] if is_fraction else []
    if environment.get("DATA_FILE_LIST"):
        settings += [f"data.train_data_path={Path(environment['DATA_FILE_LIST']).absolute()}", "data.mix=null"]
    if "--finetune" in flags:
        settings.append("init.load=weights")
    elif "--universal-checkpoint" in flags:
        settings.append("init.load=full")
    if mistakes:
        raise ConfigError("\n".join(mistakes))
    return settings


def global_batch_override(config: RunConfig, grad_acc_steps: str) -> str:
    """Return the global batch that GRAD_ACC_STEPS means: micro batch x steps x data-parallel size."""
    if not grad_acc_steps.isdigit() or int(grad_acc_steps) < 1:
        raise ConfigError(f"GRAD_ACC_STEPS: {grad_acc_steps!r}. A whole number from 1 on is needed.")
    size = config.training.micro_batch_size * int(grad_acc_steps) * data_parallel_size(config)
    return f"training.global_batch_size={size}"


def with_variables(arguments: argparse.Namespace, environment: Mapping[str, str]) -> list[str]:
    """Return the run's `key=value` settings: the variables', the flags', then the command line's own, which win.

    `arguments`: those of `add_run_arguments` with `universal_checkpoint` and `finetune`.
    """
    flags = [f"--{name.replace('_', '-')}" for name in ("universal_checkpoint", "finetune") if getattr(arguments, name)]
    settings = overrides_from(environment, flags)
    steps = environment.get("GRAD_ACC_STEPS")
    if steps:
        # The run is resolved once, with a batch that every layout divides, to learn its data-parallel size.
        trial = [*settings, *arguments.overrides, f"training.global_batch_size={ANY_LAYOUT_BATCH}"]
        config = load_from_arguments(argparse.Namespace(**{**vars(arguments), "overrides": trial})).config
        settings.append(global_batch_override(config, steps))
    return [*settings, *arguments.overrides]
