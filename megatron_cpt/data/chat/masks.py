"""Which characters, and then which tokens, of a rendered conversation the assistant says: from the template itself.

Where the template marks them (`{% generation %}`) its marks count. Elsewhere the conversation is rendered once as it is and
once with a stand-in for what the assistant says; what differs is the assistant's. Since whole conversations are compared,
never beginnings of one, a template that writes earlier turns otherwise once a later one follows (reasoning left out, the
system prompt moved to the last user turn) comes out right. Where the stand-ins leave no doubt about every turn, the
conversation is refused. A turn begins where the prompt for it (`add_generation_prompt`) ends, so that what a model has to
write before its answer (a space, an empty block of reasoning) is learned as well.

A token is learned when any of its characters is the assistant's: one that straddles a boundary is. The end of a turn is
what follows its answer up to the first special token, as the template writes it after the last answer; a turn that goes on
otherwise has none. Where no special token follows the last answer, the end-of-document token is its end.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_cpt.data.chat.template import CLOSE, OPEN, STAND_IN, ChatTemplate
from megatron_cpt.data.shards.masked import LEARNED, PIECE

TRAIN_ON_EOS = ("turn", "last", "none")


class UnclearTemplate(Exception):
    """The template does not say where an assistant's turn is; the message says which."""


@dataclass(frozen=True)
class Rendered:
    """A conversation as text."""

    text: str
    spans: list[tuple[int, int]]
    """Characters [start, end) of what the assistant says, one span per turn, ascending."""
    is_marked: bool
    """Whether the template itself marked the spans; they may hold the end of the turn then."""


@dataclass(frozen=True)
class Tokenized:
    """A conversation as tokens; `turn_ends` is the number of tokens up to the end of each assistant turn."""

    ids: np.ndarray
    mask: np.ndarray
    turn_ends: list[int]


def render_with_spans(template: ChatTemplate, turns: Sequence[dict[str, str]]) -> Rendered:
    """Return the text of a conversation that ends with an assistant turn, and what the assistant says in it.

    Raises: UnclearTemplate; TemplateRefusal from the template.
    """
    if any(mark in turn["content"] for turn in turns for mark in (OPEN, CLOSE, STAND_IN)):
        raise UnclearTemplate("a message holds a noncharacter of Unicode (U+FDD0 to U+FDD2)")
    text = template.render(turns)
    if template.marks_generation:
        return _marked(text, sum(turn["role"] == "assistant" for turn in turns))
    answers = [number for number, turn in enumerate(turns) if turn["role"] == "assistant"]
    prompt = template.render(turns[:-1], add_generation_prompt=True)
    spans = _spans_of_all(template, turns, answers, text) or [
        _span_of_one(template, turns, number, text, prompt) for number in answers
    ]
    spans = _from_prompt(template, turns, text, spans, prompt)
    if any(before[1] > after[0] for before, after in itertools.pairwise(spans)):
        raise UnclearTemplate("assistant turns overlap")
    return Rendered(text, spans, False)


def tokens_of(
    rendered: Rendered, encoding: Any, special_ids: np.ndarray, eod_id: int, *, train_on_eos: str, train_on_all: bool
) -> Tokenized:
    """Return ids and mask of a rendered conversation, ended by `eod_id` exactly once.

    `encoding` has the `ids` of the text without added tokens and their `offsets` in characters. An end-of-document token
    that is appended is learned only where it is the end of the last turn, for want of another.
    """
    ids = np.array(encoding.ids, dtype=np.int64)
    offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
    starts, ends = offsets[:, 0], offsets[:, 1]
    is_special = np.isin(ids, special_ids)
    learned = np.zeros(len(ids) + 1, dtype=bool)
    turn_ends = []
    turns, is_ended = _turns(rendered, starts, ends, is_special)
    for number, (start, content_end, turn_end) in enumerate(turns):
        with_end = train_on_eos == "turn" or (train_on_eos == "last" and number == len(turns) - 1)
        learned[:-1] |= (starts < content_end) & (ends > start)
        if not with_end:
            # the end's own tokens only: one that holds characters of the answer as well stays
            learned[:-1] &= ~((starts >= content_end) & (starts < turn_end))
        else:
            learned[:-1] |= (starts < turn_end) & (ends > content_end)
        turn_ends.append(int(np.searchsorted(starts, turn_end)))
    learned[-1] = not is_ended and train_on_eos != "none"
    ids = np.append(ids, eod_id)
    if len(ids) > 1 and ids[-2] == eod_id:
        ids, learned = ids[:-1], learned[:-1]
    if train_on_all:
        learned[:] = True
    mask = np.where(learned, LEARNED, 0).astype(np.uint8)
    mask[:1] |= PIECE
    return Tokenized(ids, mask, turn_ends)


def turn_end_of(rendered: Rendered, encoding: Any, special_ids: np.ndarray) -> str:
    """Return the text that ends an assistant's turn; empty where no special token does."""
    offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
    starts, ends = offsets[:, 0], offsets[:, 1]
    is_special = np.isin(encoding.ids, special_ids)
    _, last_end = _without_end(rendered, rendered.spans[-1], starts, ends, is_special)
    return _closing(rendered.text, last_end, starts, ends, is_special)


