"""Conversations in document files, and a name for everything that is wrong with one.

A record has `conversations` or `messages`, a list of turns (`data/reading/turns.py` defines their spelling). Fields of
the whole conversation are `tools` (OpenAI's older `functions`), `documents`, `chat_template_kwargs`, and a system
prompt in `system`. A record without messages but with a text field is completion data: a document, learned whole.
"""

import base64
import hashlib
import json
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from megatron_cpt.data.reading.records import (
    BLANK_LINE,
    BYTE_ORDER_MARK,
    EMPTY_TEXT,
    INVALID_UTF8,
    MISSING_KEY,
    NOT_AN_OBJECT,
    TOO_LONG,
    Problem,
    line_problem,
    object_of_line,
    value_problem,
)
from megatron_cpt.data.reading.streams import MAX_DOCUMENT_BYTES, Layout, Piece, piece_bytes
from megatron_cpt.data.reading.tables import rows_of_block
from megatron_cpt.data.reading.turns import (
    BadConversation,
    Mark,
    Turn,
    check_depth,
    from_json,
    text_of,
    turns_of,
    without_nulls,
)

MESSAGE_KEYS = ("conversations", "messages")
KEPT_FIELDS = ("tools", "functions", "documents", "chat_template_kwargs", "system")
"""Fields of a record that belong to its conversation."""
MEDIA = ("images", "image", "videos", "video", "audios", "audio")

NOT_AN_OPTION = "not what a chat template takes"
HAS_MEDIA = "images, audio or video"
FILTERED = "filtered"

_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, kw_only=True)
class ChatLayout:
    """How conversations lie in their files."""

    message_keys: tuple[str, ...] = MESSAGE_KEYS
    """The first of these that a record has holds its turns."""
    text_key: str | None = None
    """Field of completion data; None: a record without turns is a bad one."""
    max_document_bytes: int = MAX_DOCUMENT_BYTES
    on_empty_answer: str = "reject"
    """reject: a conversation with an empty answer is a bad one; learn: the model learns to say nothing; mask: it is not
    learned."""
    ignored_keys: tuple[str, ...] = ()
    """Keys of turns and fields of records that are left out."""

    def streams(self) -> Layout:
        """Return how the files are cut into pieces: whole records, a line of a .txt file each."""
        return Layout(keys=(), max_document_bytes=self.max_document_bytes)


@dataclass(slots=True)
class Conversation:
    """One good record: its turns, or the text of completion data."""

    line: int
    """Line or row, from 0 within its piece."""
    record: dict[str, Any]
    turns: list[Turn]
    """Messages with the roles system, user, assistant and tool; empty for completion data."""
    text: str = ""
    marks: list[Mark] = field(default_factory=list)
    """Turns that the record marks as learned, one value per turn."""
    variables: dict[str, Any] = field(default_factory=dict)
    """`tools`, `documents` and `chat_template_kwargs` of the conversation, those that it has."""
    used: frozenset[str] = frozenset()
    """Fields of the record that are in the above."""


@dataclass
class PieceRecords:
    """Content of a piece of a file, in order."""

    conversations: list[Conversation] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)
    num_lines: int = 0


def read_piece(
    piece: Piece, layout: ChatLayout, holds: Callable[[dict[str, Any]], bool] = lambda record: True
) -> PieceRecords:
    """Return the conversations of a piece that pass `holds`, and the problems of the others.

    Records that it does not let through are noted as filtered and not looked at further.
    """
    found = PieceRecords()
    for record, raw, problem in _records(piece, layout, found):
        line = found.num_lines
        found.num_lines += 1
        if problem is not None:
            found.problems.append(Problem(line, problem.kind, problem.detail, problem.raw))
            continue
        if record is None:
            continue
        if not holds(record):
            found.notes[FILTERED] += 1
            continue
        try:
            conversation = _conversation(line, record, layout)
        except BadConversation as bad:
            found.problems.append(Problem(line, bad.kind, bad.detail, raw or raw_line(record)))
            continue
        if conversation is None:
            found.notes[EMPTY_TEXT] += 1
        else:
            found.conversations.append(conversation)
    return found


