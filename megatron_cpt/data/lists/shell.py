"""LLM-jp's shell data lists, read without running a shell.

Supported syntax: `NAME=value` assignments and `${NAME}` in later lines, comments, quotes, one array `[export] NAME=(
... )` with `NAME+=( ... )` after it, a leading `--data-path` in it, and the helper their lists define, `$(calc REPEAT
TOKENS PATH)`, as REPEAT x TOKENS and PATH (nothing where the product is 0). Without an array, a string extended line by
line, `TRAIN_DATA_PATH="${TRAIN_DATA_PATH} TOKENS PATH"` or `TRAIN_DATA_PATH+=" TOKENS PATH"`. Functions are passed
over. Anything else in the list is an error, never skipped.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction

from megatron_cpt.errors import DataError

_PREFIX = r"\s*(?:export\s+|local\s+|readonly\s+|declare\s+(?:-\w+\s+)*)?"
_ARRAY_START = re.compile(_PREFIX + r"(?P<name>\w+)(?P<more>\+?)=\((?P<rest>.*)")
_ASSIGNMENT = re.compile(
    _PREFIX + r"(?P<name>\w+)(?P<more>\+?)=(?P<value>\"[^\"]*\"|'[^']*'|[^\s();]*)\s*;?\s*(?:#.*)?"
)
_FUNCTION = re.compile(r"\s*(?:function\s+\w+\s*(?:\(\s*\))?|\w+\s*\(\s*\))\s*\{(?P<rest>.*)")
_CALC = re.compile(r"\$\(\s*calc\s+(\S+)\s+(\S+)\s+([^\s)]+)\s*\)")
_NAME = re.compile(r"\{(\w+)\}|(\w+)")

Words = list[tuple[int, str]]


def read_shell_array(text: str, name: str) -> Words:
    """Return the words of the file's one array, or of its growing DATA_PATH string, each with its line number.

    Raises: DataError for a missing end, an unset variable, a second array or a shell construct that is not understood.
    """
    reader = _Reader(name)
    for number, line in enumerate(text.splitlines(), 1):
        reader.read_line(line, number)
    words = reader.finish()
    return words[1:] if words and words[0][1] in ("--data-path", "--train-data-path") else words


@dataclass
class _Reader:
    """State of a list's evaluation."""

    name: str
    variables: dict[str, str | DataError] = field(default_factory=dict)
    """Values of assigned variables, or the reason why one is unknown."""
    array: str | None = None
    """The array's name, once it has begun."""
    words: Words = field(default_factory=list)
    string: Words = field(default_factory=list)
    """Value of the DATA_PATH string, if there is no array."""
    inside: str = ""
    """`array` or `function` while a line is inside of one."""

    def read_line(self, line: str, number: int) -> None:
        where = f"{self.name}:{number}"
        if self.inside == "function":
            self.inside = "" if line.strip() == "}" else "function"
        elif self.inside == "array":
            self._read_words(line, number, self.words)
        elif start := _ARRAY_START.match(line):
            if self.array is not None and not (start["more"] and start["name"] == self.array):
                raise DataError(f"{where}: a second array. One list per file is needed.")
            self.array = start["name"]
            self.inside = "array"
            self._read_words(start["rest"], number, self.words)
        elif function := _FUNCTION.match(line):
            self.inside = "" if function["rest"].rstrip().endswith("}") else "function"
        elif assignment := _ASSIGNMENT.fullmatch(line):
            self._assign(assignment, number)
        elif (found := re.search(r"(\w+)\s*(?:\[[^\]]*\])?\+?=", line)) and not line.lstrip().startswith("#"):
            if found[1].endswith("DATA_PATH") or found[1] == self.array:
                raise DataError(f"{where}: '{line.strip()}' changes the list in a way that only a shell can follow.")

    def finish(self) -> Words:
        if self.inside == "array":
            raise DataError(f"{self.name}: the array has no closing `)`. The file is cut off.")
        if self.array is not None and self.string:
            raise DataError(f"{self.name}: both an array and a growing string. One list per file is needed.")
        return self.string if self.array is None else self.words

    def _assign(self, assignment: re.Match[str], number: int) -> None:
        name, value = assignment["name"], assignment["value"]
        if not name.endswith("DATA_PATH"):
            before = f"${{{name}}}" if assignment["more"] else ""
            try:
                words, _ = _split(f"{before}{value}", f"{self.name}:{number}", self.variables, is_value=True)
                self.variables[name] = "".join(words)
            except DataError as problem:  # only what the list uses matters
                self.variables[name] = problem
            return
        value = value[1:-1] if value[:1] in ("'", '"') else value
        begin = re.match(rf"\$(?:{name}\b|{{{name}}})", value)
        if begin is None and not assignment["more"]:
            self.string.clear()
        self._read_words(value[begin.end() :] if begin else value, number, self.string)

    def _read_words(self, line: str, number: int, words: Words) -> None:
        where = f"{self.name}:{number}"
        code = _CALC.sub(lambda match: _calc(match, where), line)
        found, has_ended = _split(code, where, self.variables)
        words.extend((number, word) for word in found)
        if has_ended and self.inside == "array":
            self.inside = ""


