"""Sources of a blend's shards: `data.mix` or `data.rules` with the corpora and the replay buffer, or a data list.

All give the same: the parts of each corpus with their weight within it, and each corpus's exact share of the stage.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from types import MappingProxyType

from megatron_cpt.config.settings import derived
from megatron_cpt.config.settings.schema import RunConfig, TrainingConfig
from megatron_cpt.config.settings.values import parse_rule
from megatron_cpt.data.blend import replay
from megatron_cpt.data.lists.budget import exact
from megatron_cpt.data.lists.data_list import read_data_list
from megatron_cpt.data.lists.entry import DataEntry, join_repeated, shard_path
from megatron_cpt.data.lists.rescale import Rule, rescale
from megatron_cpt.data.shards.discovery import Shard, find_shards, read_shards
from megatron_cpt.data.shards.indexed import bin_path, idx_path, read_index
from megatron_cpt.data.shards.skip_list import kept_documents, stage_skip_list
from megatron_cpt.errors import DataError

_NONE: Mapping[str, int] = MappingProxyType({})
_SUM_TOLERANCE = Fraction(1, 10**9)


@dataclass(frozen=True, kw_only=True)
class Part:
    """One shard's part in a blend."""

    shard: Shard
    available: int
    """Its tokens without the documents that the skip list leaves out."""
    weight: Fraction
    """Its weight within its corpus."""
    first_sample: int | None = None
    """Position where drawing continues, for shards of the replay buffer."""


Parts = dict[str, list[Part]]
Shares = dict[str, Fraction]


def parts_from_mix(
    config: RunConfig,
    begun: Mapping[str, int | None],
    problems: list[str],
    estimates: Mapping[str, int] = _NONE,
) -> tuple[Parts, Shares]:
    """Return the parts and shares of `data.mix`; errors are added to `problems`.

    `estimates` are tokens of corpora that have no token files yet.

    `begun` contains the positions of a started stage, by prefix: they stay the same even if the buffer has changed
    since.
    """
    mix = {corpus: exact(share) for corpus, share in config.data.mix.items()}
    total = sum(mix.values(), Fraction(0))
    if not mix:
        problems.append("data.mix is empty and data.train_data_path is not set. State one of them.")
    problems += [
        f"data.mix.{corpus} is {share}. A share is not negative." for corpus, share in mix.items() if share < 0
    ]
    if mix and abs(total - 1) > _SUM_TOLERANCE:
        summands = " + ".join(f"{float(share):g}" for share in mix.values())
        problems.append(f"data.mix sums to {float(total):g} ({summands}). Shares must sum to 1.")
    parts = _corpus_parts(config, [name for name, share in mix.items() if share > 0], begun, problems, estimates)
    return parts, {corpus: share / total for corpus, share in mix.items() if share > 0 and total}


def parts_from_rules(config: RunConfig, begun: Mapping[str, int | None], problems: list[str]) -> tuple[Parts, Shares]:
    """Return the parts and shares that `data.rules` give of every corpus that has token files.

    The replay buffer takes part where a rule names the corpus `buffer`.
    """
    parts = available_parts(config, begun, problems)
    if problems:
        return parts, dict.fromkeys(parts, Fraction(0))
    return drawn_by_rules(config, parts, derived.train_tokens(config.training))


def available_parts(
    config: RunConfig,
    begun: Mapping[str, int | None],
    problems: list[str],
    estimates: Mapping[str, int] = _NONE,
) -> Parts:
    """Return the shards of every corpus that has token files, each weighted by its tokens, for `drawn_by_rules`."""
    data = config.data
    names = [name for name, corpus in data.corpora.items() if corpus.tokens]
    names += [replay.CORPUS] if replay.CORPUS in data.rules and replay.CORPUS not in names else []
    return _corpus_parts(config, names, begun, problems, estimates)


