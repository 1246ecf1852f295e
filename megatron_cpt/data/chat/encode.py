"""Encode pieces of conversations to ids and masks: the work of one worker of `data prepare-chat`.

The template's own text is encoded without added special tokens (a beginning-of-text token occurs once if the template
writes it), and every document ends with the end-of-document token exactly once. Completion data is learned whole, its
end-of-document token included, as in pre-training.
"""

import datetime
import logging
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_cpt.data.chat.masks import (
    Rendered,
    UnclearTemplate,
    is_history_rewritten,
    lost_reasoning,
    render_with_spans,
)
from megatron_cpt.data.chat.template import ChatTemplate, TemplateRefusal, load_template
from megatron_cpt.data.chat.tokens import Learned, Tokenized, tokens_of
from megatron_cpt.data.cleaning.sample import condition_field, field_text, parse_condition
from megatron_cpt.data.reading.conversations import (
    ChatLayout,
    Conversation,
    PieceRecords,
    draw_of,
    prompt_hash,
    raw_line,
    read_piece,
)
from megatron_cpt.data.reading.records import Problem
from megatron_cpt.data.reading.streams import Piece
from megatron_cpt.data.reading.turns import (
    ASSISTANT,
    REASONING,
    ROLES,
    TOO_DEEP,
    Mark,
    Turn,
    is_empty,
    strings_of,
    text_of,
)
from megatron_cpt.data.shards.masked import LEARNED, PIECE
from megatron_cpt.data.tokenizer.interface import HuggingFaceTokenizer, load_tokenizer
from megatron_cpt.errors import DataError

logger = logging.getLogger(__name__)

ON_LONG = ("truncate", "drop", "fail")
REFUSED = "refused by the template"
UNCLEAR = "template does not tell the assistant's part"
CONTROL_TOKEN = "control token in a message"
TOO_MANY_TOKENS = "conversation too long"
NOT_READ = "the template does not read it"
NOTHING_LEARNED = "nothing is learned"
REWRITTEN = "history written otherwise"
EMPTY_ANSWER = "empty answer kept"
LOST_REASONING = "reasoning left out of the last answer"
TRAIN_ON = ("assistant", "last", "all")
ESSENTIAL = ("content", "tool_calls", *REASONING, "functions", "function_calls", "tool_responses")
"""Keys of a turn that contain content: a template that does not read one would lose it."""
_BATCH_CHARACTERS = 1 << 19


@dataclass(frozen=True, kw_only=True)
class ChatJob:
    """Settings of every worker; all can be pickled."""

    tokenizer_path: Path
    layout: ChatLayout = field(default_factory=ChatLayout)
    eod_token: str | None = None
    template_path: Path | None = None
    template_text: str | None = None
    """The template itself, instead of a file."""
    template_variables: tuple[tuple[str, Any], ...] = ()
    date: datetime.date | None = None
    where: tuple[str, ...] = ()
    """Conditions of `data sample` that must all hold."""
    drop: tuple[str, ...] = ()
    """Conditions that must all be false."""
    seed: int = 42
    held_out_by: str | None = None
    train_on: str = "assistant"
    unroll: bool = False
    """Make a document of each answer: the conversation up to it, the answer learned."""
    train_on_eos: str = "turn"
    max_length: int | None = None
    """Longest conversation in tokens, end-of-document token included."""
    on_long: str = "truncate"


@dataclass(frozen=True, kw_only=True)
class Survey:
    """The good records of a piece, with the values that decide their shard; arrays are [records]."""

    source: int
    num_lines: int
    is_chat: np.ndarray
    prompts: np.ndarray
    """Hash of the prompt, uint64 [records, 2]."""
    draws: np.ndarray
    values: list[str]
    """Value of the field by which validation sets are held out."""


@dataclass
class EncodedPart:
    """The part of a piece that belongs to one shard."""

    ids: list[np.ndarray] = field(default_factory=list)
    masks: list[np.ndarray] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    """conversations, texts, truncated, bytes, `turns <role>`, `unread turn <key>`, `unread record <field>`, `given <field>`."""


@dataclass(frozen=True, kw_only=True)
class EncodedPiece:
    """Result of a piece: parts by shard number, and the problems of the other records."""

    source: int
    num_lines: int
    parts: dict[int, EncodedPart]
    notes: Counter[str]
    problems: list[Problem]


