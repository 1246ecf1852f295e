"""Spans of the assistant's turns in a rendered conversation, derived from the template itself.

If the template marks them (`{% generation %}`), its marks are used; several blocks of one answer are merged, as in
transformers. Otherwise the conversation is rendered once unchanged and once with placeholders for the assistant's
content; the differences are the assistant's spans. Since whole conversations are compared, never beginnings of one, a
template that writes earlier turns otherwise once a later one follows (reasoning left out, the system prompt moved to
the last user turn) comes out right. If the placeholders do not identify a turn uniquely, the conversation is refused.

A turn begins where the prompt for it (`add_generation_prompt`) ends, so that what a model has to write before its
answer (a space, an empty block of reasoning, the head of a tool call) is learned as well. A turn's end is the
template's text after the answer, up to and including the last special token, even if it is several tokens. Text in the
same form after every turn is the end of every turn. A turn with another continuation has no end. A text without special
tokens that the template writes after each answer is an end too; the end-of-document token then follows the last one.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from megatron_cpt.data.chat.template import CLOSE, OPEN, STAND_IN, ChatTemplate, Reads
from megatron_cpt.data.reading.turns import ASSISTANT, REASONING, Turn, reasoning_of, strings_of, text_of

Span = tuple[int, int]


class UnclearTemplate(Exception):
    """The template does not determine the span of an assistant's turn; the message names the turn."""


@dataclass
class Said:
    """Content of one turn, as characters [start, end) of the text."""

    turn: int
    """Number of the turn in its conversation, from 0."""
    spans: list[Span]
    """Spans of the content, ascending, without the end of the turn."""
    ends: list[Span] = field(default_factory=list)
    """Spans of the end of the turn, ascending; empty without an end."""

    @property
    def end(self) -> int:
        """End of the turn."""
        return max((end for _, end in [*self.spans, *self.ends]), default=0)


@dataclass(frozen=True)
class Rendered:
    """A conversation as text."""

    turns: Sequence[Turn]
    """The turns as they were given to the template."""
    text: str
    answers: list[Said]
    """Spans of the assistant, one turn each, ascending."""
    others: list[Said] = field(default_factory=list)
    """Spans of the additionally requested turns."""
    contents: dict[int, tuple[int, Span]] = field(default_factory=dict)
    """For the requested turns: the position of character 0 of the content, and the part of the content that is in the
    text."""
    is_ended: bool = True
    """Whether the text itself ends the last turn."""
    reads: Reads = field(default_factory=Reads)


def render_with_spans(
    template: ChatTemplate,
    turns: Sequence[Turn],
    *,
    variables: Mapping[str, Any] | None = None,
    special: Sequence[str] = (),
    others: Sequence[int] = (),
    contents: Sequence[int] = (),
) -> Rendered:
    """Return the text of a conversation that ends with an assistant turn, and the assistant's spans in it.

    `special` are the tokenizer's special tokens, which end turns. `others` are turns of somebody else whose words are wanted
    too, `contents` those whose content's place is.

    Raises: UnclearTemplate; TemplateRefusal from the template.
    """
    # The noncharacters mark places in the rendered text. One in a message would be taken for a mark.
    said = itertools.chain.from_iterable(map(strings_of, [*turns, dict(variables or {})]))
    if any(mark in text for text in said for mark in (OPEN, CLOSE, STAND_IN)):
        raise UnclearTemplate("a message holds a noncharacter of Unicode (U+FDD0 to U+FDD2)")
    render = partial(template.render, variables=variables)
    reads = Reads()
    raw = render(turns, reads=reads)
    page = _Page(render, turns, raw.replace(OPEN, "").replace(CLOSE, ""), tuple(special))
    answers = _marked(raw, turns, reads, page) if template.marks_generation else _unmarked(page)
    tail = page.text[answers[-1].spans[-1][1] :] if answers else ""
    return Rendered(
        turns=turns,
        text=page.text,
        answers=answers,
        others=[_other(page, number, answers) for number in others],
        contents={number: _content(page, number) for number in contents},
        is_ended=bool(_special_end(tail, page.special)) or bool(answers and _ends_special(page, answers[-1])),
        reads=reads,
    )


def is_history_rewritten(
    template: ChatTemplate, rendered: Rendered, variables: Mapping[str, Any] | None = None
) -> bool:
    """Return whether an earlier answer is written otherwise than when it was the last: so the model never writes it."""
    for said in rendered.answers[:-1]:
        before = (
            template.render(rendered.turns[: said.turn + 1], variables=variables).replace(OPEN, "").replace(CLOSE, "")
        )
        # Compared up to the last word: what follows an answer differs whenever a turn follows.
        end = max((end for _, end in said.spans), default=0)
        if before[:end] != rendered.text[:end]:
            return True
    return False


