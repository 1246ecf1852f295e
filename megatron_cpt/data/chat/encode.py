"""Pieces of conversations become ids and masks: what one worker of `data prepare-chat` does.

The template's own text is encoded without added special tokens (a beginning-of-text token stands there once if the template
writes it), and every document ends with the end-of-document token exactly once. Completion data is learned whole, its
end-of-document token included, as in pre-training.
"""

import datetime
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_cpt.data.chat.masks import Tokenized, UnclearTemplate, render_with_spans, tokens_of, turn_end_of
from megatron_cpt.data.chat.template import ChatTemplate, TemplateRefusal, load_template
from megatron_cpt.data.cleaning.sample import field_text, parse_condition
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
from megatron_cpt.data.shards.masked import LEARNED, PIECE
from megatron_cpt.data.tokenizer.interface import HuggingFaceTokenizer, load_tokenizer
from megatron_cpt.errors import DataError

ON_LONG = ("truncate", "drop", "fail")
REFUSED = "refused by the template"
UNCLEAR = "template does not tell the assistant's part"
CONTROL_TOKEN = "control token in a message"
TOO_MANY_TOKENS = "conversation too long"
_BATCH_CHARACTERS = 1 << 19


@dataclass(frozen=True, kw_only=True)
class ChatJob:
    """What every worker needs to know; all of it can travel between processes."""

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
    """Conditions of which none may hold."""
    seed: int = 42
    held_out_by: str | None = None
    train_on: str = "assistant"
    train_on_eos: str = "turn"
    max_length: int | None = None
    """Longest conversation in tokens, end-of-document token included."""
    on_long: str = "truncate"


@dataclass(frozen=True, kw_only=True)
class Survey:
    """The good records of a piece, by what decides where they go; arrays are [records]."""

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
    """What of a piece goes to one shard."""

    ids: list[np.ndarray] = field(default_factory=list)
    masks: list[np.ndarray] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    """conversations, texts, truncated, bytes, and `turns <role>`."""