class ChatEncoder:
    """Surveys and encodes pieces. Raises: DataError when tokenizer or template cannot be used."""

    def __init__(self, job: ChatJob):
        self.job = job
        tokenizer = load_tokenizer(job.tokenizer_path, job.eod_token)
        if not isinstance(tokenizer, HuggingFaceTokenizer):
            raise DataError(
                f"{job.tokenizer_path}: is a SentencePiece model, which does not say where tokens lie in a text. "
                "Conversations need the fast tokenizer's tokenizer.json (AutoTokenizer.from_pretrained(...) saves it)."
            )
        from tokenizers.processors import TemplateProcessing  # heavy: a compiled library

        self.tokenizer = tokenizer
        # Byte-level post-processors trim white space off the offsets; without added tokens they do nothing else.
        tokenizer.backend.post_processor = TemplateProcessing(single="$A", pair="$A $B", special_tokens=[])
        variables = dict(job.template_variables)
        if job.template_text is None:
            self.template = load_template(job.tokenizer_path, job.template_path, variables, job.date)
        else:
            self.template = ChatTemplate(job.template_text, variables, "the template in the manifest", job.date)
        added = tokenizer.backend.get_added_tokens_decoder()
        special = {token.content for token in added.values() if token.special}
        self.special = tuple(sorted(special, key=lambda token: (-len(token), token)))
        self._control = re.compile("|".join(map(re.escape, self.special)) or r"(?!)")
        where, drop = [*map(parse_condition, job.where)], [*map(parse_condition, job.drop)]
        self._holds = lambda record: all(test(record) for test in where) and not any(test(record) for test in drop)
        named = [*(condition_field(text) for text in (*job.where, *job.drop)), job.held_out_by or ""]
        self._named = {part for name in named for part in (name, name.partition(".")[0])}

    def turn_end(self) -> str | None:
        """Return what ends an assistant's turn: empty where no special token does, None where a trial is refused.

        Warns where a model would not learn to end its turns.
        """
        trial: list[Turn] = [{"role": "user", "content": "a"}, {"role": ASSISTANT, "content": "b"}]
        try:
            page = self._render(self.template.fitted(trial), {})
        except _Unfit:
            return None
        if not page.answers or not page.is_ended:
            logger.warning(
                "%s: ends no answer with a special token of the tokenizer, so that a model learns to stop only at the end of a "
                "conversation (end-of-document token). Use a tokenizer with the template's control tokens",
                self.template.name,
            )
            return ""
        said = page.answers[-1]
        if not said.ends:
            logger.warning(
                "%s: its generation blocks leave out what ends an answer (%r), so that a model does not learn to stop. Move "
                "the end into the block",
                *(self.template.name, page.text[said.end :].strip()),
            )
        return "".join(page.text[start:end] for start, end in said.ends)

    def survey(self, piece: Piece) -> Survey:
        """Return what decides where the records of a piece go."""
        found = read_piece(piece, self.job.layout, self._holds)
        chats = [conversation.turns for conversation in found.conversations]
        hashes = b"".join(prompt_hash(turns) if turns else bytes(16) for turns in chats)
        by = self.job.held_out_by
        return Survey(
            source=piece.source,
            num_lines=found.num_lines,
            is_chat=np.array([bool(turns) for turns in chats], dtype=bool),
            prompts=np.frombuffer(hashes, dtype=">u8").astype(np.uint64).reshape(-1, 2),
            draws=np.array([draw_of(turns, self.job.seed) if turns else 0 for turns in chats], dtype=np.uint64),
            values=[field_text(chat.record, by) if by else "" for chat in found.conversations],
        )

    def encode(self, piece: Piece, fates: np.ndarray | None) -> EncodedPiece:
        """Return the ids and masks of a piece; `fates` is the shard of each good record (negative: none), None: 0."""
        found = read_piece(piece, self.job.layout, self._holds)
        if fates is not None and len(fates) != len(found.conversations):
            raise DataError(f"{piece.path}: changed while it was read. Run the command again when it is at rest.")
        chosen = [
            (0 if fates is None else int(fates[number]), conversation)
            for number, conversation in enumerate(found.conversations)
            if fates is None or fates[number] >= 0
        ]
        parts: dict[int, EncodedPart] = {}
        for batch in _batches(chosen):
            for (shard, conversation), documents in zip(batch, self._encode_batch(batch, found), strict=True):
                if documents:
                    _add(parts.setdefault(shard, EncodedPart()), conversation, documents)
        found.problems.sort(key=lambda problem: problem.line)
        return EncodedPiece(
            source=piece.source,
            num_lines=found.num_lines,
            parts=parts,
            notes=found.notes,
            problems=found.problems,
        )

    def encode_one(self, conversation: Conversation) -> list[Tokenized]:
        """Return the documents of one conversation or text as `encode` does; none where it is left out."""
        (documents,) = self._encode_batch([(0, conversation)], PieceRecords())
        return [document.tokens for document in documents]

    def _encode_batch(self, batch: Sequence[tuple[int, Conversation]], found: PieceRecords) -> list[list["_Document"]]:
        planned: list[list[_Page]] = []
        for _, conversation in batch:
            try:
                try:
                    planned.append(self._pages(conversation, found.notes) if conversation.turns else [])
                except RecursionError:
                    raise _Unfit(TOO_DEEP, "what the record gives the template") from None
            except _Unfit as problem:
                planned.append([])
                found.problems.append(
                    Problem(conversation.line, problem.kind, problem.detail, raw_line(conversation.record))
                )
                # Encodings are matched to texts by order alone: a record that is left out must add no text below.
                conversation.turns, conversation.text = [], ""
        texts = [
            text
            for pages, (_, chat) in zip(planned, batch, strict=True)
            for text in ([page.rendered.text for page in pages] or ([chat.text] if chat.text else []))
        ]
        encodings = iter(self.tokenizer.backend.encode_batch(texts, add_special_tokens=False))
        documents: list[list[_Document]] = []
        for pages, (_, chat) in zip(planned, batch, strict=True):
            if pages:
                fitted = [self._fitted(chat, page, next(encodings), found) for page in pages]
                documents.append([document for document in fitted if document is not None])
            elif chat.text:
                tokens = _completion(next(encodings).ids, self.tokenizer.eod_id)
                documents.append([_Document(tokens, [], False, len(chat.text.encode()), Counter())])
            else:
                documents.append([])
        return documents

    def _pages(self, conversation: Conversation, notes: Counter[str]) -> list["_Page"]:
        """Return the texts of a conversation, one per document that it becomes. Raises: _Unfit."""
        turns = self.template.fitted(conversation.turns)
        variables, counts = self._variables(conversation)
        plans = _plans(turns, conversation.marks, self.job)
        if not plans:
            raise _Unfit(NOTHING_LEARNED, "no turn that counts is marked as learned")
        pages = [self._page(plan, variables) for plan in plans]
        # Every document of an unrolled conversation is a beginning of the last one, so keys, marks and notes are
        # counted there, once per conversation.
        last = pages[-1]
        for number, turn in enumerate(last.turns):
            read = last.rendered.reads.keys[number] | self.template.reasoning
            counts.update(f"unread turn {key}" for key in _unread(turn, read, number))
        for turn, mark in zip(turns, conversation.marks, strict=True):
            counts["mark learned"] += mark.is_learned is True
            counts["mark not learned"] += mark.is_learned is False
            notes[EMPTY_ANSWER] += turn["role"] == ASSISTANT and is_empty(turn)
        notes[LOST_REASONING] += lost_reasoning(last.turns[-1], last.rendered.text)
        # `last` and --unroll learn an answer only where it ends the text, as the model writes it.
        if self.job.train_on == "assistant" and not self.job.unroll:
            notes[REWRITTEN] += self._is_rewritten(last, variables)
        pages[0].counts.update(counts)
        return pages

    def _page(self, plan: "_Plan", variables: dict[str, Any]) -> "_Page":
        turns, learned = plan
        named = [*learned.turns, *learned.never]
        others = [number for number in named if turns[number]["role"] != ASSISTANT]
        rendered = self._render(turns, variables, others, [*learned.details])
        if not rendered.answers:
            raise _Unfit(NOTHING_LEARNED, "the template marks nothing as generated")
        return _Page(rendered.turns, learned, rendered, variables)

    def _is_rewritten(self, page: "_Page", variables: dict[str, Any]) -> bool:
        try:
            return is_history_rewritten(self.template, page.rendered, variables)
        except TemplateRefusal:
            return False

    def _variables(self, conversation: Conversation) -> tuple[dict[str, Any], Counter[str]]:
        """Return the record's fields for its template other than the turns, and counts of passed and unread fields."""
        counts: Counter[str] = Counter()
        found = dict(conversation.variables)
        counts.update(
            f"unread record {name}"
            for name in ("tools", "documents")
            if name in found and name not in self.template.names
        )
        options = found.pop("chat_template_kwargs", {})
        counts.update(
            f"unread record chat_template_kwargs.{name}" for name in options if name not in self.template.names
        )
        fields = {}
        for name, value in conversation.record.items():
            if value is None or name in conversation.used:
                continue
            if name in self.template.parameters and name not in self.job.layout.ignored_keys:
                fields[name] = value
            elif name not in self._named:
                counts[f"unread record {name}"] += 1
        counts.update(f"given {name}" for name in fields)
        return {**fields, **options, **found}, counts

    def _render(
        self, turns: Sequence[Turn], variables: dict[str, Any], others: Sequence[int] = (), contents: Sequence[int] = ()
    ) -> Rendered:
        for number, turn in enumerate(turns, 1):
            if token := next((token for text in strings_of(turn) if (token := self._control.search(text))), None):
                raise _Unfit(CONTROL_TOKEN, f"{token[0]} in turn {number} would end or open a turn")
        if token := next((token for text in strings_of(variables) if (token := self._control.search(text))), None):
            raise _Unfit(CONTROL_TOKEN, f"{token[0]} in what the record gives the template")
        try:
            return self._rendered(turns, variables, others, contents)
        except TemplateRefusal as problem:
            raise _Unfit(REFUSED, str(problem)) from None
        except UnclearTemplate as problem:
            raise _Unfit(UNCLEAR, f"{self.template.name} {problem}") from None

    def _rendered(
        self, turns: Sequence[Turn], variables: dict[str, Any], others: Sequence[int], contents: Sequence[int]
    ) -> Rendered:
        options: dict[str, Any] = {"variables": variables, "special": self.special}
        options |= {"others": others, "contents": contents}
        try:
            return render_with_spans(self.template, turns, **options)
        except TemplateRefusal:
            if all("content" in turn for turn in turns):
                raise
            # a turn that only calls tools has no content, which some templates take only as an empty one
            return render_with_spans(self.template, [{"content": ""} | turn for turn in turns], **options)

    def _fitted(
        self, conversation: Conversation, page: "_Page", encoding: Any, found: PieceRecords
    ) -> "_Document | None":
        """Return the conversation within the longest length: whole, or up to the last assistant turn that fits."""
        limit, turns = self.job.max_length, page.turns
        tokens = tokens_of(page.rendered, encoding, self.tokenizer.eod_id, page.learned)
        if limit is None or len(tokens.ids) <= limit:
            return _Document(tokens, turns, False, len(page.rendered.text.encode()), page.counts)
        whole = len(tokens.ids)
        if self.job.on_long == "truncate" and not self.job.unroll:
            answers = [said.turn for said in page.rendered.answers]
            # `turn_ends` are places in the whole text. A shorter conversation is rendered again and measured,
            # because a template can write its last answer longer (reasoning that it drops from earlier ones).
            for answer, turn_end in reversed([*zip(answers, tokens.turn_ends, strict=True)][:-1]):
                if turn_end > limit:
                    continue
                plans = _plans(turns[: answer + 1], conversation.marks[: answer + 1], self.job)
                try:
                    shorter = self._page(plans[-1], page.variables) if plans else None
                except _Unfit:
                    continue
                if shorter is None:
                    continue
                text = shorter.rendered.text
                cut = tokens_of(
                    shorter.rendered,
                    self.tokenizer.backend.encode(text, add_special_tokens=False),
                    self.tokenizer.eod_id,
                    shorter.learned,
                )
                if len(cut.ids) <= limit:
                    return _Document(cut, shorter.turns, True, len(text.encode()), page.counts)
        detail = f"{whole:,} tokens; {limit:,} fit"
        found.problems.append(Problem(conversation.line, TOO_MANY_TOKENS, detail, raw_line(conversation.record)))
        return None


