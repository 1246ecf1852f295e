"""The blend of a stage: how many tokens, epochs and samples each corpus and each of its shards gives.

A stage's tokens are its iterations x global_batch_size x seq_length. They are split between corpora by `data.mix`, and
a corpus's tokens over its shards in proportion to their size; or a ready data list states the proportions. All
arithmetic is in whole numbers and fractions: sums are exact. Token counts come from the shards' indexes only.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from megatron_cpt.config import derived
from megatron_cpt.config.schema import RunConfig
from megatron_cpt.data.budget import apportion, exact, spread_samples
from megatron_cpt.data.datalist import DataEntry, read_data_list
from megatron_cpt.data.indexed import bin_path, idx_path
from megatron_cpt.data.shards import Shard, find_shards, read_shards, tokenizer_problems
from megatron_cpt.errors import DataError
from megatron_cpt.log import format_count

_SUM_TOLERANCE = Fraction(1, 10**9)


@dataclass(frozen=True, kw_only=True)
class CorpusPlan:
    """What one corpus gives to a stage."""

    corpus: str
    available: int
    """Tokens in its shards."""
    requested: Fraction
    """Tokens asked for, before rounding."""
    taken: int
    """Tokens that its entries sum to."""
    num_samples: int
    """Samples that its entries sum to."""
    share: Fraction
    """Part of the stage's tokens."""

    @property
    def epochs(self) -> Fraction:
        """How often the corpus is read."""
        return Fraction(self.taken, self.available)


@dataclass(frozen=True, kw_only=True)
class BlendPlan:
    """The exact blend of one stage."""

    entries: list[DataEntry]
    """What training reads: tokens, prefix and corpus of each shard; the tokens sum to `train_tokens`."""
    num_samples: list[int]
    """Samples of each entry; they sum to the stage's samples, each within one of its tokens / seq_length."""
    corpora: list[CorpusPlan]
    train_tokens: int
    train_samples: int
    train_iters: int
    target: str
    """How the stage's length was stated."""
    notes: list[str]
    """What a reader should know though nothing is refused."""

    def table(self) -> str:
        """Return one aligned line per corpus, the totals, and the notes."""
        rows = [("corpus", "available", "requested", "taken", "epochs", "share", "samples")]
        for row in self.corpora:
            rows.append(
                (
                    row.corpus,
                    f"{row.available:,}",
                    f"{float(row.requested):,.1f}",
                    f"{row.taken:,}",
                    f"{float(row.epochs):.4g}",
                    f"{float(row.share):.4%}",
                    f"{row.num_samples:,}",
                )
            )
        available = sum(row.available for row in self.corpora)
        rows.append(("total", f"{available:,}", "", f"{self.train_tokens:,}", "", "", f"{self.train_samples:,}"))
        lines = align(rows)
        lines.append(
            f"target {self.target}: {self.train_iters:,} iterations, {self.train_samples:,} samples, "
            f"{self.train_tokens:,} tokens ({format_count(self.train_tokens)}) from {len(self.entries):,} shards"
        )
        return "\n".join(lines + [f"note: {note}" for note in self.notes]) + "\n"


def plan_blend(config: RunConfig) -> BlendPlan:
    """Return the exact blend of a stage from `data.mix` and the corpora, or from `data.train_data_path`.

    Raises: DataError with every reason at once: shares that do not sum to 1, missing or incomplete shards by name,
    shards of another tokenizer, a corpus smaller than one sequence or repeated more than `data.max_epochs` times.
    """
    problems: list[str] = []
    data_dir = Path(config.paths.data_dir)
    if config.data.train_data_path is not None:
        weighted, corpus_shares = _from_list(data_dir / config.data.train_data_path, data_dir, problems)
    else:
        weighted, corpus_shares = _from_mix(config, problems)
    shards = [shard for group in weighted.values() for shard, _ in group]
    problems += tokenizer_problems(shards, _tokenizer_identity(config)) if shards else []
    _refuse(config, problems)

    total = derived.train_tokens(config.training)
    taken = apportion(total, list(corpus_shares.values()))
    entries: list[DataEntry] = []
    notes: list[str] = []
    for (corpus, group), corpus_tokens in zip(weighted.items(), taken, strict=True):
        available = sum(shard.tokens for shard, _ in group)
        problems += _size_problems(config, corpus, available, corpus_tokens)
        tokens = apportion(corpus_tokens, [weight for _, weight in group])
        rows = list(zip(group, tokens, strict=True))
        entries += [
            DataEntry(prefix=shard.prefix, tokens=amount, corpus=corpus) for (shard, _), amount in rows if amount
        ]
        notes += _note([shard.prefix for (shard, _), amount in rows if not amount], corpus, "a whole token")
    _refuse(config, problems)

    samples = spread_samples([entry.tokens or 0 for entry in entries], derived.train_samples(config.training))
    for corpus in weighted:
        empty = [e.prefix for e, n in zip(entries, samples, strict=True) if e.corpus == corpus and n == 0]
        notes += _note(empty, corpus, "a whole sample")
    return BlendPlan(
        entries=entries,
        num_samples=samples,
        corpora=[
            CorpusPlan(
                corpus=corpus,
                available=sum(shard.tokens for shard, _ in group),
                requested=total * corpus_shares[corpus],
                taken=corpus_tokens,
                num_samples=sum(n for e, n in zip(entries, samples, strict=True) if e.corpus == corpus),
                share=Fraction(corpus_tokens, total),
            )
            for (corpus, group), corpus_tokens in zip(weighted.items(), taken, strict=True)
        ],
        train_tokens=total,
        train_samples=derived.train_samples(config.training),
        train_iters=derived.train_iters(config.training),
        target=_target(config),
        notes=notes,
    )


