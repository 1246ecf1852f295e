"""The plan of a stage's blend, and the table of it that people read."""

import os
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from megatron_cpt.data.blend.sources import Part, Parts
from megatron_cpt.data.blend.stage_order import StageOrder
from megatron_cpt.data.lists.entry import DataEntry
from megatron_cpt.log import format_count

_MOST_ROWS = 40
"""Shards without a corpus that have a row each in the table; of more, each folder has one."""


@dataclass(frozen=True, kw_only=True)
class CorpusPlan:
    """Amounts of one corpus in a stage."""

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
    """Input of training: tokens, prefix and corpus of each shard; the tokens sum to `train_tokens`."""
    order: StageOrder
    """In which order it reads them."""
    num_samples: list[int]
    """Samples of each entry; they sum to the stage's samples, each within one of its tokens / seq_length."""
    corpora: list[CorpusPlan]
    train_tokens: int
    train_samples: int
    train_iters: int
    target: str
    """How the stage's length was stated."""
    notes: list[str]
    """Warnings, which refuse nothing."""

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


def align(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows as lines with aligned columns: the first to the left, the others to the right."""
    widths = [max(_columns(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        first = row[0] + " " * (widths[0] - _columns(row[0]))
        others = [" " * (width - _columns(cell)) + cell for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join([first, *others]))
    return lines


def corpus_plans(
    parts: Parts,
    shares: Mapping[str, Fraction],
    taken: Mapping[str, int],
    entries: Sequence[DataEntry],
    samples: Sequence[int],
    total: int,
) -> list[CorpusPlan]:
    """Return a row per corpus; shards without one have a row each, or where they are many one per folder."""
    counts = dict.fromkeys(parts, 0)
    for entry, count in zip(entries, samples, strict=True):
        counts[entry.corpus or entry.prefix] += count
    unnamed = {corpus for corpus, group in parts.items() if is_unnamed(corpus, group)}
    top = os.path.commonpath([os.path.dirname(prefix) for prefix in unnamed]) if unnamed else ""
    rows: dict[str, list[str]] = {}
    for corpus in parts:
        label = corpus
        if corpus in unnamed:
            path = os.path.dirname(corpus) if len(unnamed) > _MOST_ROWS else corpus
            label = os.path.relpath(path, top) if top else path
        rows.setdefault(label, []).append(corpus)
    return [
        CorpusPlan(
            corpus=label,
            available=sum(part.available for corpus in members for part in parts[corpus]),
            requested=total * sum((shares[corpus] for corpus in members), Fraction(0)),
            taken=sum(taken[corpus] for corpus in members),
            num_samples=sum(counts[corpus] for corpus in members),
            share=Fraction(sum(taken[corpus] for corpus in members), total),
        )
        for label, members in rows.items()
    ]


def is_unnamed(corpus: str, group: Sequence[Part]) -> bool:
    """Return whether a corpus is a shard of a list that names no corpus."""
    return len(group) == 1 and group[0].shard.prefix == corpus


def _columns(text: str) -> int:
    """Return how many columns of a terminal a text takes: Chinese and Japanese letters take two."""
    return sum(1 + (unicodedata.east_asian_width(letter) in "WF") for letter in text)