class _Unfit(Exception):
    def __init__(self, kind: str, detail: str):
        super().__init__(kind, detail)
        self.kind, self.detail = kind, detail


_Plan = tuple[Sequence[Turn], Learned]


@dataclass(frozen=True)
class _Page:
    """A document as text: its turns, what of it is learned, and where that is."""

    turns: Sequence[Turn]
    learned: Learned
    rendered: Rendered
    variables: dict[str, Any]
    counts: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class _Document:
    tokens: Tokenized
    turns: Sequence[Turn]
    is_truncated: bool
    num_bytes: int
    counts: Counter[str]


def _plans(turns: Sequence[Turn], marks: Sequence[Mark], job: ChatJob) -> list[_Plan]:
    """Return the turns of each document of a conversation, and its learned parts; none if nothing is learned."""
    answers = [number for number, turn in enumerate(turns) if turn["role"] == ASSISTANT]
    refused = {number for number, mark in enumerate(marks) if mark.is_learned is False}
    asked = {number for number, mark in enumerate(marks) if mark.is_learned and turns[number]["role"] != ASSISTANT}
    details = {number: mark.details for number, mark in enumerate(marks) if mark.details is not None}

    def plan(wanted: set[int], last: int, *, everything: bool = False) -> _Plan:
        learned = Learned(
            turns=sorted(wanted - refused),
            details={number: spans for number, spans in details.items() if number in wanted},
            train_on_eos=job.train_on_eos,
            everything=everything,
            never=sorted(refused) if everything else (),
        )
        return turns[: last + 1], learned

    if job.train_on == "all":
        return [plan({*answers, *asked}, len(turns) - 1, everything=True)]
    if job.unroll:
        firsts = [-1, *answers]
        wanted = [{answer, *(n for n in asked if first < n < answer)} for first, answer in zip(firsts, answers)]
        return [plan(each, max(each)) for each in wanted if max(each) not in refused]
    wanted_answers = answers[-1:] if job.train_on == "last" else answers
    whole = plan({*wanted_answers, *asked}, len(turns) - 1)
    return [whole] if whole[1].turns else []


