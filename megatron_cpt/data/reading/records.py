"""From bytes to texts: parse lines of documents, and name what is wrong with each one that is none.

Two sorts of findings: a *problem* is a line whose document would be lost, and follows the user's policy; a *note* is
an oddity that loses nothing (a blank line, an empty text, a byte-order mark, no newline at the end) and is counted.
"""

import base64
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

BLANK_LINE = "blank line"
EMPTY_TEXT = "empty text"
BYTE_ORDER_MARK = "byte-order mark"
NO_FINAL_NEWLINE = "no final newline"
NOTES = (BLANK_LINE, EMPTY_TEXT, BYTE_ORDER_MARK, NO_FINAL_NEWLINE)
SURROGATE = "lone surrogate replaced"
UNKNOWN_BYTES = "characters that the encoding does not have, replaced"

INVALID_JSON = "invalid JSON"
TWO_OBJECTS = "two objects on one line"
NOT_AN_OBJECT = "not an object"
MISSING_KEY = "missing key"
NULL_TEXT = "null text"
NOT_TEXT = "text is not a string"
INVALID_UTF8 = "invalid UTF-8"
TOO_LONG = "document too long"
DAMAGED = "damaged or truncated file"
CONTROL_TOKEN = "control token in a text"
UNREADABLE = "file that cannot be read"

Line = bytes | memoryview

POLICIES = ("fail", "skip", "strict")
"""fail: stop at the first problem; skip: count problems and keep them in a reject file; strict: stop at notes too."""

_BOM = b"\xef\xbb\xbf"
_MAX_KEPT_BYTES = 1 << 20
_LONG_LINE_BYTES = 2048
_DROPPED = b"too long"
"""Compared by identity, so it has more than one byte: Python interns one-byte `bytes`, and a line can be one."""


@dataclass(frozen=True)
class Problem:
    """One line that holds no document; `line` counts from 0 within the parsed block."""

    line: int
    kind: str
    detail: str = ""
    raw: bytes | None = None

    def record(self, path: str, line: int | None) -> dict[str, Any]:
        """Return the entry of a reject file: position, reason, and the line itself unless it is over a megabyte."""
        entry: dict[str, Any] = {"path": path, "line": line, "reason": self.kind}
        if self.detail:
            entry["detail"] = self.detail
        if self.raw is not None and len(self.raw) <= _MAX_KEPT_BYTES:
            try:
                entry["raw"] = self.raw.decode()
            except UnicodeDecodeError:
                entry["raw_base64"] = base64.b64encode(self.raw).decode()
        elif self.raw is not None:
            entry["raw_bytes"] = len(self.raw)
        return entry


@dataclass
class Parsed:
    """The documents of a block of lines, in order, and everything that was none."""

    keys: tuple[str, ...]
    texts: list[list[str]] = field(default_factory=list)
    """One list per key, all of the same length."""
    lines: list[int] = field(default_factory=list)
    """Line of each document, counted from 0 within the block."""
    num_lines: int = 0
    notes: Counter[str] = field(default_factory=Counter)
    problems: list[Problem] = field(default_factory=list)
    first_note: tuple[int, str] | None = None

    def __post_init__(self) -> None:
        self.texts = self.texts or [[] for _ in self.keys]

    def note(self, line: int, kind: str) -> None:
        """Count an oddity that loses nothing."""
        self.notes[kind] += 1
        if self.first_note is None:
            self.first_note = (line, kind)


def parse_lines(
    data: bytes, format: str, keys: Sequence[str], max_document_bytes: int, *, is_start: bool, is_end: bool
) -> Parsed:
    """Return the documents of whole lines of a `jsonl` or `txt` file.

    `is_start` and `is_end` tell whether the block holds the file's first and last byte, where a byte-order mark is
    dropped and a missing newline noted.
    """
    parsed = Parsed(tuple(keys))
    if is_start and data.startswith(_BOM):
        parsed.note(0, BYTE_ORDER_MARK)
        data = data[len(_BOM) :]
    if not data:
        return parsed
    lines = _split_lines(data, as_views=format == "jsonl")
    if is_end and not data.endswith(b"\n"):
        parsed.note(len(lines) - 1, NO_FINAL_NEWLINE)
    parsed.num_lines = len(lines)
    if len(data) > max_document_bytes:
        for number, line in enumerate(lines):
            if len(line) > max_document_bytes:
                parsed.problems.append(Problem(number, TOO_LONG, f"{len(line):,} bytes"))
                lines[number] = _DROPPED
    if format == "txt":
        _parse_text_lines(lines, parsed)
    elif len(keys) == 1:
        _parse_json_lines(lines, keys[0], parsed)
    else:
        _parse_json_lines_of_keys(lines, keys, parsed)
    return parsed


def parse_text_file(data: bytes, keys: Sequence[str]) -> Parsed:
    """Return a whole text file as one document."""
    parsed = Parsed(tuple(keys), num_lines=1)
    if data.startswith(_BOM):
        parsed.note(0, BYTE_ORDER_MARK)
        data = data[len(_BOM) :]
    _add_text(data, 0, parsed)
    return parsed


