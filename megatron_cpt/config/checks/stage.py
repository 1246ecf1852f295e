"""Relations of one training stage: its length, learning-rate schedule, data mix, checkpoints and job."""

from collections.abc import Iterator
from fractions import Fraction

from megatron_cpt.config.checks.problem import Problem
from megatron_cpt.config.checks.samples import sample_problems
from megatron_cpt.config.settings import derived
from megatron_cpt.config.settings.fields import nearest, sections, setting_keys
from megatron_cpt.config.settings.held_out import held_out_documents, held_out_tokens
from megatron_cpt.config.settings.iteration_ranges import parse_range
from megatron_cpt.config.settings.schema import WHOLE_STAGE, DataConfig, RunConfig, TrainingConfig
from megatron_cpt.config.settings.values import ALL_SETTINGS, parse_rule

LENGTHS = ("training.train_tokens", "training.train_samples", "training.train_iters", "training.train_epochs")
STYLES_THAT_DECAY_TO_THE_END = ("cosine", "linear")


def stage_problems(config: RunConfig) -> Iterator[Problem]:
    """Yield what does not fit together in a stage."""
    yield from _length_problems(config)
    if (
        _num_lengths(config.training) == 1 and config.training.train_epochs is None
    ):  # epochs are resolved with data at hand
        yield from _schedule_length_problems(config)
    yield from _learning_rate_problems(config)
    yield from _weight_decay_problems(config)
    yield from _data_problems(config)
    yield from _held_out_problems(config.data)
    yield from sample_problems(config)
    yield from _skip_problems(config.data)
    yield from _run_problems(config)


def _num_lengths(training: TrainingConfig) -> int:
    return sum(getattr(training, key.split(".")[1]) is not None for key in LENGTHS)


def _length_problems(config: RunConfig) -> Iterator[Problem]:
    training = config.training
    count = _num_lengths(config.training)
    if count != 1:
        found = "the stage has no length" if not count else f"the stage has {count} lengths"
        yield Problem(
            LENGTHS, f"{found}. Exactly one of train_tokens, train_samples, train_iters and train_epochs is needed."
        )
    if training.seq_length > config.model.max_position_embeddings:
        yield Problem(
            ("training.seq_length", "model.max_position_embeddings"),
            f"training.seq_length is {training.seq_length}, longer than model.max_position_embeddings "
            f"({config.model.max_position_embeddings}). Use a shorter one, or change the model's rotary scaling.",
        )


def _schedule_length_problems(config: RunConfig) -> Iterator[Problem]:
    schedule, training = config.schedule, config.training
    total = derived.train_samples(training)
    warmup = derived.duration_samples(schedule.lr_warmup, training)
    cooldown = derived.duration_samples(schedule.lr_cooldown, training, is_at_end=True)
    if warmup + cooldown > total:
        yield Problem(
            ("schedule.lr_warmup", "schedule.lr_cooldown", *LENGTHS),
            f"schedule.lr_warmup + lr_cooldown is {warmup} + {cooldown} = {warmup + cooldown} samples, longer than the "
            f"stage ({total} samples). Shorten them.",
        )
    if schedule.lr_decay is not None:
        decay = derived.duration_samples(schedule.lr_decay, training)
        if decay <= warmup:
            yield Problem(
                ("schedule.lr_decay", "schedule.lr_warmup", *LENGTHS),
                f"schedule.lr_decay is {schedule.lr_decay} ({decay} samples), not after the warm-up's end ({warmup} samples). "
                "It counts from the stage's start. Lengthen it, or shorten the warm-up.",
            )
    if schedule.lr_hold_start is not None:
        hold_start = derived.duration_samples(schedule.lr_hold_start, training)
        if not warmup <= hold_start <= total - cooldown:
            yield Problem(
                ("schedule.lr_hold_start", "schedule.lr_warmup", "schedule.lr_cooldown", *LENGTHS),
                f"schedule.lr_hold_start is at sample {hold_start}. It must lie between the warm-up's end ({warmup}) "
                f"and the cooldown's start ({total - cooldown}). Move it.",
            )