def drawn_by_rules(config: RunConfig, parts: Parts, budget: int) -> tuple[Parts, Shares]:
    """Return what `data.rules` draw of available parts for a stage of `budget` tokens: the parts and shares.

    Raises: DataError when the rules cannot meet the budget.
    """
    data = config.data
    found = [(corpus, part) for corpus, group in parts.items() for part in group]
    entries = [DataEntry(prefix=part.shard.prefix, tokens=part.available, corpus=corpus) for corpus, part in found]
    rules = [
        Rule(pattern=pattern, kind=kind, value=value, is_corpus=pattern in parts)  # type: ignore[arg-type]
        for pattern, (kind, value) in ((pattern, parse_rule(text)) for pattern, text in data.rules.items())
    ]
    drawn = {
        entry.prefix: Fraction(entry.tokens or 0)
        for entry in rescale(
            entries,
            rules,
            budget,
            base=data.base_pool,
            base_ratio=None if data.base_ratio is None else exact(data.base_ratio),
            cap=None if data.cap_epochs is None else exact(data.cap_epochs),
        )
    }
    total = sum(drawn.values(), Fraction(0))
    asked = {entry.prefix for entry in entries if next(rule.value for rule in rules if rule.names(entry))}
    weighted: Parts = {}
    for corpus, group in parts.items():
        weights = [drawn.get(part.shard.prefix, Fraction(0)) for part in group]
        # what is asked for and rounds away stays, so that the plan says so; a rule of 0 leaves out on purpose
        kept = [(part, weight) for part, weight in zip(group, weights, strict=True) if part.shard.prefix in asked]
        if any(weights):
            weighted[corpus] = [replace(part, weight=weight) for part, weight in kept]
        elif kept:
            weighted[corpus] = [part for part, _ in kept]
    return weighted, {
        corpus: sum((drawn.get(part.shard.prefix, Fraction(0)) for part in group), Fraction(0)) / total
        for corpus, group in weighted.items()
    }


def _corpus_parts(
    config: RunConfig,
    names: Sequence[str],
    begun: Mapping[str, int | None],
    problems: list[str],
    estimates: Mapping[str, int] = _NONE,
) -> Parts:
    """Return the shards of corpora, each weighted by its tokens; `problems` gains what is wrong with them."""
    buffer = _stage_buffer(config)
    parts: Parts = {}
    for corpus in names:
        if corpus in estimates:
            parts[corpus] = [_estimated_part(config, corpus, estimates[corpus])]
            continue
        if corpus == replay.CORPUS and corpus not in config.data.corpora:
            prefixes = _buffer_prefixes(config, buffer, begun, problems)
        elif corpus in config.data.corpora:
            prefixes = _corpus_prefixes(config, corpus, problems)
        else:
            problems.append(f"data.mix.{corpus}: no such corpus. data.corpora has {', '.join(config.data.corpora)}.")
            continue
        shards, incomplete = read_shards(prefixes)
        problems += [f"corpus {corpus}: {problem}" for problem in incomplete]
        parts[corpus] = []
        for shard, available in _without_skipped(config, shards, problems):
            position = _position(shard.prefix, config.training, buffer, begun)
            weight = Fraction(available)
            parts[corpus].append(Part(shard=shard, available=available, weight=weight, first_sample=position))
        if prefixes and not incomplete and not parts[corpus]:
            problems.append(f"corpus {corpus}: its shards hold no token.")
    problems += _shared_shards(parts) + _held_out_shards(config, parts)
    return parts


def _estimated_part(config: RunConfig, corpus: str, tokens: int) -> Part:
    """Return the part that a corpus will have once it is tokenized."""
    prefix = _resolve(config.data.corpora[corpus].tokens[0], Path(config.paths.data_dir))
    shard = Shard(prefix=prefix, tokens=tokens, documents=0, tokenizer={})
    return Part(shard=shard, available=tokens, weight=Fraction(tokens))


def parts_from_list(config: RunConfig, problems: list[str]) -> tuple[Parts, Shares]:
    """Return the parts and shares of `data.train_data_path`, whose tokens or weights state the proportions."""
    data_dir = Path(config.paths.data_dir)
    path = data_dir / (config.data.train_data_path or "")
    resolved = [replace(entry, prefix=_resolve(entry.prefix, data_dir)) for entry in read_data_list(path)]
    try:
        entries = join_repeated(resolved, str(path))
    except DataError as problem:
        problems.append(str(problem))
        entries = resolved
    parts: Parts = {}
    for entry in entries:
        shards, incomplete = read_shards([entry.prefix])
        problems += [f"{path}: {problem}" for problem in incomplete]
        for shard, available in _without_skipped(config, shards, problems):
            weight = Fraction(available) if entry.amount is None else entry.amount
            part = Part(shard=shard, available=available, weight=weight, first_sample=entry.first_sample)
            parts.setdefault(entry.corpus or shard.prefix, []).append(part)
    problems += _held_out_shards(config, parts)
    total = sum((part.weight for group in parts.values() for part in group), Fraction(0))
    if not total and not problems:
        problems.append(f"{path}: its shards hold no token.")
    shares = {corpus: sum((part.weight for part in group), Fraction(0)) / total for corpus, group in parts.items()}
    return parts, shares