def _unread(turn: Turn, read: set[str], number: int) -> list[str]:
    """Return the keys of a turn that a template did not read. Raises: _Unfit if one of them has content."""
    unread = [key for key in turn if key != "role" and key not in read]
    if not read.isdisjoint(REASONING):
        unread = [key for key in unread if key not in REASONING]
    for key in unread:
        if key in ESSENTIAL and (text_of(turn) if key == "content" else turn[key]):
            advice = "" if key == "content" else f", or --ignore-keys {key}"
            raise _Unfit(NOT_READ, f"{key} of turn {number + 1}, a {turn['role']}'s. Choose another template{advice}")
    return [key for key in unread if key not in ESSENTIAL]


def _batches(chosen: list[tuple[int, Conversation]]) -> list[list[tuple[int, Conversation]]]:
    batches: list[list[tuple[int, Conversation]]] = [[]]
    size = 0
    for item in chosen:
        length = len(item[1].text) + sum(len(text_of(turn)) for turn in item[1].turns)
        if batches[-1] and size + length > _BATCH_CHARACTERS:
            batches.append([])
            size = 0
        batches[-1].append(item)
        size += length
    return batches


def _completion(ids: Sequence[int], eod_id: int) -> Tokenized:
    whole = np.array([*ids, *([] if ids and ids[-1] == eod_id else [eod_id])], dtype=np.int64)
    mask = np.full(len(whole), LEARNED, dtype=np.uint8)
    mask[0] |= PIECE
    return Tokenized(whole, mask, [])


def _add(part: EncodedPart, conversation: Conversation, documents: Sequence[_Document]) -> None:
    last = documents[-1]
    part.counts["conversations" if last.turns else "texts"] += 1
    part.counts.update(f"turns {ROLES[turn['role']]}" for turn in last.turns)
    for document in documents:
        part.ids.append(document.tokens.ids)
        part.masks.append(document.tokens.mask)
        part.lines.append(conversation.line)
        part.counts["truncated"] += document.is_truncated
        part.counts["bytes"] += document.num_bytes
        part.counts.update(document.counts)