def lost_reasoning(turn: Turn, text: str) -> bool:
    """Return whether the reasoning of a turn, in a field of its own or before `</think>`, is missing from a text."""
    reasoning = reasoning_of(turn)
    if not reasoning and "</think>" in (content := text_of(turn)):
        reasoning = content.split("</think>")[0].split("<think>")[-1]
    return bool(reasoning.strip()) and reasoning.strip() not in text


@dataclass
class _Page:
    """A conversation under work: how to render variants of it, its text, the special tokens."""

    render: Any
    turns: Sequence[Turn]
    text: str
    special: tuple[str, ...]

    def plain(self, turns: Sequence[Turn], **options: Any) -> str:
        """Return a variant's text without marks of generation."""
        text: str = self.render(turns, **options)
        return text.replace(OPEN, "").replace(CLOSE, "")


def _marked(raw: str, turns: Sequence[Turn], reads: Reads, page: _Page) -> list[Said]:
    """Return what the template marks, the blocks of an answer together."""
    head, *marked = raw.split(OPEN)
    length, found = len(head), []
    for part in marked:
        inside, close, outside = part.partition(CLOSE)
        if not close:
            raise UnclearTemplate("generation blocks are nested")
        found.append((length, length + len(inside)))
        length += len(inside) + len(outside)
    if len(reads.blocks) != len(found):
        raise UnclearTemplate("generation blocks are written more than once")
    answers = [number for number, turn in enumerate(turns) if turn["role"] == ASSISTANT]
    owners = [_owner(turns, reads, first, last) for first, last in reads.blocks]
    # One block per answer leaves no doubt, whatever else the block reads.
    if len(found) == len(answers) and None in owners:
        owners = list(answers)
    if None in owners:
        raise UnclearTemplate(
            f"{len(found)} generation blocks for {len(answers)} assistant turns, one of them with what another says"
        )
    if owners != sorted(owner for owner in owners if owner is not None):
        raise UnclearTemplate("generation blocks are in another order than the turns")
    said = []
    for number in answers:
        # An answer can have several blocks: Phi 3's form marks the stop token of the conversation in one of its own
        # (tests/data/chat_families.py).
        spans = [span for span, owner in zip(found, owners, strict=True) if owner == number and span[1] > span[0]]
        if spans:
            said.append(_without_ends(Said(number, spans), page))
    return said


def _owner(turns: Sequence[Turn], reads: Reads, first: int, last: int) -> int | None:
    """Return the assistant's turn that a generation block writes: the first that it looks at, else the last one before.

    None if it writes another speaker's content; reading only the role of another turn is allowed.
    """
    within = reads.touched[first:last]
    found = next((number for number, _ in within if turns[number]["role"] == ASSISTANT), None)
    if found is not None:
        return found
    if any(key not in ("", "role") for _, key in within):
        return None
    return next((number for number, _ in reversed(reads.touched[:first]) if turns[number]["role"] == ASSISTANT), None)


def _without_ends(said: Said, page: _Page) -> Said:
    """Return a turn whose closing special tokens, and white space around them, are among its ends."""
    spans, ends = list(said.spans), list[Span]()
    while spans:
        start, end = spans.pop()
        cut = _cut(page.text, start, end, page.special)
        if cut < end:
            ends.insert(0, (cut, end))
        if cut > start:
            spans.append((start, cut))
            break
    return Said(said.turn, spans or [(said.spans[0][0], said.spans[0][0])], ends)


def _unmarked(page: _Page) -> list[Said]:
    answers = [number for number, turn in enumerate(page.turns) if turn["role"] == ASSISTANT]
    if all(_is_plain(page.turns[number]) for number in answers):
        said = _plain_answers(page, answers)
    else:
        said = _rich_answers(page, answers)
    if any(before.end > after.spans[0][0] for before, after in itertools.pairwise(said)):
        raise UnclearTemplate("assistant turns overlap")
    return said


def _is_plain(turn: Turn) -> bool:
    """Whether a turn consists of its content only."""
    return isinstance(turn.get("content"), str) and not turn.get("tool_calls") and not reasoning_of(turn)