@dataclass(frozen=True, kw_only=True)
class EncodedPiece:
    """What a piece gave: parts by shard number, and what is wrong with the rest."""

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
        special = {id: token.content for id, token in added.items() if token.special}
        self.special_ids = np.array(sorted(special), dtype=np.int64)
        self._control = re.compile("|".join(map(re.escape, sorted(special.values()))) or r"(?!)")
        where, drop = [*map(parse_condition, job.where)], [*map(parse_condition, job.drop)]
        self._holds = lambda record: all(test(record) for test in where) and not any(test(record) for test in drop)

    def turn_end(self) -> str | None:
        """Return what ends an assistant's turn: empty where no special token does, None where a trial is refused."""
        trial = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        try:
            page = self._render(trial)
        except _Unfit:
            return None
        encoding = self.tokenizer.backend.encode(page.text, add_special_tokens=False)
        return turn_end_of(page, encoding, self.special_ids)

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
            for (shard, conversation), document in zip(batch, self._encode_batch(batch, found), strict=True):
                if document is not None:
                    _add(parts.setdefault(shard, EncodedPart()), conversation, document)
        found.problems.sort(key=lambda problem: problem.line)
        return EncodedPiece(
            source=piece.source,
            num_lines=found.num_lines,
            parts=parts,
            notes=found.notes,
            problems=found.problems,
        )

    def encode_one(self, conversation: Conversation) -> Tokenized | None:
        """Return one conversation or text as `encode` does; None where it is left out."""
        (document,) = self._encode_batch([(0, conversation)], PieceRecords())
        return None if document is None else document.tokens

    def _encode_batch(self, batch: Sequence[tuple[int, Conversation]], found: PieceRecords) -> list["_Document | None"]:
        documents: list[_Document | None] = []
        rendered = []
        for _, conversation in batch:
            try:
                rendered.append(self._render(conversation.turns) if conversation.turns else None)
            except _Unfit as problem:
                rendered.append(None)
                found.problems.append(
                    Problem(conversation.line, problem.kind, problem.detail, raw_line(conversation.record))
                )
                conversation.turns, conversation.text = [], ""
        texts = [page.text if page else chat.text for page, (_, chat) in zip(rendered, batch, strict=True)]
        encodings = self.tokenizer.backend.encode_batch(texts, add_special_tokens=False)
        for page, text, encoding, (_, conversation) in zip(rendered, texts, encodings, batch, strict=True):
            if page is not None:
                tokens = self._tokens(page, encoding)
                documents.append(self._fitted(conversation, tokens, len(text.encode()), found))
            elif text:
                documents.append(
                    _Document(_completion(encoding.ids, self.tokenizer.eod_id), [], False, len(text.encode()))
                )
            else:
                documents.append(None)
        return documents

    def _render(self, turns: Sequence[dict[str, str]]) -> Any:
        for number, turn in enumerate(turns, 1):
            if token := self._control.search(turn["content"]):
                raise _Unfit(CONTROL_TOKEN, f"{token[0]} in turn {number} would end or open a turn")
        try:
            return render_with_spans(self.template, turns)
        except TemplateRefusal as problem:
            raise _Unfit(REFUSED, str(problem)) from None
        except UnclearTemplate as problem:
            raise _Unfit(UNCLEAR, f"{self.template.name} {problem}") from None

    def _tokens(self, page: Any, encoding: Any) -> Tokenized:
        return tokens_of(
            page,
            encoding,
            self.special_ids,
            self.tokenizer.eod_id,
            train_on_eos=self.job.train_on_eos,
            train_on_all=self.job.train_on == "all",
        )

    def _fitted(
        self, conversation: Conversation, tokens: Tokenized, num_bytes: int, found: PieceRecords
    ) -> "_Document | None":
        """Return the conversation within the longest length: whole, or up to the last assistant turn that fits."""
        limit, turns = self.job.max_length, conversation.turns
        if limit is None or len(tokens.ids) <= limit:
            return _Document(tokens, turns, False, num_bytes)
        whole = len(tokens.ids)
        if self.job.on_long == "truncate":
            answers = [number for number, turn in enumerate(turns) if turn["role"] == "assistant"]
            for answer, turn_end in reversed([*zip(answers, tokens.turn_ends, strict=True)][:-1]):
                if turn_end > limit:
                    continue
                shorter = turns[: answer + 1]
                try:
                    page = self._render(shorter)
                except _Unfit:
                    continue
                cut = self._tokens(page, self.tokenizer.backend.encode(page.text, add_special_tokens=False))
                if len(cut.ids) <= limit:
                    return _Document(cut, shorter, True, len(page.text.encode()))
        detail = f"{whole:,} tokens; {limit:,} fit"
        found.problems.append(Problem(conversation.line, TOO_MANY_TOKENS, detail, raw_line(conversation.record)))
        return None


class _Unfit(Exception):
    def __init__(self, kind: str, detail: str):
        super().__init__(kind, detail)
        self.kind, self.detail = kind, detail


@dataclass(frozen=True)
class _Document:
    tokens: Tokenized
    turns: Sequence[dict[str, str]]
    is_truncated: bool
    num_bytes: int


def _batches(chosen: list[tuple[int, Conversation]]) -> list[list[tuple[int, Conversation]]]:
    batches: list[list[tuple[int, Conversation]]] = [[]]
    size = 0
    for item in chosen:
        length = len(item[1].text) + sum(len(turn["content"]) for turn in item[1].turns)
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


def _add(part: EncodedPart, conversation: Conversation, document: _Document) -> None:
    part.ids.append(document.tokens.ids)
    part.masks.append(document.tokens.mask)
    part.lines.append(conversation.line)
    part.counts["conversations" if document.turns else "texts"] += 1
    part.counts["truncated"] += document.is_truncated
    part.counts["bytes"] += document.num_bytes
    part.counts.update(f"turns {turn['role']}" for turn in document.turns)