def _learning_rate_problems(config: RunConfig) -> Iterator[Problem]:
    schedule, optimizer = config.schedule, config.optimizer
    style, keys = schedule.lr_decay_style, ("schedule.lr_decay_style",)
    if optimizer.min_lr > optimizer.lr:
        yield Problem(
            ("optimizer.min_lr", "optimizer.lr"),
            f"optimizer.min_lr is {optimizer.min_lr:g}, more than optimizer.lr ({optimizer.lr:g}). Use at most that.",
        )
    if schedule.lr_cooldown.amount and style in STYLES_THAT_DECAY_TO_THE_END:
        yield Problem(
            ("schedule.lr_cooldown", *keys),
            f"schedule.lr_cooldown is {schedule.lr_cooldown} with lr_decay_style {style}, which decays over the whole "
            "stage. Use WSD, constant or an infinite form, or remove it.",
        )
    if schedule.lr_warmup_init and not schedule.lr_warmup.amount:
        yield Problem(
            ("schedule.lr_warmup_init", "schedule.lr_warmup"),
            f"schedule.lr_warmup_init is {schedule.lr_warmup_init:g} without a warm-up. Set lr_warmup, or remove it.",
        )
    if schedule.lr_decay is not None and style not in STYLES_THAT_DECAY_TO_THE_END:
        yield Problem(
            ("schedule.lr_decay", *keys),
            f"schedule.lr_decay is {schedule.lr_decay} and has no effect with lr_decay_style {style}. Remove it.",
        )
    if schedule.lr_cooldown.amount and schedule.lr_cooldown_style == "geometric" and not optimizer.min_lr:
        yield Problem(
            ("schedule.lr_cooldown_style", "optimizer.min_lr"),
            "schedule.lr_cooldown_style is geometric with optimizer.min_lr 0, which no factor reaches. Set min_lr above 0.",
        )
    if schedule.lr_warmup_init > optimizer.lr:
        yield Problem(
            ("schedule.lr_warmup_init", "optimizer.lr"),
            f"schedule.lr_warmup_init is {schedule.lr_warmup_init:g}, more than optimizer.lr ({optimizer.lr:g}): a warm-up "
            "rises. Use at most that.",
        )
    if style == "inverse-square-root" and not schedule.lr_warmup.amount:
        yield Problem(
            ("schedule.lr_warmup", *keys),
            "schedule.lr_warmup is 0 with lr_decay_style inverse-square-root, whose rate at sample n is lr x sqrt(warm-up / n): it "
            "would fall to almost nothing after the first step. Set a warm-up.",
        )
    is_infinite = style.startswith("infinite")
    for name in ("lr_hold", "lr_hold_start"):
        value = getattr(schedule, name)
        if is_infinite and value is None:
            yield Problem(
                (f"schedule.{name}", *keys), f"schedule.{name} is missing. lr_decay_style {style} needs it. Set it."
            )
        if not is_infinite and value is not None:
            yield Problem(
                (f"schedule.{name}", *keys),
                f"schedule.{name} is {value} and has no effect with lr_decay_style {style}. Remove it.",
            )
    if is_infinite and schedule.lr_hold is not None and not optimizer.min_lr <= schedule.lr_hold <= optimizer.lr:
        yield Problem(
            ("schedule.lr_hold", "optimizer.lr", "optimizer.min_lr"),
            f"schedule.lr_hold is {schedule.lr_hold:g}. It must lie between optimizer.min_lr ({optimizer.min_lr:g}) and "
            f"optimizer.lr ({optimizer.lr:g}).",
        )