def validation_prefixes(config: RunConfig, corpus: str, problems: list[str]) -> list[str]:
    """Return the held-out shards of a corpus; `problems` gains what is missing."""
    prefixes, missing = find_shards(config.data.corpora[corpus].validation, Path(config.paths.data_dir))
    problems += [f"corpus {corpus}: validation: {problem}" for problem in missing]
    return prefixes


def stage_name(config: RunConfig) -> str:
    """Return the name of a stage in the replay buffer."""
    return f"{config.task}/{config.params}/{config.size}/{config.variant}"


def buffer_path(config: RunConfig) -> Path | None:
    """Return the replay buffer's file, None where the stage has none."""
    return None if config.data.buffer is None else Path(config.paths.data_dir) / config.data.buffer


def _stage_buffer(config: RunConfig) -> replay.Buffer:
    path = buffer_path(config)
    return replay.Buffer() if path is None else replay.read_buffer(path).of_earlier_stages(stage_name(config))


def _buffer_prefixes(
    config: RunConfig, buffer: replay.Buffer, begun: Mapping[str, int | None], problems: list[str]
) -> list[str]:
    if config.data.buffer is None:
        problems.append("data.mix.buffer: data.buffer is not set. Name the buffer's file.")
        return []
    read = config.data.mix or derived.stage_corpora(config.data)
    own = {prefix for corpus in read for prefix in _corpus_prefixes(config, corpus, [])}
    if begun:
        return [prefix for prefix, position in begun.items() if position is not None and prefix not in own]
    named = set(read)
    found = [shard.prefix for shard in buffer.shards.values() if shard.corpus not in named and shard.prefix not in own]
    if not found:
        problems.append(f"data.mix.buffer: {buffer_path(config)} holds no shard that the mix does not name itself.")
    return found


def _corpus_prefixes(config: RunConfig, corpus: str, problems: list[str]) -> list[str]:
    if corpus not in config.data.corpora:
        return []
    patterns = config.data.corpora[corpus].tokens
    if not patterns:
        problems.append(f"corpus {corpus}: data.corpora.{corpus}.tokens is empty. State its token files.")
    prefixes, missing = find_shards(patterns, Path(config.paths.data_dir))
    problems += [f"corpus {corpus}: {problem}" for problem in missing]
    return prefixes


def _position(
    prefix: str, training: TrainingConfig, buffer: replay.Buffer, begun: Mapping[str, int | None]
) -> int | None:
    if prefix in begun:
        return begun[prefix]
    held = buffer.shards.get(prefix)
    return None if held is None else held.first_sample(training.seq_length)


def _without_skipped(config: RunConfig, shards: Sequence[Shard], problems: list[str]) -> list[tuple[Shard, int]]:
    """Return the shards that have tokens left after the skip list, and how many."""
    skip = stage_skip_list(config)
    found = []
    for shard in shards:
        available = shard.tokens
        if shard.prefix in skip:
            lengths = read_index(Path(shard.prefix)).sequence_lengths
            try:
                available = int(lengths[kept_documents(len(lengths), skip[shard.prefix])].sum(dtype="int64"))
            except DataError as problem:
                problems.append(f"{shard.prefix}: {problem}")
        if available:
            found.append((shard, available))
    return found


def _resolve(prefix: str, data_dir: Path) -> str:
    """Return a list's prefix below data_dir, or unchanged if only that path exists."""
    below = data_dir / prefix
    is_below = bin_path(below).exists() or idx_path(below).exists()
    return str(below) if is_below or not idx_path(Path(prefix)).exists() else prefix


def _held_out_shards(config: RunConfig, parts: Parts) -> list[str]:
    held_out = {
        shard_path(prefix): name
        for name in config.data.corpora
        for prefix in validation_prefixes(config, name, problems=[])
    }
    return [
        f"{part.shard.prefix} is in the blend and is the validation set of {held_out[path]}. A model must not train on "
        "what it is measured with. Narrow the corpus's tokens."
        for group in parts.values()
        for part in group
        if (path := shard_path(part.shard.prefix)) in held_out
    ]


def _shared_shards(parts: Parts) -> list[str]:
    owners: dict[str, list[str]] = {}
    for corpus, group in parts.items():
        for part in group:
            owners.setdefault(shard_path(part.shard.prefix), []).append(corpus)
    return [
        f"{prefix} belongs to the corpora {' and '.join(names)}. A shard belongs to one corpus, once."
        for prefix, names in owners.items()
        if len(names) > 1
    ]