def prompt_hash(turns: list[Turn]) -> bytes:
    """Return the hash (16 bytes) of the first user turn, in Unicode's composed form and with single spaces."""
    prompt = next((text_of(turn) for turn in turns if turn["role"] == "user"), "")
    normal = " ".join(unicodedata.normalize("NFC", prompt).split())
    return hashlib.blake2b(normal.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def draw_of(turns: list[Turn], seed: int) -> int:
    """Return the number in [0, 2^64) that a conversation draws: it depends on its turns and the seed only."""
    text = json.dumps(
        [[turn["role"], text_of(turn), *([rest] if (rest := _beyond_text(turn)) else [])] for turn in turns],
        default=str,
    )
    digest = hashlib.blake2b(text.encode(), digest_size=8, key=str(seed).encode()[:64])
    return int.from_bytes(digest.digest(), "big")


def raw_line(record: dict[str, Any]) -> bytes:
    """Return a record as a line for the reject file."""
    return json.dumps(record, ensure_ascii=False, default=_plain).encode("utf-8", "backslashreplace")


def _records(
    piece: Piece, layout: ChatLayout, found: PieceRecords
) -> Iterator[tuple[dict[str, Any] | None, bytes | None, Problem | None]]:
    """Yield (record, its line, problem) of each line; a blank line has neither record nor problem."""
    if piece.format == "table":
        data, _, problem = piece_bytes(piece, layout.max_document_bytes)
        for row in rows_of_block(data):
            for key in (*layout.message_keys, *KEPT_FIELDS):
                if key in row:
                    row[key] = without_nulls(row[key])
            yield row, None, None
    else:
        data, _, problem = piece_bytes(piece, layout.max_document_bytes)
        if piece.is_start and data.startswith(_BOM):
            found.notes[BYTE_ORDER_MARK] += 1
            data = data[len(_BOM) :]
        lines = data.split(b"\n")
        if not lines[-1]:
            lines.pop()
        for line in lines:
            yield _record(line, piece.format, layout, found)
    if problem is not None:
        yield None, None, problem


def _record(
    line: bytes, format: str, layout: ChatLayout, found: PieceRecords
) -> tuple[dict[str, Any] | None, bytes | None, Problem | None]:
    if len(line) > layout.max_document_bytes:
        return None, line, Problem(0, TOO_LONG, f"{len(line):,} bytes")
    if not line.strip():
        found.notes[BLANK_LINE] += 1
        return None, line, None
    if format == "txt":
        try:
            return {layout.text_key or "text": line.removesuffix(b"\r").decode()}, line, None
        except UnicodeDecodeError as problem:
            return None, line, Problem(0, INVALID_UTF8, f"byte {problem.start}", line)
    try:
        value = object_of_line(line)
    except (ValueError, RecursionError):
        return None, line, Problem(0, *line_problem(line), line)
    if not isinstance(value, dict):
        return None, line, Problem(0, NOT_AN_OBJECT, f"a {type(value).__name__}", line)
    return value, line, None


def _conversation(line: int, record: dict[str, Any], layout: ChatLayout) -> Conversation | None:
    """Return the conversation or document of a record; None for an empty text."""
    for key in layout.message_keys:
        if record.get(key) is not None:
            return _with_turns(line, record, key, layout)
    if layout.text_key is not None and layout.text_key in record:
        text = record[layout.text_key]
        if problem := value_problem(text):
            raise BadConversation(problem, repr(layout.text_key))
        return Conversation(line, record, [], text) if text.strip() else None
    wanted = " or ".join(map(repr, [*layout.message_keys, *([layout.text_key] if layout.text_key else [])]))
    raise BadConversation(MISSING_KEY, f"no {wanted}; the keys are {', '.join(map(repr, list(record)[:8]))}")


def _with_turns(line: int, record: dict[str, Any], key: str, layout: ChatLayout) -> Conversation:
    fields = {name: value for name, value in record.items() if value and name not in layout.ignored_keys}
    if media := next((name for name in MEDIA if name in fields), None):
        raise BadConversation(HAS_MEDIA, f"the record has {media}")
    system = fields.get("system")
    spoken = from_json(record[key])
    turns, marks = turns_of(
        spoken,
        system=system if isinstance(system, str) else None,
        on_empty_answer=layout.on_empty_answer,
        ignored=layout.ignored_keys,
    )
    variables = _variables(fields, is_sharegpt="from" in _first_turn(spoken))
    used = {key, *(name for name in KEPT_FIELDS if name in fields)} - (
        {"system"} if not isinstance(system, str) else set()
    )
    return Conversation(line, record, turns, "", marks, variables, frozenset(used))


def _first_turn(turns: Any) -> dict[str, Any]:
    first = turns[0] if isinstance(turns, list) and turns else None
    return first if isinstance(first, dict) else {}


def _variables(fields: dict[str, Any], *, is_sharegpt: bool) -> dict[str, Any]:
    """Return the record's fields for its template other than the turns. Raises: BadConversation naming what is
    something else."""
    found: dict[str, Any] = {}
    for name, kind in (("tools", list), ("functions", list), ("documents", list), ("chat_template_kwargs", dict)):
        value = from_json(fields.get(name))
        if not value or (name == "functions" and "tools" in found):
            continue
        if not isinstance(value, kind) or (kind is list and not all(isinstance(item, dict) for item in value)):
            wanted = "an object" if kind is dict else "a list of objects"
            raise BadConversation(NOT_AN_OPTION, f"{name} is not {wanted}")
        check_depth(value, name)
        # OpenAI's older functions, and LLaMA-Factory's tools, lack the object around each
        if name == "functions" or (name == "tools" and is_sharegpt):
            value = [item if "function" in item else {"type": "function", "function": item} for item in value]
        found["tools" if name == "functions" else name] = value
    return found


def _beyond_text(turn: Turn) -> dict[str, Any]:
    return {key: value for key, value in sorted(turn.items()) if key not in ("role", "content")}


def _plain(value: Any) -> str:
    return base64.b64encode(value).decode() if isinstance(value, bytes) else str(value)