def _marked(text: str, num_answers: int) -> Rendered:
    spans, pieces, length = [], [], 0
    head, *marked = text.split(OPEN)
    pieces.append(head)
    length = len(head)
    for part in marked:
        inside, close, outside = part.partition(CLOSE)
        if not close:
            raise UnclearTemplate("generation blocks are nested")
        spans.append((length, length + len(inside)))
        pieces += [inside, outside]
        length += len(inside) + len(outside)
    if len(spans) != num_answers:
        raise UnclearTemplate(f"{len(spans)} generation blocks for {num_answers} assistant turns")
    return Rendered("".join(pieces), spans, True)


def _spans_of_all(
    template: ChatTemplate, turns: Sequence[dict[str, str]], answers: Sequence[int], text: str
) -> list[tuple[int, int]] | None:
    """Return the spans by one more rendering, with a stand-in for every answer; None where that leaves doubts.

    It leaves none where the literal parts around the stand-ins, with the answers (as they are or trimmed) put between,
    are the text.
    """
    parts = _with_stand_ins(template, turns, answers).split(STAND_IN)
    if len(parts) != len(answers) + 1:
        return None
    contents = [turns[number]["content"] for number in answers]
    for trim in (str, str.strip, str.rstrip, str.lstrip):
        found, position, whole = [], 0, []
        for part, content in zip(parts, map(trim, contents), strict=False):
            position += len(part)
            found.append((position, position + len(content)))
            position += len(content)
            whole += [part, content]
        if "".join([*whole, parts[-1]]) == text:
            return found
    return None


def _span_of_one(
    template: ChatTemplate, turns: Sequence[dict[str, str]], number: int, text: str, prompt: str
) -> tuple[int, int]:
    """Return the span of one answer: what differs when a stand-in takes its place."""
    parts = _with_stand_ins(template, turns, [number]).split(STAND_IN)
    if len(parts) != 2:
        raise UnclearTemplate(f"writes turn {number + 1} {len(parts) - 1} times")
    before, after = parts
    if number == len(turns) - 1 and text.startswith(prompt) and not text.startswith(before):
        before = prompt
    if not (text.startswith(before) and text.endswith(after) and len(before) + len(after) <= len(text)):
        raise UnclearTemplate(f"writes the rest of the conversation otherwise according to what turn {number + 1} says")
    return len(before), len(text) - len(after)


def _with_stand_ins(template: ChatTemplate, turns: Sequence[dict[str, str]], numbers: Sequence[int]) -> str:
    return template.render(
        [turn | {"content": STAND_IN} if number in numbers else turn for number, turn in enumerate(turns)]
    )


def _from_prompt(
    template: ChatTemplate, turns: Sequence[dict[str, str]], text: str, spans: list[tuple[int, int]], prompt: str
) -> list[tuple[int, int]]:
    """Let each span start where the prompt for it ends, as it does for the last turn, whose prompt is known.

    A template that knows no `add_generation_prompt` says nothing about what precedes an answer, beyond white space.
    """
    lead_start, lead_end = len(prompt), spans[-1][0]
    if not text.startswith(prompt) or lead_start >= lead_end:
        return spans
    lead = text[lead_start:lead_end]
    if lead.strip() and template.render(turns[:-1]) == prompt:
        return spans
    return [(start - len(lead) if text.endswith(lead, 0, start) else start, end) for start, end in spans]


def _turns(
    rendered: Rendered, starts: np.ndarray, ends: np.ndarray, is_special: np.ndarray
) -> tuple[list[tuple[int, int, int]], bool]:
    """Return (start, end of the answer, end of the turn) of each span, and whether the last turn ends in the text."""
    spans = [_without_end(rendered, span, starts, ends, is_special) for span in rendered.spans]
    closing = _closing(rendered.text, spans[-1][1], starts, ends, is_special)
    turns = []
    for (start, end), (_, marked_end) in zip(spans, rendered.spans, strict=True):
        has_end = bool(closing) and rendered.text.startswith(closing, end)
        turn_end = max(end + len(closing) if has_end else end, marked_end)
        turns.append((start, end, turn_end))
    return turns, bool(closing)


def _closing(text: str, last_end: int, starts: np.ndarray, ends: np.ndarray, is_special: np.ndarray) -> str:
    """Return what follows the last answer up to the first special token; empty where there is none."""
    following = np.flatnonzero(is_special & (starts >= last_end))
    return text[last_end : int(ends[following[0]])] if len(following) else ""


def _without_end(
    rendered: Rendered, span: tuple[int, int], starts: np.ndarray, ends: np.ndarray, is_special: np.ndarray
) -> tuple[int, int]:
    """Return a marked span without the special token at its end (and white space after it)."""
    if not rendered.is_marked:
        return span
    inside = np.flatnonzero(is_special & (starts >= span[0]) & (ends <= span[1]))
    if len(inside) and not rendered.text[int(ends[inside[-1]]) : span[1]].strip():
        return span[0], int(starts[inside[-1]])
    return span