def align(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows as lines with aligned columns: the first to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]


_Weighted = dict[str, list[tuple[Shard, Fraction]]]


def _from_mix(config: RunConfig, problems: list[str]) -> tuple[_Weighted, dict[str, Fraction]]:
    """Return the shards of each corpus with their weight within it, and each corpus's exact share."""
    mix = {corpus: exact(share) for corpus, share in config.data.mix.items()}
    if not mix:
        problems.append("data.mix is empty and data.train_data_path is not set. State one of them.")
    problems += [
        f"data.mix.{corpus} is {share}. A share is not negative." for corpus, share in mix.items() if share < 0
    ]
    if mix and abs(sum(mix.values(), Fraction(0)) - 1) > _SUM_TOLERANCE:
        parts = " + ".join(f"{float(share):g}" for share in mix.values())
        problems.append(f"data.mix sums to {float(sum(mix.values(), Fraction(0))):g} ({parts}). Shares must sum to 1.")
    weighted: _Weighted = {}
    for corpus in [name for name, share in mix.items() if share > 0]:
        if corpus not in config.data.corpora:
            problems.append(f"data.mix.{corpus}: no such corpus. data.corpora has {', '.join(config.data.corpora)}.")
            continue
        prefixes, missing = find_shards(config.data.corpora[corpus].tokens, Path(config.paths.data_dir))
        shards, incomplete = read_shards(prefixes)
        problems += [f"corpus {corpus}: {problem}" for problem in missing + incomplete]
        if not config.data.corpora[corpus].tokens:
            problems.append(f"corpus {corpus}: data.corpora.{corpus}.tokens is empty. State its token files.")
        elif not problems and not any(shard.tokens for shard in shards):
            problems.append(f"corpus {corpus}: its shards hold no token.")
        weighted[corpus] = [(shard, Fraction(shard.tokens)) for shard in shards if shard.tokens]
    problems += _shared_shards(weighted)
    return weighted, {corpus: share / sum(mix.values(), Fraction(0)) for corpus, share in mix.items() if share > 0}


def _from_list(path: Path, data_dir: Path, problems: list[str]) -> tuple[_Weighted, dict[str, Fraction]]:
    """Return the same from a data list, whose tokens or weights state the proportions."""
    entries = read_data_list(path)
    weighted: _Weighted = {}
    for entry in entries:
        shards, incomplete = read_shards([_resolve(entry.prefix, data_dir)])
        problems += [f"{path}: {problem}" for problem in incomplete]
        for shard in shards:
            weight = Fraction(shard.tokens) if entry.amount is None else entry.amount
            weighted.setdefault(entry.corpus or shard.prefix, []).append((shard, weight))
    if len({entry.amount is None for entry in entries}) > 1:
        problems.append(f"{path}: some entries have tokens or a weight and some have none. All or none are needed.")
    total = sum((weight for group in weighted.values() for _, weight in group), Fraction(0))
    shares = {corpus: sum((weight for _, weight in group), Fraction(0)) / total for corpus, group in weighted.items()}
    return weighted, shares


def _resolve(prefix: str, data_dir: Path) -> str:
    """Return a list's prefix below data_dir, or as it stands where only that exists."""
    below = data_dir / prefix
    is_below = any(part.exists() for part in (bin_path(below), idx_path(below)))
    return str(below) if is_below or not idx_path(Path(prefix)).exists() else prefix


def _shared_shards(weighted: Mapping[str, Sequence[tuple[Shard, Fraction]]]) -> list[str]:
    owners: dict[str, list[str]] = {}
    for corpus, group in weighted.items():
        for shard, _ in group:
            owners.setdefault(shard.prefix, []).append(corpus)
    return [
        f"{prefix} belongs to the corpora {' and '.join(names)}. A shard belongs to one corpus."
        for prefix, names in owners.items()
        if len(names) > 1
    ]


def _size_problems(config: RunConfig, corpus: str, available: int, taken: int) -> list[str]:
    problems = []
    if available <= config.training.seq_length:
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


def _tokenizer_identity(config: RunConfig) -> dict[str, object] | None:
    if config.data.tokenizer is None:
        return None
    from megatron_cpt.data.tokenizer import load_tokenizer  # heavy: the tokenizer library

    return load_tokenizer(Path(config.paths.data_dir) / config.data.tokenizer).identity


def _note(prefixes: list[str], corpus: str, what: str) -> list[str]:
    if not prefixes:
        return []
    shown = ", ".join(prefixes[:3]) + (", ..." if len(prefixes) > 3 else "")
    return [f"{len(prefixes)} shards of {corpus} are too small to give {what}: {shown}"]


def _target(config: RunConfig) -> str:
    for field in ("train_tokens", "train_samples", "train_iters"):
        amount = getattr(config.training, field)
        if amount is not None:
            return f"{amount:,} {field.removeprefix('train_').replace('iters', 'iterations')}"
    raise AssertionError("derived.train_iters refuses a stage without a length")


def _refuse(config: RunConfig, problems: list[str]) -> None:
    if problems:
        where = f"{config.task}/{config.params}/{config.size}/{config.variant}"
        what = "a problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise DataError(f"{where}: the blend has {what}:" + "".join(f"\n  - {problem}" for problem in problems))