def _plain_answers(page: _Page, answers: Sequence[int]) -> list[Said]:
    prompt = page.plain(page.turns[:-1], add_generation_prompt=True)
    # One rendering for all answers where that is unambiguous, else one rendering for each.
    spans = _spans_of_all(page, answers) or [_span_of_one(page, number, prompt) for number in answers]
    tail = page.text[spans[-1][1] :]
    spans = _from_prompt(page, spans, prompt)
    return [_ended(page, number, span, tail) for number, span in zip(answers, spans, strict=True)]


def _rich_answers(page: _Page, answers: Sequence[int]) -> list[Said]:
    """Return the spans of answers with reasoning or tool calls: from each answer's prompt to its end."""
    said = []
    for number in answers:
        prompt = page.plain(page.turns[:number], add_generation_prompt=True)
        first, last = _span_of_one(page, number, prompt)
        end = last + _rich_end(page, number, page.text[last:])
        cut = _cut(page.text, last, end, page.special)
        start = min(first, _head(page, number, first, prompt))
        said.append(Said(number, [(start, cut)], [(cut, end)] if end > cut else []))
    return said


def _rich_end(page: _Page, number: int, tail: str) -> int:
    """Return how far a turn extends after its last word into `tail`, the text that follows, as if it were the last
    turn."""
    if number == len(page.turns) - 1:
        return _special_end(tail, page.special) or len(tail.rstrip())
    turns = page.turns[: number + 1]
    alone = page.plain([*turns[:-1], _stood_in(turns[-1])]).rpartition(STAND_IN)[2]
    common = _common(alone, tail)
    if end := _special_end(common, page.special):
        return end
    if len(common) >= len(alone.rstrip()):
        return len(alone.rstrip())
    if page.turns[number].get("tool_calls"):
        raise UnclearTemplate(f"ends turn {number + 1} otherwise where others follow")
    return 0


def _head(page: _Page, number: int, start: int, prompt: str) -> int:
    """Return the start of a turn with its first word at `start`: the end of its prompt."""
    has_prompt = prompt != page.plain(page.turns[:number])
    if has_prompt and len(prompt) <= start and page.text.startswith(prompt):
        return len(prompt)
    alone = page.plain([*page.turns[:number], _stood_in(page.turns[number])]).partition(STAND_IN)[0]
    lead = alone.removeprefix(prompt)
    if alone.startswith(prompt) and page.text.endswith(lead, 0, start) and (has_prompt or not lead.strip()):
        return start - len(lead)
    # where the template has no prompt, the head of an answer of text alone tells
    bare = {"role": ASSISTANT, "content": STAND_IN}
    before, found, _ = page.plain([*page.turns[:number], bare, *page.turns[number + 1 :]]).partition(STAND_IN)
    return len(_common(before, page.text[:start])) if found else start


def _spans_of_all(page: _Page, answers: Sequence[int]) -> list[Span] | None:
    """Return the spans by one more rendering, with a placeholder for every answer; None if the result is ambiguous.

    It is unambiguous if the literal parts around the placeholders, joined with the answers (unchanged or trimmed),
    equal the text.
    """
    parts = page.plain(
        [_stood_in(turn) if number in answers else turn for number, turn in enumerate(page.turns)]
    ).split(STAND_IN)
    if len(parts) != len(answers) + 1:
        return None
    contents = [text_of(page.turns[number]) for number in answers]
    # Templates write a content as it is or trimmed (Llama 3's trims).
    for trim in (str, str.strip, str.rstrip, str.lstrip):
        found, position, whole = [], 0, []
        for part, content in zip(parts, map(trim, contents), strict=False):
            position += len(part)
            found.append((position, position + len(content)))
            position += len(content)
            whole += [part, content]
        if "".join([*whole, parts[-1]]) == page.text:
            return found
    return None


def _span_of_one(page: _Page, number: int, prompt: str) -> Span:
    """Return the words of one turn, from the first to the last: the differences after placeholders replace them."""
    turn, text = page.turns[number], page.text
    parts = page.plain([*page.turns[:number], _stood_in(turn), *page.turns[number + 1 :]]).split(STAND_IN)
    # A turn with calls has a stand-in for each of its texts. The content of a plain turn must occur exactly once.
    if len(parts) < 2 or (_is_plain(turn) and len(parts) != 2):
        raise UnclearTemplate(f"writes turn {number + 1} {len(parts) - 1} times")
    before, after = parts[0], parts[-1]
    if number == len(page.turns) - 1 and text.startswith(prompt) and not text.startswith(before):
        before = prompt
    if not (text.startswith(before) and text.endswith(after) and len(before) + len(after) <= len(text)):
        raise UnclearTemplate(f"writes the rest of the conversation otherwise according to what turn {number + 1} says")
    return len(before), len(text) - len(after)


