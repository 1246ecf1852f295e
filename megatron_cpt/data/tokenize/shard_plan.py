"""Which sources make which output shard: one for all, one per file, or groups of about a target token count.

The plan is a function of the inputs and the tokenizer alone, so that a rerun, and every member of a job array, comes to
the same one without talking to the others.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_cpt.data.reading.documents import Source, plain_name
from megatron_cpt.data.reading.grouping import even_groups, groups_of, packed_share
from megatron_cpt.data.reading.streams import Layout, parse_piece, pieces_of
from megatron_cpt.data.tokenizer.interface import Tokenizer
from megatron_cpt.errors import DataError

_SAMPLED_FILES = 8
_SAMPLE_BYTES = 1 << 18


@dataclass(frozen=True, kw_only=True)
class ShardPlan:
    """One output shard: `<base>_<key>_document.bin/.idx/.json` for each json key."""

    base: Path
    sources: tuple[Source, ...]

    def prefix(self, key: str) -> Path:
        """Return the shard's prefix for a json key."""
        return self.base.with_name(f"{self.base.name}_{key}_document")


def plan_one(output_prefix: Path, sources: Sequence[Source], part: tuple[int, int] | None) -> list[ShardPlan]:
    """Return the shard that holds all sources, or for `part` (i, n) the i-th of n runs of sources of similar size.

    The parts `<prefix>-00003-of-00008` joined in order equal the one shard.
    """
    if part is None:
        return [ShardPlan(base=output_prefix, sources=tuple(sources))]
    number, count = part
    total = sum(source.size for source in sources)
    chosen = []
    before = 0
    for source in sources:
        middle = before + source.size / 2
        if min(int(middle * count / max(total, 1)), count - 1) == number:
            chosen.append(source)
        before += source.size
    base = output_prefix.with_name(f"{output_prefix.name}-{number:05d}-of-{count:05d}")
    return [ShardPlan(base=base, sources=tuple(chosen))]


def plan_tree(
    output_dir: Path,
    sources: Sequence[Source],
    target_bytes: float | None,
    part: tuple[int, int] | None,
    *,
    num_shards: int | None = None,
    is_across_folders: bool = False,
) -> list[ShardPlan]:
    """Return shards below `output_dir` that mirror the input tree: one per file, or groups of about `target_bytes`.

    Files are grouped within their folder, or over all folders, in order, and never cut; `num_shards`: into so many groups of
    similar size over all folders. `part` (i, n) leaves every n-th shard from the i-th
    on, counted in the order of size, so that the members of a job array have similar work.
    """
    plans = []
    folders: dict[Path, list[Source]] = {}
    for source in sources:
        folder = output_dir if num_shards or is_across_folders else output_dir / source.relative.parent
        folders.setdefault(folder, []).append(source)
    for folder, members in folders.items():
        if num_shards:
            groups = even_groups(members, num_shards)
        else:
            groups = [[source] for source in members] if target_bytes is None else groups_of(members, target_bytes)
        for number, group in enumerate(groups):
            if target_bytes is None and not num_shards:
                name = plain_name(group[0].relative.name)
            else:
                name = f"{'shard' if folder == output_dir else folder.name}-{number:05d}"
            plans.append(ShardPlan(base=folder / name, sources=tuple(group)))
    _check_unique(plans)
    if part is None:
        return plans
    by_size = sorted(range(len(plans)), key=lambda i: (-sum(source.size for source in plans[i].sources), i))
    chosen = set(by_size[part[0] :: part[1]])
    return [plan for i, plan in enumerate(plans) if i in chosen]


def tokens_per_byte(sources: Sequence[Source], tokenizer: Tokenizer, layout: Layout) -> float:
    """Return an estimate of tokens per byte on disk, from the first 256 KB of text of up to eight files."""
    step = max(len(sources) // _SAMPLED_FILES, 1)
    tokens = text_bytes = 0.0
    for source in sources[::step][:_SAMPLED_FILES]:
        with_text = next(iter(pieces_of(source, 0, layout, _SAMPLE_BYTES)), None)
        if with_text is None or not source.size:
            continue
        parsed = parse_piece(with_text, layout)
        found = sum(len(ids) for texts in parsed.texts for ids in tokenizer.encode_batch(texts[:200]))
        share = min(200 / max(len(parsed.lines), 1), 1)
        tokens += found
        text_bytes += (with_text.end - with_text.start) * share * packed_share(source)
    return tokens / text_bytes if tokens and text_bytes else 0.25


def _check_unique(plans: Sequence[ShardPlan]) -> None:
    seen: dict[Path, ShardPlan] = {}
    for plan in plans:
        other = seen.setdefault(plan.base, plan)
        if other is not plan:
            raise DataError(
                f"{plan.sources[0].path} and {other.sources[0].path}: would both become {plan.base}. "
                "Outputs need different names. Exclude one, or give --shard-tokens."
            )