def _weight_decay_problems(config: RunConfig) -> Iterator[Problem]:
    optimizer = config.optimizer
    bounds = ("weight_decay_start", "weight_decay_end")
    style, stated = optimizer.weight_decay_incr_style, [n for n in bounds if getattr(optimizer, n) is not None]
    keys = ("optimizer.weight_decay_incr_style", *(f"optimizer.{name}" for name in bounds))
    if style == "constant" and stated:
        yield Problem(
            keys,
            f"optimizer.{stated[0]} is {getattr(optimizer, stated[0]):g} and has no effect with weight_decay_incr_style "
            "constant. Use linear or cosine, or remove it.",
        )
    if style == "constant" and optimizer.weight_decay_incr != WHOLE_STAGE:
        yield Problem(
            ("optimizer.weight_decay_incr", *keys),
            f"optimizer.weight_decay_incr is {optimizer.weight_decay_incr} and has no effect with weight_decay_incr_style "
            "constant. Use linear or cosine, or remove it.",
        )
    if style != "constant" and not optimizer.weight_decay_incr.amount:
        yield Problem(
            ("optimizer.weight_decay_incr", *keys),
            f"optimizer.weight_decay_incr is {optimizer.weight_decay_incr}: weight decay would have no time to change. "
            "Lengthen it.",
        )
    if style != "constant" and not stated:
        yield Problem(
            keys,
            f"optimizer.weight_decay_incr_style is {style} without weight_decay_start or weight_decay_end. "
            "Set one of them, or use constant.",
        )


def _held_out_problems(data: DataConfig) -> Iterator[Problem]:
    for name, corpus in data.corpora.items():
        if corpus.held_out is None:
            continue
        key = f"data.corpora.{name}.held_out"
        if not corpus.documents:
            yield Problem(
                ("data.corpora",), f"{key} is {corpus.held_out:g} without documents. State documents, or remove it."
            )
        if (corpus.validation, corpus.validation_documents) != ((held_out_tokens(name),), (held_out_documents(name),)):
            yield Problem(
                ("data.corpora",),
                f"{key} is {corpus.held_out:g} together with validation or validation_documents. It names both itself. Remove it, or them.",
            )


def _data_problems(config: RunConfig) -> Iterator[Problem]:
    data = config.data
    sources = {"data.mix": data.mix, "data.rules": data.rules, "data.train_data_path": data.train_data_path}
    given = [key for key, value in sources.items() if value]
    if len(given) > 1:
        yield Problem(
            tuple(given), f"{' and '.join(given)} are given. One of them says what is read. Set the others to null."
        )
    if not given:
        yield Problem(
            tuple(sources),
            "none of data.mix, data.rules and data.train_data_path is given. One of them says what is read. Set data.mix.",
        )
    yield from _rule_problems(data)
    for name, share in data.mix.items():
        if name not in data.corpora and (name != "buffer" or data.buffer is None):
            yield Problem(
                ("data.mix", "data.corpora"),
                f"data.mix names {name}, which is no corpus of data.corpora. {nearest(name, list(data.corpora))}",
            )
        if not 0 <= share <= 1:
            yield Problem(("data.mix",), f"data.mix.{name} is {share:g}. A share lies between 0 and 1.")
    total = sum((Fraction(repr(share)) for share in data.mix.values()), Fraction(0))
    if data.mix and abs(total - 1) > Fraction(1, 10**9):
        shares = " + ".join(f"{share:g}" for share in data.mix.values())
        yield Problem(("data.mix",), f"data.mix sums to {float(total):.10g} ({shares}), not to 1. Change the shares.")
    if config.evaluation.eval_interval and not any(corpus.validation for corpus in data.corpora.values()):
        yield Problem(
            ("evaluation.eval_interval", "data.corpora"),
            f"evaluation.eval_interval is {config.evaluation.eval_interval} and no corpus has validation: prefixes. "
            "Name them, or set eval_interval: 0.",
        )


def _skip_problems(data: DataConfig) -> Iterator[Problem]:
    for text in data.skip_iterations:
        try:
            parse_range(text)
        except ValueError as problem:
            yield Problem(("data.skip_iterations",), f"data.skip_iterations: {problem}.")


