"""Conversations in document files: two spellings, and a name for everything that is wrong with one.

A record has `conversations` or `messages`, a list of `{role, content}` (system, user, assistant) or, as ShareGPT writes,
`{from, value}` (system, human, gpt). A content is a string or a list of `{"type": "text", "text": ...}` parts. After an
optional system turn users and assistants alternate, a user first and an assistant last. A record without messages but with
a text field is completion data: a document, learned whole.
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
    NOT_TEXT,
    NULL_TEXT,
    TOO_LONG,
    Problem,
    line_problem,
    object_of_line,
    value_problem,
)
from megatron_cpt.data.reading.streams import MAX_DOCUMENT_BYTES, Layout, Piece, piece_bytes
from megatron_cpt.data.reading.tables import rows_of_block

MESSAGE_KEYS = ("conversations", "messages")
ROLES = {"system": "system", "user": "user", "assistant": "assistant", "human": "user", "gpt": "assistant"}

NOT_A_LIST = "not a list of turns"
NO_TURNS = "no turns"
NOT_A_TURN = "turn is not an object of role and content"
UNKNOWN_ROLE = "unknown role"
EMPTY_TURN = {"user": "empty prompt", "assistant": "empty answer"}
LATE_SYSTEM = "system turn is not the first"
TWO_IN_A_ROW = {"user": "two user turns in a row", "assistant": "two assistant turns in a row"}
NO_ANSWER = "no assistant turn"
STARTS_WITH_ANSWER = "begins with the assistant"
ENDS_WITH_USER = "ends with the user"
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

    def streams(self) -> Layout:
        """Return how the files are cut into pieces: whole records, a line of a .txt file each."""
        return Layout(keys=(), max_document_bytes=self.max_document_bytes)


@dataclass(slots=True)
class Conversation:
    """One good record: its turns, or the text of completion data."""

    line: int
    """Line or row, from 0 within its piece."""
    record: dict[str, Any]
    turns: list[dict[str, str]]
    """`{"role": system|user|assistant, "content": text}` each; empty for completion data."""
    text: str = ""


@dataclass
class PieceRecords:
    """What a piece of a file holds, in order."""

    conversations: list[Conversation] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)
    num_lines: int = 0


class BadConversation(Exception):
    """What is wrong with a conversation: kind and detail."""

    def __init__(self, kind: str, detail: str = ""):
        super().__init__(kind, detail)
        self.kind, self.detail = kind, detail


def read_piece(
    piece: Piece, layout: ChatLayout, holds: Callable[[dict[str, Any]], bool] = lambda record: True
) -> PieceRecords:
    """Return the conversations of a piece that `holds` lets through, and what is wrong with the others.

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


def turns_of(value: Any) -> list[dict[str, str]]:
    """Return the turns of a conversation with the roles system, user and assistant; an empty system prompt is none.

    Raises: BadConversation naming what is wrong and where (turns are counted from 1).
    """
    if not isinstance(value, list):
        raise BadConversation(NOT_A_LIST, f"a {type(value).__name__}")
    if not value:
        raise BadConversation(NO_TURNS)
    turns: list[dict[str, str]] = []
    for number, message in enumerate(value, 1):
        role, content = _turn(message, number)
        if role == "system" and number == 1 and not content.strip():
            continue
        if role == "system" and number > 1:
            raise BadConversation(LATE_SYSTEM, f"turn {number}")
        if turns and role == turns[-1]["role"]:
            raise BadConversation(TWO_IN_A_ROW[role], f"turns {number - 1} and {number}")
        if role == "assistant" and (not turns or turns[-1]["role"] == "system"):
            raise BadConversation(STARTS_WITH_ANSWER)
        if not content.strip():
            raise BadConversation(EMPTY_TURN[role], f"turn {number}")
        turns.append({"role": role, "content": content})
    if not any(turn["role"] == "assistant" for turn in turns):
        raise BadConversation(NO_ANSWER)
    if turns[-1]["role"] != "assistant":
        raise BadConversation(ENDS_WITH_USER)
    return turns


def prompt_hash(turns: list[dict[str, str]]) -> bytes:
    """Return the hash (16 bytes) of the first user turn, in Unicode's composed form and with single spaces."""
    prompt = next(turn["content"] for turn in turns if turn["role"] == "user")
    normal = " ".join(unicodedata.normalize("NFC", prompt).split())
    return hashlib.blake2b(normal.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def draw_of(turns: list[dict[str, str]], seed: int) -> int:
    """Return the number in [0, 2^64) that a conversation draws: it depends on its turns and the seed only."""
    text = json.dumps([[turn["role"], turn["content"]] for turn in turns])
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
            return Conversation(line, record, turns_of(record[key]))
    if layout.text_key is not None and layout.text_key in record:
        text = record[layout.text_key]
        if problem := value_problem(text):
            raise BadConversation(problem, repr(layout.text_key))
        return Conversation(line, record, [], text) if text.strip() else None
    wanted = " or ".join(map(repr, [*layout.message_keys, *([layout.text_key] if layout.text_key else [])]))
    raise BadConversation(MISSING_KEY, f"no {wanted}; the keys are {', '.join(map(repr, list(record)[:8]))}")


def _turn(message: Any, number: int) -> tuple[str, str]:
    if not isinstance(message, dict):
        raise BadConversation(NOT_A_TURN, f"turn {number} is a {type(message).__name__}")
    # a table has every column in every row, null where a record has none
    spelled, content = (
        next((message[key] for key in keys if message.get(key) is not None), None)
        for keys in (("role", "from"), ("content", "value"))
    )
    if spelled is None:
        raise BadConversation(NOT_A_TURN, f"turn {number} has the keys {', '.join(map(repr, list(message)[:8]))}")
    role = ROLES.get(spelled) if isinstance(spelled, str) else None
    if role is None:
        raise BadConversation(UNKNOWN_ROLE, f"{spelled!r} in turn {number}")
    if content is None:
        raise BadConversation(NULL_TEXT, f"turn {number}")
    if isinstance(content, list):
        parts = [
            part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content
        ]
        if not all(isinstance(part, str) for part in parts):
            raise BadConversation(NOT_TEXT, f"turn {number} has parts that are not text")
        content = "".join(parts)  # type: ignore[arg-type]
    if problem := value_problem(content):
        raise BadConversation(problem, f"turn {number}")
    return role, content


def _plain(value: Any) -> str:
    return base64.b64encode(value).decode() if isinstance(value, bytes) else str(value)
