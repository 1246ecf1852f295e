"""The blend of a stage: tokens, epochs and samples of each corpus and each of its shards.

A stage's tokens are its iterations x global_batch_size x seq_length. They are split between corpora by `data.mix`, and
a corpus's tokens over its shards in proportion to their size; or a ready data list states the proportions. All
arithmetic is in whole numbers and fractions: sums are exact. Token counts come from the shards' indexes only.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_cpt.config.checks.vocabulary import vocabulary_problem
from megatron_cpt.config.loading.paths import data_path
from megatron_cpt.config.settings import derived
from megatron_cpt.config.settings.schema import DataConfig, ModelConfig, RunConfig, TrainingConfig
from megatron_cpt.data.blend.replay import append_stage
from megatron_cpt.data.blend.sources import (
    Part,
    Parts,
    buffer_path,
    parts_from_list,
    parts_from_mix,
    parts_from_rules,
    stage_name,
    validation_prefixes,
)
from megatron_cpt.data.blend.stage_order import StageOrder
from megatron_cpt.data.blend.table import BlendPlan, CorpusPlan, corpus_plans, is_unnamed
from megatron_cpt.data.lists.budget import apportion, exact, spread_samples
from megatron_cpt.data.lists.data_list import DataEntry, read_data_list
from megatron_cpt.data.shards.discovery import Shard, read_shards, tokenizer_problems
from megatron_cpt.data.shards.form import packing_problem, prompt_problem, read_shard_form
from megatron_cpt.data.shards.skip_list import unread_prefixes
from megatron_cpt.data.tokenizer.interface import describe
from megatron_cpt.errors import DataError
from megatron_cpt.log import format_count


def plan_blend(config: RunConfig, begun: Path | None = None, order: StageOrder | None = None) -> BlendPlan:
    """Return the exact blend of a stage from `data.mix` or `data.rules` and the corpora, or from `data.train_data_path`.

    `begun` is the data list of a run that has begun, if there is one: its positions in the replay buffer stay. A stage
    that continues an `order` reads the samples of that order; without one, the plan creates an order for the stage.

    Raises: DataError with every reason at once: shares that do not sum to 1, missing or incomplete shards by name,
    shards of another tokenizer, a corpus smaller than one sequence or repeated more than `data.max_epochs` times.
    """
    problems: list[str] = []
    if config.data.train_data_path is not None:
        parts, shares = parts_from_list(config, problems)
    else:
        positions = {}
        if order is not None:
            positions = {entry.prefix: entry.first_sample for entry in order.entries}
        elif begun is not None and begun.exists():
            # finish_stage moves the positions of a replay buffer. A run that resumes needs those that it began
            # with.
            positions = {entry.prefix: entry.first_sample for entry in read_data_list(begun)}
        source = parts_from_rules if config.data.rules else parts_from_mix
        parts, shares = source(config, positions, problems)
    shards = [part.shard for group in parts.values() for part in group]
    expected = _tokenizer_identity(config)
    held_out = _held_out_shards(config, problems)
    problems += tokenizer_problems([*shards, *held_out], expected) if shards else []
    problems += _row_problems(config.model, expected, [*shards, *held_out])
    problems += _sentinel_problems(config)
    lengths = {shard.prefix: shard.packed_seq_length for shard in [*shards, *held_out]}
    problems += [
        f"{prefix} {problem}"
        for prefix, length in lengths.items()
        if (problem := packing_problem(length, config.training.seq_length))
    ]
    if config.data.prompt_loss_weight and shards:
        problems += _prompt_problems([shard.prefix for shard in shards])
    _refuse(config, problems)

    # Everything below needs complete, compatible shards, so problems are reported in two groups.
    total, num_samples = derived.train_tokens(config.training), derived.train_samples(config.training)
    # Two levels, first corpora, then the shards of each: rounding among shards never moves a token from one corpus
    # to another.
    taken = dict(zip(parts, apportion(total, [shares[corpus] for corpus in parts]), strict=True))
    entries: list[DataEntry] = []
    small = [
        corpus
        for corpus, group in parts.items()
        if is_unnamed(corpus, group) and group[0].available <= config.training.seq_length
    ]
    notes = []
    if small:
        notes.append(f"{len(small)} shards of the list are smaller than one sequence: {', '.join(small[:3])}")
    read = taken
    if order is not None:
        entries = order.stage_entries
        problems += _missing_problems(entries, shards)
        taken = {corpus: sum(e.tokens or 0 for e in entries if (e.corpus or e.prefix) == corpus) for corpus in parts}
        read = dict.fromkeys(parts, 0)
        # part.stop counts from the order's beginning: data.max_epochs limits what all stages of an order read
        # together.
        for corpus, part in zip(order.corpora, order.drawn, strict=True):
            if corpus in read:
                read[corpus] += part.stop * config.training.seq_length
        notes.append(f"continues at sample {order.position:,} of the order of {order.source}")
    for corpus, group in parts.items():
        problems += _size_problems(config, corpus, group, read[corpus])
        if order is not None:
            continue
        amounts = apportion(taken[corpus], [part.weight for part in group])
        problems += _shard_problems(config.data, corpus, group, amounts)
        entries += [
            DataEntry(prefix=part.shard.prefix, tokens=amount, corpus=corpus, first_sample=part.first_sample)
            for part, amount in zip(group, amounts, strict=True)
            if amount
        ]
        nothing = [part.shard.prefix for part, amount in zip(group, amounts, strict=True) if not amount]
        notes += _note(nothing, "the list" if is_unnamed(corpus, group) else corpus, "a whole token")
    _refuse(config, problems)

    # Over all entries at once: each shard and each corpus is then within one sample of its share (spread_samples).
    samples = spread_samples([entry.tokens or 0 for entry in entries], num_samples)
    if unread := unread_prefixes(config, [shard.prefix for shard in shards]):
        notes.append(f"the skip list names {len(unread)} shards that this stage does not read: {', '.join(unread[:3])}")
    empty: dict[str, list[str]] = {}
    for entry, count in zip(entries, samples, strict=True):
        if not count:
            unnamed = entry.corpus in (None, entry.prefix)
            empty.setdefault("the list" if unnamed else entry.corpus or "", []).append(entry.prefix)
    for corpus, prefixes in empty.items():
        notes += _note(prefixes, corpus, "a whole sample")
    corpora = corpus_plans(parts, shares, taken, entries, samples, total)
    notes += _rounded_away(corpora)
    order = order or StageOrder(
        entries=tuple(entries),
        num_samples=num_samples,
        count=num_samples,
        seq_length=config.training.seq_length,
        seed=config.training.seed,
        shuffle_in_corpus=config.data.shuffle_in_corpus,
    )
    return BlendPlan(
        entries=entries,
        order=order,
        num_samples=samples,
        corpora=corpora,
        train_tokens=total,
        train_samples=num_samples,
        train_iters=derived.train_iters(config.training),
        target=_target(config.training),
        notes=notes + _replayed(entries, config.training.seq_length, parts),
    )


def finish_stage(config: RunConfig, entries: Sequence[DataEntry]) -> bool:
    """Append a finished stage to its replay buffer, if it has one; return whether the buffer changed."""
    path = buffer_path(config)
    if path is None:
        return False
    samples = spread_samples([entry.tokens or 0 for entry in entries], derived.train_samples(config.training))
    return append_stage(path, stage_name(config), entries, samples, config.training.seq_length)


def _size_problems(config: RunConfig, corpus: str, group: Sequence[Part], taken: int) -> list[str]:
    problems = []
    available = sum(part.available for part in group)
    is_packed = any(part.shard.packed_seq_length for part in group)
    if available <= config.training.seq_length and not is_packed and taken and not is_unnamed(corpus, group):
        problems.append(
            f"corpus {corpus} has {available:,} tokens, not one sequence of {config.training.seq_length:,} and the "
            "token after it. Leave it out or join it to another corpus."
        )
    if taken > exact(config.data.max_epochs) * available:
        most = int(exact(config.data.max_epochs) * available)
        problems.append(
            f"corpus {corpus} would be read {taken / available:.4g} times ({taken:,} of {available:,} tokens); "
            f"data.max_epochs is {config.data.max_epochs:g}. Ask for {format_count(most)} tokens of it at most, or "
            "raise data.max_epochs."
        )
    return problems


def _shard_problems(data: DataConfig, corpus: str, group: Sequence[Part], amounts: Sequence[int]) -> list[str]:
    """Return what is wrong with single shards of a corpus that is itself not read too often."""
    most = exact(data.max_epochs)
    if sum(amounts) > most * sum(part.available for part in group):
        return []
    often = [
        f"{part.shard.prefix} ({amount / part.available:.4g})"
        for part, amount in zip(group, amounts, strict=True)
        if amount > math.ceil(most * part.available)
    ]
    if not often:
        return []
    return [
        f"corpus {corpus}: {len(often)} shards would be read more than {data.max_epochs:g} times: "
        f"{', '.join(often[:5])}{', ...' if len(often) > 5 else ''}. Lower their weights, set data.cap_epochs with "
        "data.rules, or raise data.max_epochs."
    ]


def _missing_problems(entries: Sequence[DataEntry], shards: Sequence[Shard]) -> list[str]:
    found = {shard.prefix for shard in shards}
    return [
        f"{entry.prefix} of the order that is continued belongs to no corpus any more. Restore it."
        for entry in entries
        if entry.prefix not in found
    ]


def _tokenizer_identity(config: RunConfig) -> dict[str, Any] | None:
    if config.data.tokenizer is None:
        return None
    from megatron_cpt.data.tokenizer.interface import load_tokenizer  # heavy: the tokenizer library

    return load_tokenizer(Path(data_path(config.paths, config.data.tokenizer))).identity


def check_tokenizer_rows(config: RunConfig) -> None:
    """Compare the tokenizer's ids with the model's rows, where the tokenizer is there already.

    Raises: DataError when an id would have no row.
    """
    if config.data.tokenizer is not None and Path(data_path(config.paths, config.data.tokenizer)).exists():
        _refuse(config, _row_problems(config.model, _tokenizer_identity(config), []))


def _row_problems(model: ModelConfig, identity: dict[str, Any] | None, shards: Sequence[Shard]) -> list[str]:
    """Return a line for the tokenizer, or else for the token files, whose ids the model has no rows for."""
    if identity is not None:
        problem = vocabulary_problem(f"data.tokenizer ({describe(identity)})", identity["vocab_size"], model)
        return [problem] if problem else []
    found: dict[Any, str] = {}
    for shard in shards:
        if problem := vocabulary_problem(shard.prefix, shard.tokenizer.get("vocab_size") or 0, model):
            found.setdefault(shard.tokenizer.get("hash"), problem)
    return list(found.values())


def _held_out_shards(config: RunConfig, problems: list[str]) -> list[Shard]:
    """Return the validation sets of a run; missing ones are reported when they are read."""
    if not config.evaluation.eval_interval:
        return []
    prefixes = [prefix for corpus in config.data.corpora for prefix in validation_prefixes(config, corpus, [])]
    shards, damaged = read_shards(prefixes)
    problems += damaged
    return shards


def _prompt_problems(prefixes: Sequence[str]) -> list[str]:
    forms = {prefix: read_shard_form(Path(prefix)) for prefix in prefixes}
    if not any(form.is_masked for form in forms.values()):
        return [
            "data.prompt_loss_weight has no effect: no shard of this stage has a mask. Remove it, or read shards of chats."
        ]
    return [f"{prefix} {problem}" for prefix, form in forms.items() if (problem := prompt_problem(form))]


def _sentinel_problems(config: RunConfig) -> list[str]:
    if not config.data.fim_rate or config.data.tokenizer is None:
        return []
    from megatron_cpt.data.blend.fim import fill_in_middle
    from megatron_cpt.data.tokenizer.interface import load_tokenizer  # heavy: the tokenizer library

    try:
        fill_in_middle(config, load_tokenizer(Path(data_path(config.paths, config.data.tokenizer))))
    except DataError as problem:
        return [str(problem)]
    return []


def _note(prefixes: list[str], corpus: str, what: str) -> list[str]:
    if not prefixes:
        return []
    shown = ", ".join(prefixes[:3]) + (", ..." if len(prefixes) > 3 else "")
    return [f"{len(prefixes)} shards of {corpus} give not {what}: their part of the stage is too small: {shown}"]


def _rounded_away(corpora: Sequence[CorpusPlan]) -> list[str]:
    """Return a line per requested corpus without samples."""
    return [
        f"corpus {row.corpus} gives nothing: {float(row.requested):.4g} tokens are asked of it, not one sample. Raise its "
        "share, or leave it out."
        for row in corpora
        if not row.num_samples
    ]


def _replayed(entries: Sequence[DataEntry], seq_length: int, parts: Parts) -> list[str]:
    available = {part.shard.prefix: part.available for group in parts.values() for part in group}
    return [
        f"{entry.corpus}: {entry.prefix} continues after {entry.first_sample:,} samples "
        f"({entry.first_sample * seq_length / available[entry.prefix]:.4g} epochs) of earlier stages"
        for entry in entries
        if entry.first_sample
    ]


def _target(training: TrainingConfig) -> str:
    for field in ("train_tokens", "train_samples", "train_iters"):
        amount = getattr(training, field)
        if amount is not None:
            return f"{amount:,} {field.removeprefix('train_').replace('iters', 'iterations')}"
    raise AssertionError("derived.train_iters refuses a stage without a length")


def _refuse(config: RunConfig, problems: list[str]) -> None:
    if problems:
        where = f"{config.task}/{config.params}/{config.size}/{config.variant}"
        what = "a problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise DataError(f"{where}: the blend has {what}:" + "".join(f"\n  - {problem}" for problem in problems))