def _rule_problems(data: DataConfig) -> Iterator[Problem]:
    for pattern, text in data.rules.items():
        try:
            parse_rule(text)
        except ValueError as problem:
            yield Problem(("data.rules",), f"data.rules.{pattern}: {problem}.")
    pools = {"data.base_pool": data.base_pool, "data.base_ratio": data.base_ratio}
    stated = [key for key, value in pools.items() if value is not None]
    if len(stated) == 1:
        yield Problem(tuple(pools), f"{stated[0]} is given alone. Two pools need {' and '.join(pools)}.")
    if data.base_ratio is not None and not 0 <= data.base_ratio <= 1:
        yield Problem(("data.base_ratio",), f"data.base_ratio is {data.base_ratio:g}. It lies between 0 and 1.")
    if data.cap_epochs is not None and data.cap_epochs <= 0:
        yield Problem(("data.cap_epochs",), f"data.cap_epochs is {data.cap_epochs:g}. It is above 0.")
    for key, value in {**pools, "data.cap_epochs": data.cap_epochs}.items():
        if value is not None and not data.rules:
            yield Problem((key, "data.rules"), f"{key} is {value} and has no effect without data.rules. Remove it.")


def _run_problems(config: RunConfig) -> Iterator[Problem]:
    checkpoint, launch, training = config.checkpoint, config.launch, config.training
    if training.spike_action == "rollback" and not training.spike_threshold:
        yield Problem(
            ("training.spike_action", "training.spike_threshold"),
            "training.spike_action is rollback with spike_threshold 0, so no spike is looked for. Set spike_threshold.",
        )
    if config.init.load == "full" and config.init.from_path is None:
        yield Problem(
            ("init.load", "init.from_path"),
            "init.load is full without init.from_path. Random weights have no optimizer state. Set init.from_path.",
        )
    if config.init.from_path == f"variant:{config.variant}":
        yield Problem(
            ("init.from_path",), f"init.from_path is variant:{config.variant}, the run itself. Name another variant."
        )
    if config.data.order == "continue" and not (config.init.from_path or "").startswith("variant:"):
        yield Problem(
            ("data.order", "init.from_path"),
            f"data.order is continue with init.from_path {config.init.from_path}. Only a run of this task has an order to "
            "continue. Set init.from_path=variant:NAME, or data.order=own.",
        )
    if checkpoint.keep_every is not None and checkpoint.keep_last is None and checkpoint.keep_bytes is None:
        yield Problem(
            ("checkpoint.keep_every", "checkpoint.keep_last"),
            f"checkpoint.keep_every is {checkpoint.keep_every} without keep_last, so all are kept. Set keep_last.",
        )
    for key in checkpoint.accept_changes:
        if not _names_settings(key):
            yield Problem(
                ("checkpoint.accept_changes",),
                f"checkpoint.accept_changes names {key}, which is no setting. {nearest(key, setting_keys())}",
            )
    if launch.spare_nodes and launch.scheduler != "pbs":
        yield Problem(
            ("launch.spare_nodes", "launch.scheduler"),
            f"launch.spare_nodes is {launch.spare_nodes} and has no effect with the scheduler {launch.scheduler}, which "
            "leaves bad nodes out by itself or has one. Remove it.",
        )
    if launch.exit_before_walltime >= launch.walltime:
        yield Problem(
            ("launch.exit_before_walltime", "launch.walltime"),
            f"launch.exit_before_walltime is {launch.exit_before_walltime} s, not less than launch.walltime "
            f"({launch.walltime} s). Use less.",
        )


def _names_settings(name: str) -> bool:
    """Return whether a name is that of a setting, of a part of one (`data.mix.D0`), of a section, or of all."""
    parts = name.split(".")
    return name == ALL_SETTINGS or name in sections() or ".".join(parts[:2]) in setting_keys()