def _stood_in(turn: Turn) -> Turn:
    """Return a turn with a placeholder for each of its words: content, reasoning, names and arguments of calls."""
    stood = dict(turn)
    content = turn.get("content")
    if isinstance(content, list):
        stood["content"] = [{"type": "text", "text": STAND_IN}]
    elif content is not None and (content or _is_plain(turn)):
        stood["content"] = STAND_IN
    stood |= {key: STAND_IN for key in REASONING if turn.get(key)}
    if "tool_calls" in turn:
        stood["tool_calls"] = [_call_stood_in(call) for call in turn["tool_calls"]]
    return stood


def _call_stood_in(call: Turn) -> Turn:
    inner = call.get("function", call)
    inner = inner | {"name": STAND_IN}
    if "arguments" in inner:
        inner = inner | {"arguments": _texts_stood_in(inner["arguments"])}
    return call | {"function": inner} if "function" in call else inner


def _texts_stood_in(value: Any) -> Any:
    """Return a value with a placeholder for each text in it: a number written as text would be rendered differently."""
    if isinstance(value, str):
        return STAND_IN
    if isinstance(value, Mapping):
        return {key: _texts_stood_in(item) for key, item in value.items()}
    return [_texts_stood_in(item) for item in value] if isinstance(value, list) else value


def _from_prompt(page: _Page, spans: list[Span], prompt: str) -> list[Span]:
    """Let each span start where the prompt for it ends, as it does for the last turn, whose prompt is known.

    A template without `add_generation_prompt` does not determine the text before an answer, except white space.
    """
    text, lead_start, lead_end = page.text, len(prompt), spans[-1][0]
    if not text.startswith(prompt) or lead_start >= lead_end:
        return spans
    lead = text[lead_start:lead_end]
    if lead.strip() and page.plain(page.turns[:-1]) == prompt:
        return spans
    return [(start - len(lead) if text.endswith(lead, 0, start) else start, end) for start, end in spans]


def _other(page: _Page, number: int, answers: Sequence[Said]) -> Said:
    """Return the content of another speaker's turn; its end is that of the assistant's turns if it ends in the same
    way."""
    start, end = _span_of_one(page, number, "")
    closing = next((page.text[said.ends[0][0] : said.ends[-1][1]] for said in answers if said.ends), "")
    has_end = bool(closing.strip()) and page.text.startswith(closing, end)
    return Said(number, [(start, end)], [(end, end + len(closing))] if has_end else [])


def _content(page: _Page, number: int) -> tuple[int, Span]:
    """Return where the content of a turn would begin in the text, and the part of the text that it is."""
    content = text_of(page.turns[number])
    turn = page.turns[number] | {"content": STAND_IN}
    before, found, after = page.plain([*page.turns[:number], turn, *page.turns[number + 1 :]]).partition(STAND_IN)
    trimmed = content.strip()
    place = page.text.find(trimmed, len(before), len(page.text) - len(after)) if found else -1
    if place < 0 or not page.text.startswith(before):
        raise UnclearTemplate(f"does not write the content of turn {number + 1} as it is")
    return place - (len(content) - len(content.lstrip())), (place, place + len(trimmed))


def _ended(page: _Page, number: int, span: Span, tail: str) -> Said:
    """Return a plain answer with its end, where it ends as the last one does, whose `tail` is known."""
    common = _common(tail, page.text[span[1] : span[1] + len(tail)])
    if not _special_end(tail, page.special) and tail.strip():
        length = len(tail.rstrip()) if len(common) >= len(tail.rstrip()) else 0
    else:
        length = _special_end(common, page.special)
    return Said(number, [span], [(span[1], span[1] + length)] if length else [])


def _special_end(tail: str, special: tuple[str, ...]) -> int:
    """Return where the last special token of a text ends; 0 where there is none."""
    return max((place + len(token) for token in special if (place := tail.rfind(token)) >= 0), default=0)


def _ends_special(page: _Page, said: Said) -> bool:
    return any(_special_end(page.text[start:end], page.special) for start, end in said.ends)


def _cut(text: str, start: int, end: int, special: tuple[str, ...]) -> int:
    """Return where the special tokens at the end of [start, end) begin, white space between and after them included."""
    cut = position = end
    while True:
        position = start + len(text[start:position].rstrip())
        token = next((token for token in special if text.endswith(token, start, position)), None)
        if token is None:
            return cut
        cut = position = position - len(token)


def _common(one: str, other: str) -> str:
    """Return the beginning that two texts share, by halving: both may be long."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return one[:low]
