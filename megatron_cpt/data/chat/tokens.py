"""Ids and masks of rendered conversations: which tokens are learned, which are a prompt's, where turns end.

A token is learned when any of its characters is of a learned turn: one that straddles a boundary is. An end-of-document
token that is appended is learned only where it is the end of the last turn, for want of another. Tokens that are
neither the assistant's nor appended belong to a prompt (`data.prompt_loss_weight`).
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_cpt.data.chat.masks import Rendered, Said, Span
from megatron_cpt.data.shards.masked import LEARNED, PIECE, PROMPT

TRAIN_ON_EOS = ("turn", "last", "none")


@dataclass(frozen=True)
class Tokenized:
    """A conversation as tokens; `turn_ends` is the number of tokens up to the end of each assistant turn."""

    ids: np.ndarray
    mask: np.ndarray
    turn_ends: list[int]


@dataclass(frozen=True, kw_only=True)
class Learned:
    """Learned parts of a conversation."""

    turns: Collection[int]
    """Numbers of the turns whose words are learned."""
    details: Mapping[int, tuple[tuple[int, int], ...]]
    """Of some of them only these characters of the content."""
    train_on_eos: str = "turn"
    """Which ends of learned turns are: each, that of the last turn, or none."""
    everything: bool = False
    """Learn all tokens but the words of `never`."""
    never: Collection[int] = ()


def tokens_of(rendered: Rendered, encoding: Any, eod_id: int, learned: Learned) -> Tokenized:
    """Return ids and mask of a rendered conversation, ended by `eod_id` exactly once.

    `encoding` has the `ids` of the text without added tokens and their `offsets` in characters.
    """
    ids = np.array(encoding.ids, dtype=np.int64)
    offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
    starts, ends = offsets[:, 0], offsets[:, 1]
    is_said, is_learned = np.zeros(len(ids) + 1, dtype=bool), np.zeros(len(ids) + 1, dtype=bool)
    turn_ends = []

    def over(spans: list[Span]) -> np.ndarray:
        found = np.zeros(len(starts), dtype=bool)
        for start, end in spans:
            found |= (starts < end) & (ends > start)
        return found

    for number, said in enumerate([*rendered.answers, *rendered.others]):
        words, closing = over(_words(said, rendered, learned)), over(said.ends)
        with_end = learned.train_on_eos == "turn" or (learned.train_on_eos == "last" and _is_last(said, rendered))
        if said.turn in learned.turns:
            # an end's own tokens only: one that holds characters of the answer as well stays
            is_learned[:-1] |= (words | closing) if with_end else words & ~_within(starts, ends, said.ends)
        if number < len(rendered.answers):
            is_said[:-1] |= over(said.spans) | closing
            turn_ends.append(int(np.searchsorted(starts, said.end)))
    is_last_learned = bool(rendered.answers) and rendered.answers[-1].turn in learned.turns
    is_learned[-1] = not rendered.is_ended and learned.train_on_eos != "none" and is_last_learned
    is_said[-1] = True
    ids = np.append(ids, eod_id)
    if len(ids) > 1 and ids[-2] == eod_id:
        ids, is_learned, is_said = ids[:-1], is_learned[:-1], is_said[:-1]
    if learned.everything:
        is_learned[:] = True
        for said in [*rendered.answers, *rendered.others]:
            if said.turn in learned.never:
                is_learned[: len(starts)] &= ~over([*said.spans, *said.ends])
            elif said.turn in learned.details:
                is_learned[: len(starts)] &= ~over(said.spans) | over(_words(said, rendered, learned))
    mask = np.where(is_learned, LEARNED, np.where(is_said, 0, PROMPT)).astype(np.uint8)
    mask[:1] |= PIECE
    return Tokenized(ids, mask, turn_ends)


def _words(said: Said, rendered: Rendered, learned: Learned) -> list[Span]:
    """Return the learned characters of a turn without its end."""
    details = learned.details.get(said.turn)
    if details is None:
        return said.spans
    first, (begin, end) = rendered.contents[said.turn]
    return [(max(first + a, begin), min(first + b, end)) for a, b in details if first + a < end and first + b > begin]


def _is_last(said: Said, rendered: Rendered) -> bool:
    return bool(rendered.answers) and said is rendered.answers[-1]


def _within(starts: np.ndarray, ends: np.ndarray, spans: list[Span]) -> np.ndarray:
    """Return which tokens begin within the ends of a turn."""
    found = np.zeros(len(starts), dtype=bool)
    for start, end in spans:
        found |= (starts >= start) & (starts < end)
    return found