def parse_values(columns: Sequence[Sequence[Any]], keys: Sequence[str]) -> Parsed:
    """Return the documents of table columns, one column per key; rows count as lines."""
    parsed = Parsed(tuple(keys), num_lines=len(columns[0]))
    for number, values in enumerate(zip(*columns, strict=True)):
        problem = next((p for p in map(value_problem, values) if p), None)
        if problem:
            parsed.problems.append(Problem(number, problem, raw=as_line(dict(zip(keys, values, strict=True)))))
        else:
            _add_document(values, number, parsed)
    return parsed


def object_of_line(line: bytes) -> Any:
    """Return the JSON value of a line.

    Python's parser has the last word, since it reads what Python programs write (NaN, integers of any size).

    Raises: ValueError saying what is wrong (UnicodeDecodeError for invalid UTF-8).
    """
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError:
        return json.loads(line.decode("utf-8"))


def line_problem(line: bytes) -> tuple[str, str]:
    """Return kind and detail of the error if a line is not a JSON value."""
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as problem:
        return INVALID_UTF8, f"byte {problem.start}"
    try:
        _, end = json.JSONDecoder().raw_decode(text.lstrip())
    except ValueError as problem:
        return INVALID_JSON, str(problem)
    except RecursionError:
        return INVALID_JSON, "nested too deeply"
    if text.lstrip()[end:].lstrip(" \t\r,")[:1] == "{":
        return TWO_OBJECTS, f"the second starts after character {end}"
    return INVALID_JSON, f"extra text after character {end}"


def _split_lines(data: bytes, *, as_views: bool) -> list[Line]:
    """Return the lines of a block without their newlines; long ones as views where the parser takes them, to copy nothing."""
    if not as_views or len(data) < _LONG_LINE_BYTES * data.count(b"\n"):
        return [*data.removesuffix(b"\n").split(b"\n")]
    view, start = memoryview(data), 0
    lines: list[Line] = []
    while start < len(data):
        end = data.find(b"\n", start)
        end = len(data) if end < 0 else end
        lines.append(view[start:end])
        start = end + 1
    return lines


def _parse_json_lines(lines: list[Line], key: str, parsed: Parsed) -> None:
    loads: Callable[[Line], Any] = orjson.loads
    (texts,), numbers = parsed.texts, parsed.lines
    for number, line in enumerate(lines):
        try:
            text = loads(line)[key]
        except (orjson.JSONDecodeError, KeyError, TypeError, IndexError):
            _parse_odd_line(line, number, (key,), parsed)
            continue
        if type(text) is str and text:
            texts.append(text)
            numbers.append(number)
        else:
            _parse_odd_line(line, number, (key,), parsed)


def _parse_json_lines_of_keys(lines: list[Line], keys: Sequence[str], parsed: Parsed) -> None:
    for number, line in enumerate(lines):
        _parse_odd_line(line, number, keys, parsed)


def _parse_odd_line(line: Line, number: int, keys: Sequence[str], parsed: Parsed) -> None:
    """Add one line's document, or say why there is none: the long way, used when the short one failed."""
    if line is _DROPPED:
        return
    line = bytes(line)
    if not line.strip():
        parsed.note(number, BLANK_LINE)
        return
    try:
        record = object_of_line(line)
    except (ValueError, RecursionError):
        kind, detail = line_problem(line)
        parsed.problems.append(Problem(number, kind, detail, line))
        return
    if not isinstance(record, dict):
        parsed.problems.append(Problem(number, NOT_AN_OBJECT, f"a {type(record).__name__}", line))
        return
    missing = [key for key in keys if key not in record]
    if missing:
        detail = f"no {missing[0]!r}; the keys are {', '.join(map(repr, list(record)[:8]))}"
        parsed.problems.append(Problem(number, MISSING_KEY, detail, line))
        return
    for key in keys:
        if problem := value_problem(record[key]):
            detail = f"{key!r} is a {type(record[key]).__name__}" if problem == NOT_TEXT else f"{key!r}"
            parsed.problems.append(Problem(number, problem, detail, line))
            return
    _add_document([record[key] for key in keys], number, parsed)


def _parse_text_lines(lines: list[Line], parsed: Parsed) -> None:
    for number, found in enumerate(lines):
        if found is _DROPPED:
            continue
        line = bytes(found).removesuffix(b"\r")
        if line.strip():
            _add_text(line, number, parsed)
        else:
            parsed.note(number, BLANK_LINE)


def _add_text(data: bytes, number: int, parsed: Parsed) -> None:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as problem:
        parsed.problems.append(Problem(number, INVALID_UTF8, f"byte {problem.start}", data))
        return
    _add_document([text] * len(parsed.keys), number, parsed)


def _add_document(values: Sequence[str], number: int, parsed: Parsed) -> None:
    if not any(values):
        parsed.note(number, EMPTY_TEXT)
        return
    for texts, value in zip(parsed.texts, values, strict=True):
        texts.append(value)
    parsed.lines.append(number)


def value_problem(value: Any) -> str | None:
    """Return the kind of problem of a value that should be a text, or None."""
    if value is None:
        return NULL_TEXT
    if not isinstance(value, str):
        return NOT_TEXT
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            return INVALID_UTF8
    return None


def as_line(record: dict[str, Any]) -> bytes:
    """Return a record as a line of JSON, for any types of values."""
    return json.dumps(record, ensure_ascii=False, default=str).encode("utf-8", "backslashreplace")
