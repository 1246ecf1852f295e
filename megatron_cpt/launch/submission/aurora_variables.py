"""Aurora's way of steering a run: environment variables and two flags, turned into settings of the run.

    DATA_FILE_LIST=list.txt LOAD=ckpt TRAIN_TOKENS=22000000000 GRAD_ACC_STEPS=16 LR=2e-4 LR_WARMUP_FRACTION=0.01 \\
        tools/train.sh --task tasks/t --params 7b --size 22B --universal-checkpoint --finetune

Every variable of the family is honoured, known to be harmless or refused (`aurora_names.py`); none is ignored. The
checkpoints of this toolkit are universal, so `--universal-checkpoint` only means that optimizer state is also loaded,
unless `--finetune` is given.

Source: the variables of `train_alcf.sh` in argonne-lcf/Megatron-DeepSpeed.
"""

import argparse
import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from pathlib import Path

from megatron_cpt.config.loading.resolve import load_from_arguments
from megatron_cpt.config.settings.derived import data_parallel_size
from megatron_cpt.config.settings.schema import RunConfig
from megatron_cpt.errors import ConfigError
from megatron_cpt.launch.submission.aurora_names import HARMLESS, INSTEAD, REFUSED, SAME, SETTINGS, VALUES

SPECIAL = ("DATA_FILE_LIST", "GRAD_ACC_STEPS", "TOKENIZER_MODEL")
ANY_LAYOUT_BATCH = 2**10 * 3**3 * 5**2 * 7 * 11 * 13
"""A multiple of every micro-batch x data-parallel size in use."""
_FAMILY = re.compile(
    r"(TRAIN|LR|MIN_LR|MICRO|GLOBAL|GRAD|GRAD_ACC|DATA_FILE|LOAD|SAVE|ZERO|WARMUP|ADAM|EVAL|WEIGHT|TOKENIZER|SEQ|OPT|CLIP|ACT_CKPT|MUP)"
    r"(_[A-Z_0-9]+)?"
)
_FOREIGN = ("LOADEDMODULES", "LOAD_AVERAGE")


def overrides_from(environment: Mapping[str, str], flags: Sequence[str] = ()) -> list[str]:
    """Return `key=value` settings for the variables and flags, GRAD_ACC_STEPS apart, which needs the layout.

    An empty variable counts as unset. Raises: ConfigError naming every variable of the family that is unknown, refused or malformed.
    """
    given = {name: value for name, value in environment.items() if value}
    mistakes = [*_unknown(given), *_refused(given), *_contradictions(given)]
    for name, same in SAME.items():
        if name in given:
            given.setdefault(same, given[name])
    settings = [f"{key}={given[name]}" for name, key in SETTINGS.items() if name in given and name not in _WRITTEN]
    for name, write in _WRITTEN.items():
        if name in given:
            try:
                settings.append(f"{SETTINGS[name]}={write(given[name])}")
            except (ValueError, ArithmeticError):
                mistakes.append(f"{name}: {given[name]!r}. {_WANTED[name]} is needed.")
    settings += [choices[given[name]] for name, choices in VALUES.items() if given.get(name) in choices]
    if "DATA_FILE_LIST" in given:
        settings += [f"data.train_data_path={Path(given['DATA_FILE_LIST']).absolute()}", "data.mix=null"]
    if "TOKENIZER_MODEL" in given:
        settings.append(f"data.tokenizer={Path(given['TOKENIZER_MODEL']).absolute()}")
    if "--finetune" in flags:
        settings.append("init.load=weights")
    elif "--universal-checkpoint" in flags:
        settings.append("init.load=full")
    if mistakes:
        raise ConfigError("\n".join(mistakes))
    return settings


def _unknown(given: Mapping[str, str]) -> list[str]:
    known = {*SETTINGS, *SAME, *VALUES, *SPECIAL}
    found = []
    for name in sorted(given):
        if _FAMILY.fullmatch(name) and name not in {*known, *REFUSED, *HARMLESS, *_FOREIGN}:
            near = difflib.get_close_matches(name, known, n=3)
            found.append(
                f"{name}: not a variable that tools/train.sh knows. {'Near: ' if near else 'Known: '}"
                f"{', '.join(near or sorted(known))}. Unset it, or give the setting as KEY=VALUE."
            )
    return found


def _refused(given: Mapping[str, str]) -> list[str]:
    found = [f"{name}: has no setting here. {REFUSED[name]}. Unset it." for name in REFUSED if name in given]
    return found + [
        f"{name}: {given[name]!r} has no setting here. {INSTEAD[name]}. Unset it, or use one of {', '.join(choices)}."
        for name, choices in VALUES.items()
        if name in given and given[name] not in choices
    ]


def _contradictions(given: Mapping[str, str]) -> list[str]:
    found = [
        f"{name}: is {given[name]!r}, and {same} is {given[same]!r}. They mean the same. Unset one of them."
        for name, same in SAME.items()
        if name in given and given.get(same, given[name]) != given[name]
    ]
    if "GRAD_ACC_STEPS" in given and "GLOBAL_BATCH" in given:
        found.append("GLOBAL_BATCH: given together with GRAD_ACC_STEPS, which decides the same. Unset one of them.")
    if "TRAIN_TOKENS" in given and not {"TRAIN_ITERS", "TRAIN_ITER"}.isdisjoint(given):
        found.append("TRAIN_ITERS: given together with TRAIN_TOKENS. A run has one length. Unset one of them.")
    return found


def _fraction(text: str) -> str:
    """Return a part of the stage as a decimal with a point, which a duration reads as a part."""
    number = Decimal(text)
    if not 0 <= number <= 1:
        raise ValueError
    plain = f"{number:f}"
    return plain if "." in plain else f"{plain}.0"


def _iterations(text: str) -> str:
    return f"{int(text)} iterations"


_WRITTEN: dict[str, Callable[[str], str]] = {"LR_WARMUP_FRACTION": _fraction, "LR_DECAY_ITERS": _iterations}
"""Variables whose value is written otherwise in the setting."""
_WANTED = {"LR_WARMUP_FRACTION": "A number from 0 to 1, such as 0.01,", "LR_DECAY_ITERS": "A whole number"}


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


def add_variable_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that `with_variables` reads."""
    parser.add_argument(
        "--from-environment", action="store_true", help="settings from Aurora's variables (TRAIN_TOKENS, LR, LOAD ...)"
    )
    parser.add_argument("--universal-checkpoint", action="store_true", help="load optimizer state too (init.load=full)")
    parser.add_argument("--finetune", action="store_true", help="load weights only (init.load=weights)")
