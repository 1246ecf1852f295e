"""A list of available tokens and a budget become a list of tokens to draw, by rules, in exact arithmetic.

Each shard follows the first rule that names it:

- `ratio r`: r times its tokens, `ceil(tokens * r)`; with a budget, ratios state proportions instead.
- `epochs e`: exactly `ceil(tokens * e)`, independent of the budget.
- `share s`: its group gets s of the budget, split by size.
- `weight w`: its group gets w parts of the budget that epochs and shares leave, split by size.

Two pools (`base`, `base_ratio`) split the budget first; the rules then apply within each pool. A cap limits the
repetitions of a shard; the excess is distributed to the others of its pool in proportion.
"""

import fnmatch
import glob
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal

from megatron_cpt.data.lists.budget import apportion, scale_tokens
from megatron_cpt.data.lists.entry import DataEntry, join_repeated, shard_path
from megatron_cpt.errors import DataError

_TOLERANCE = Fraction(1, 10**9)


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How much of the shards that `pattern` names is drawn."""

    pattern: str
    """A corpus's name, a glob over prefixes, or a part of the prefix."""
    kind: Literal["ratio", "epochs", "share", "weight"]
    value: Fraction
    is_corpus: bool = False
    """The pattern is a corpus's name only, never a part of a path."""

    def names(self, entry: DataEntry) -> bool:
        """Return whether the rule is about this shard."""
        if self.pattern == entry.corpus or self.is_corpus:
            return self.pattern == entry.corpus
        is_glob = glob.has_magic(self.pattern)
        return fnmatch.fnmatchcase(entry.prefix, self.pattern if is_glob else f"*{glob.escape(self.pattern)}*")


def rescale(
    entries: Sequence[DataEntry],
    rules: Sequence[Rule],
    budget: int | None = None,
    *,
    base: str | None = None,
    base_ratio: Fraction | None = None,
    cap: Fraction | None = None,
) -> list[DataEntry]:
    """Return the entries with the tokens to draw; with a budget they sum to it exactly. Entries that get 0 are left out.

    `entries` carry the available tokens. Without rules every shard counts by its size.

    Raises: DataError when a shard has no token count or no rule, or when the rules cannot meet the budget.
    """
    missing = [entry.prefix for entry in entries if entry.tokens is None]
    if missing:
        raise DataError(f"{missing[0]}: no token count. A budget needs available tokens; list them with `blend list`.")
    corpora = {entry.corpus for entry in entries}
    rules = [
        # a corpus's name is that corpus: D1 is not a part of the paths of D10 then
        replace(rule, is_corpus=rule.is_corpus or rule.pattern in corpora)
        for rule in rules or [Rule(pattern="*", kind="ratio", value=Fraction(1))]
    ]
    base_rule = Rule(pattern=base or "", kind="ratio", value=Fraction(1), is_corpus=base in corpora)
    is_base = [base_rule.names(entry) for entry in entries]
    _check(entries, rules, budget, base, base_ratio, cap, is_base)
    if base is None or base_ratio is None or budget is None:
        amounts = _draw(entries, rules, budget, cap)
    else:
        budgets = apportion(budget, [base_ratio, 1 - base_ratio])
        amounts = [0] * len(entries)
        for pool, pool_budget in ((True, budgets[0]), (False, budgets[1])):
            members = [index for index, flag in enumerate(is_base) if flag is pool]
            try:
                drawn = _draw([entries[index] for index in members], rules, pool_budget, cap)
            except DataError as problem:
                raise DataError(f"the {'base' if pool else 'other'} pool ({pool_budget:,} tokens): {problem}") from None
            for index, amount in zip(members, drawn, strict=True):
                amounts[index] = amount
    return [replace(entry, tokens=amount) for entry, amount in zip(entries, amounts, strict=True) if amount]


def mix_lists(lists: Sequence[tuple[Fraction, Sequence[DataEntry]]]) -> list[DataEntry]:
    """Return the entries of several lists with weights `w' = (w / sum of its list) * (W / sum of all W)`, exactly.

    Source: AuroraGPT's CPT cookbook, mix_datasets.py, which rounds the result to six decimals.
    """
    sum_global = sum((weight for weight, _ in lists), Fraction(0))
    mixed: list[DataEntry] = []
    for weight, entries in lists:
        amounts = [entry.amount for entry in entries]
        if None in amounts:
            raise DataError(f"{entries[amounts.index(None)].prefix}: no weight. Mixing needs one in every line.")
        total = sum((amount for amount in amounts if amount is not None), Fraction(0))
        mixed += [
            replace(entry, tokens=None, weight=(entry.amount or 0) / total * weight / sum_global) for entry in entries
        ]
    return join_repeated(mixed, "the mixed lists")


