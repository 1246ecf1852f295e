"""JSON that is not an object per line: arrays of records, and objects over several lines, as a stream of values.

`[{...}, {...}]` and `{...}{...}` become one value each, in order, as bytes on one line: line breaks between tokens turn into a
space, all else stays as it was written. The file is read once, in blocks, and never lies in memory whole. Values are parted by
brackets and strings alone; whether a value is good JSON is for its reader to judge, so that a bad record costs only itself.
"""

import re
from collections.abc import Iterator

import orjson

from megatron_cpt.data.reading.records import DAMAGED, INVALID_JSON, TOO_LONG, Problem, object_of_line

_BOM = b"\xef\xbb\xbf"
HEAD_BYTES = 1 << 16
"""Bytes of a file that `holds_values` wants to see."""
_AFTER_BREAK = {b"{": b'"}', b"[": b'"{[]-0123456789tfn', b":": b'"{[-0123456789tfn'}
"""Characters with which JSON can continue within an object, within an array, and after a key."""
_PAIR = re.compile(rb"\{[^{}\[\]]*\}|\[[^{}\[\]]*\]")
_SPACE = re.compile(rb"[\s,]*+")
_STRING_REST = re.compile(rb'[^"\\]*+(?:\\.[^"\\]*+)*+', re.DOTALL)
_TO_BRACKET = re.compile(rb'(?:[^"{}\[\]]++|"[^"\\]*+(?:\\.[^"\\]*+)*+")*+', re.DOTALL)
_TO_SCALAR_END = re.compile(rb'(?:[^"{}\[\],]++|"[^"\\]*+(?:\\.[^"\\]*+)*+")*+', re.DOTALL)
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)
_BREAK = re.compile(rb"\n[ \t\r\n]*")


def holds_values(head: bytes) -> bool:
    """Return whether a file that begins with `head` holds an array or objects over several lines, not an object per line.

    A file of lines whose first one is bad is one of lines, and so is a list per line.
    """
    text = head.removeprefix(_BOM).lstrip()
    line, newline, rest = text.partition(b"\n")
    if text[:1] == b"[":
        is_list_per_line = bool(rest.strip()) and _is_json(line)
        return text[1:].lstrip()[:1] in (b"", b"{", b"[", b"]", b'"') and not is_list_per_line
    if text[:1] != b"{" or not newline or _is_json(line):
        return False
    first = next(ValueSplitter(len(text)).feed(text), None)
    if first is not None:
        return isinstance(first, bytes) and _is_json(first) and not line.lstrip().startswith(first)
    # longer than the head: its first line must break off, outside of a string, where JSON goes on
    bare, after = _STRING.sub(b"", line).strip(), rest.lstrip()[:1]
    goes_on = _AFTER_BREAK.get(_innermost(bare), b"")
    return b'"' not in bare and bare[-1:] in b"{[,:" and bool(after) and after in goes_on


def _is_json(data: bytes) -> bool:
    try:
        object_of_line(data)
    except (ValueError, RecursionError):
        return False
    return True


def _innermost(bare: bytes) -> bytes:
    """Return the bracket that a line without its strings leaves open last, or the colon that it ends with."""
    if bare[-1:] == b":":
        return b":"
    while (shorter := _PAIR.sub(b"", bare)) != bare:
        bare = shorter
    brackets = re.findall(rb"[{\[]", bare)
    return brackets[-1] if brackets else b""


def _is_strict_json(data: bytes) -> bool:
    try:
        orjson.loads(data)
    except orjson.JSONDecodeError:
        return False
    return True


class ValueSplitter:
    """Takes a stream's blocks and returns its values, each on one line, and the problems at their positions."""

    def __init__(self, max_bytes: int):
        self._max_bytes = max_bytes
        self._parts: list[bytes] = []
        """The received part of the incomplete value."""
        self._size = 0
        self._depth = 0
        """Brackets that are open within the value."""
        self._is_inside = False
        """A value has begun."""
        self._in_string = False
        self._in_array = False
        self._held = b""
        """A backslash whose character comes with the next block."""

    def feed(self, data: bytes) -> Iterator[bytes | Problem]:
        """Yield the values that a block completes."""
        data, self._held = self._held + data, b""
        start = position = 0
        while position < len(data):
            if not self._is_inside:
                start = position = self._begin(data, position)
                continue
            position = self._advance(data, position)
            if not self._has_begun():
                self._keep(data[start:position])
                yield self._take()
        if self._is_inside:
            self._keep(data[start : len(data) - len(self._held)])

    def finish(self) -> Iterator[bytes | Problem]:
        """Yield what a stream leaves open at its end."""
        if self._is_inside and not self._in_string and not self._depth and not self._in_array:
            yield self._take()
        elif self._is_inside:
            yield Problem(0, DAMAGED, "the file ends within a record", b"".join(self._parts) + self._held)
        elif self._in_array:
            yield Problem(0, DAMAGED, "the array has no end")

    def _has_begun(self) -> bool:
        return self._is_inside

    def _begin(self, data: bytes, position: int) -> int:
        """Pass over what parts values; return where one begins, or where the block ends."""
        position = _match_end(_SPACE, data, position)
        letter = data[position : position + 1]
        if letter == b"[" and not self._in_array:
            self._in_array = True
            return position + 1
        if letter == b"]" and self._in_array:
            self._in_array = False
            return position + 1
        self._is_inside = bool(letter)
        return position

    def _advance(self, data: bytes, position: int) -> int:
        """Go on within a value up to its next bracket, its end or the block's; return the place behind."""
        if self._in_string:
            position = _match_end(_STRING_REST, data, position)
            if data[position : position + 1] == b"\\":
                self._held = data[position:]
                return len(data)
            self._in_string = position == len(data)
            return position + (not self._in_string)
        begin = position
        position = _match_end(_TO_BRACKET if self._depth else _TO_SCALAR_END, data, position)
        letter = data[position : position + 1]
        if letter == b'"':
            self._in_string = True
            return position + 1
        if not letter:
            return position
        if not self._depth and (position > begin or self._size):
            self._is_inside = False  # a number, a text or rubbish ends before this
            return position
        self._depth += -1 if letter in b"}]" else 1
        self._is_inside = self._depth > 0
        self._depth = max(self._depth, 0)
        return position + 1

    def _keep(self, part: bytes) -> None:
        self._size += len(part)
        if self._size <= self._max_bytes:
            self._parts.append(part)
        else:
            self._parts.clear()

    def _take(self) -> bytes | Problem:
        """Return the complete value and forget it."""
        size, raw = self._size, b"".join(self._parts).strip()
        self._parts, self._size = [], 0
        if size > self._max_bytes:
            return Problem(0, TOO_LONG, f"{size:,} bytes")
        if b"\n" not in raw:
            return raw
        if not _is_strict_json(raw) and any(b"\n" in string for string in _STRING.findall(raw)):
            return Problem(0, INVALID_JSON, "a line break within a string", raw)
        return _BREAK.sub(b" ", raw)


def _match_end(pattern: re.Pattern[bytes], data: bytes, position: int) -> int:
    found = pattern.match(data, position)
    return found.end() if found else position