def _split(
    line: str, where: str, variables: Mapping[str, str | DataError], *, is_value: bool = False
) -> tuple[list[str], bool]:
    """Return the words of a line as a shell sees them, and whether a `)` ended them; `is_value`: nothing splits."""
    words: list[str] = []
    word: str | None = None
    quote = ""
    position = 0

    def add(text: str, splits: bool) -> None:
        nonlocal word
        for letter in text:
            if not (splits and letter.isspace()):
                word = (word or "") + letter
            elif word is not None:
                words.append(word)
                word = None

    while position < len(line):
        letter, position = line[position], position + 1
        if quote == "'" and letter != "'":
            add(letter, splits=False)
        elif letter == quote:
            quote = ""
        elif letter in "'\"" and not quote:
            quote, word = letter, word or ""
        elif letter == "\\":
            escaped, position = line[position : position + 1], position + 1
            add(letter + escaped if quote and escaped not in '"\\$`' else escaped, splits=False)
        elif letter == "`" or (letter == "$" and line[position : position + 1] == "("):
            raise DataError(f"{where}: '{line.strip()}' runs a command. Plain `<tokens> <prefix>` is needed.")
        elif letter == "$" and (match := _NAME.match(line, position)):
            add(_value(match, where, variables), splits=not quote and not is_value)
            position = match.end()
        elif letter == "$" and line[position : position + 1] == "{":
            raise DataError(f"{where}: '{line.strip()}' changes a variable as only a shell can. Write the path out.")
        elif quote or is_value or letter.isspace():
            add(letter, splits=not quote and not is_value)
        elif letter == "#" and word is None:
            break
        elif letter == ")":
            if rest := re.sub(r"(?:^|\s)#.*", "", line[position:]).strip(" \t;"):
                raise DataError(f"{where}: '{rest}' after the end of the list. One list per file is needed.")
            add(" ", splits=True)
            return words, True
        elif letter in "(;|&<>":
            raise DataError(f"{where}: '{letter}' in '{line.strip()}'. Plain `<tokens> <prefix>` is needed.")
        else:
            add(letter, splits=False)
    if quote:
        raise DataError(f"{where}: '{line.strip()}' (no closing quotation). Plain `<tokens> <prefix>` is needed.")
    if word is not None:
        words.append(word)
    return words, False


def _calc(match: re.Match[str], where: str) -> str:
    try:
        tokens = Fraction(match[1]) * Fraction(match[2])
    except (ValueError, ZeroDivisionError):
        raise DataError(
            f"{where}: '{match[0]}' does not multiply numbers. `$(calc REPEAT TOKENS PATH)` is needed."
        ) from None
    return f"{tokens} {match[3]}" if tokens > 0 else ""


def _value(match: re.Match[str], where: str, variables: Mapping[str, str | DataError]) -> str:
    name = match[1] or match[2]
    value = variables.get(name, os.environ.get(name))
    if value is None:
        raise DataError(f"{where}: ${{{name}}} is not set. Assign it above the list or export it.")
    if isinstance(value, DataError):
        raise value
    return value