def _check(
    entries: Sequence[DataEntry],
    rules: Sequence[Rule],
    budget: int | None,
    base: str | None,
    base_ratio: Fraction | None,
    cap: Fraction | None,
    is_base: Sequence[bool],
) -> None:
    problems = [f"{rule.kind} {rule.value} of {rule.pattern}: negative." for rule in rules if rule.value < 0]
    prefixes = Counter(shard_path(entry.prefix) for entry in entries)
    if repeated := [path.removesuffix(".bin") for path, count in prefixes.items() if count > 1]:
        problems.append(
            f"{len(repeated)} shards are named more than once ({', '.join(repeated[:3])}). Name each with its tokens once."
        )
    if cap is not None and cap <= 0:
        problems.append(f"the cap is {float(cap):g} epochs. It must be positive.")
    if budget is not None and budget <= 0:
        problems.append(f"the budget is {budget:,} tokens. It must be positive.")
    first = [next((rule for rule in rules if rule.names(entry)), None) for entry in entries]
    unnamed = [entry.prefix for entry, rule in zip(entries, first, strict=True) if rule is None]
    if unnamed:
        problems.append(f"no rule names {len(unnamed)} shards ({', '.join(unnamed[:3])}). Add a last rule for '*'.")
    used = set(first)
    idle = [rule.pattern for rule in rules if rule not in used]
    if idle:
        problems.append(f"no shard is left for {', '.join(idle)}. Correct the pattern, or move the rule up.")
    if budget is None and any(rule.kind in ("share", "weight") for rule in rules):
        problems.append("shares and weights need a budget. State one, such as 50B.")
    if (base is None) != (base_ratio is None) or (base is not None and budget is None):
        problems.append("two pools need a base, its ratio and a budget.")
    if base is not None and base_ratio is not None:
        if len(set(is_base)) < 2:
            problems.append(f"the base {base} holds all shards or none. Two pools need shards on both sides.")
        if not 0 <= base_ratio <= 1:
            problems.append(f"the base ratio is {base_ratio}. It lies between 0 and 1.")
    if problems:
        raise DataError("rescale: " + " ".join(problems))


def _draw(entries: Sequence[DataEntry], rules: Sequence[Rule], budget: int | None, cap: Fraction | None) -> list[int]:
    """Return the tokens of each entry of one pool."""
    owners = [next(rule for rule in rules if rule.names(entry)) for entry in entries]
    available = [entry.tokens or 0 for entry in entries]
    fixed = {
        index: scale_tokens(available[index], rule.value)
        for index, rule in enumerate(owners)
        if rule.kind == "epochs" or (rule.kind == "ratio" and budget is None)
    }
    if budget is None:
        return [_limit(fixed[index], available[index], cap) for index in range(len(entries))]
    sizes: dict[Rule, int] = dict.fromkeys(owners, 0)
    for owner, amount in zip(owners, available, strict=True):
        sizes[owner] += amount
    targets = _group_targets(sizes, budget, sum(fixed.values()))
    per_token = {rule: targets.get(rule, Fraction(0)) / size if size else Fraction(0) for rule, size in sizes.items()}
    relative = [
        Fraction(0) if index in fixed else per_token[owner] * available[index] for index, owner in enumerate(owners)
    ]
    rest = budget - sum(fixed.values())
    if any(relative):
        drawn = _fill(relative, available, rest, cap)
    elif rest:
        raise DataError(f"rescale: epochs give {budget - rest:,} of {budget:,} tokens and nothing else is stated.")
    else:
        drawn = [0] * len(entries)
    return [fixed.get(index, drawn[index]) for index in range(len(entries))]


def _group_targets(sizes: Mapping[Rule, int], budget: int, fixed: int) -> dict[Rule, Fraction]:
    """Return the tokens of each group that shares and weights (and ratios, as one group of their own) ask for.

    `sizes` are the available tokens of each rule's shards.
    """
    used = list(sizes)
    targets = {rule: rule.value * budget for rule in used if rule.kind == "share"}
    rest = budget - fixed - sum(targets.values(), Fraction(0))
    weights = {rule: rule.value for rule in used if rule.kind == "weight"}
    ratios = {rule: rule.value * sizes[rule] for rule in used if rule.kind == "ratio"}
    if weights and ratios:
        raise DataError("rescale: weights and ratios both ask for the rest of the budget. Use one of them.")
    parts = weights or ratios
    total = sum(parts.values(), Fraction(0))
    if rest < -_TOLERANCE * budget or (not total and rest > _TOLERANCE * budget and targets):
        stated = float((budget - rest) / budget)
        raise DataError(f"rescale: shares and epochs make up {stated:g} of the budget. They must make up 1.")
    return targets | {rule: max(rest, Fraction(0)) * part / total for rule, part in parts.items() if total}


def _fill(relative: Sequence[Fraction], available: Sequence[int], total: int, cap: Fraction | None) -> list[int]:
    """Return whole amounts that sum to `total` in proportion to `relative`, none above `cap` epochs."""
    limits = [total if cap is None else int(cap * amount) for amount in available]
    amounts = [0] * len(relative)
    open_ones = [index for index, part in enumerate(relative) if part]
    if cap is not None and sum(limits[index] for index in open_ones) < total:
        most = sum(limits[index] for index in open_ones)
        raise DataError(
            f"rescale: {total:,} tokens are asked of shards that give {most:,} at {float(cap):g} epochs at most. "
            "Lower the budget or raise the cap."
        )
    rest = total
    while open_ones and rest:
        shares = apportion(rest, [relative[index] for index in open_ones])
        full = [index for index, share in zip(open_ones, shares, strict=True) if share >= limits[index]]
        if not any(share > limits[index] for index, share in zip(open_ones, shares, strict=True)):
            for index, share in zip(open_ones, shares, strict=True):
                amounts[index] = share
            return amounts
        for index in full:
            amounts[index] = limits[index]
            rest -= limits[index]
        closed = set(full)
        open_ones = [index for index in open_ones if index not in closed]
    return amounts


def _limit(amount: int, available: int, cap: Fraction | None) -> int:
    return amount if cap is None else min(amount, int(cap * available))
