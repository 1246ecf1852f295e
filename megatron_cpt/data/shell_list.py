"""LLM-jp's shell data lists, read without running a shell.

What is understood: `NAME=value` assignments and `${NAME}` in what follows, comments, quotes, one array
`[export] NAME=( ... )`, and the helper their lists define, `$(calc REPEAT TOKENS PATH)`, as REPEAT x TOKENS and PATH
(nothing where the product is 0). Where there is no array, a string that grows line by line,
`TRAIN_DATA_PATH="${TRAIN_DATA_PATH} TOKENS PATH"`. Anything else in the list is an error, never skipped.
"""

import os
import re
import shlex
from fractions import Fraction

from megatron_cpt.errors import DataError

_ARRAY_START = re.compile(r"\s*(?:export\s+|declare\s+(?:-\w+\s+)?)?\w+=\((.*)")
_ASSIGNMENT = re.compile(r"\s*(?:export\s+|local\s+|readonly\s+)?(\w+)=(\"[^\"]*\"|'[^']*'|[^\s()]*)\s*(?:#.*)?")
_CALC = re.compile(r"\$\(\s*calc\s+(\S+)\s+(\S+)\s+([^\s)]+)\s*\)")


def read_shell_array(text: str, name: str) -> list[tuple[int, str]]:
    """Return the words of the file's one array, or of its growing DATA_PATH string, each with its line number.

    Raises: DataError for a missing end, an unset variable, a second array or a shell construct that is not understood.
    """
    variables: dict[str, str] = {}
    words: list[tuple[int, str]] = []
    string: list[tuple[int, str]] = []
    state = "before"
    for number, line in enumerate(text.splitlines(), 1):
        where = f"{name}:{number}"
        if state == "inside":
            state = _read_words(line, number, where, variables, words)
        elif start := _ARRAY_START.match(line):
            if state == "after":
                raise DataError(f"{where}: a second array. One list per file is needed.")
            state = _read_words(start[1], number, where, variables, words)
        elif assignment := _ASSIGNMENT.fullmatch(line):
            variable, value = assignment[1], assignment[2].strip("\"'")
            if variable.endswith("DATA_PATH"):
                begin = re.match(rf"\$(?:{variable}\b|{{{variable}}})", value)
                if begin is None:
                    string.clear()
                _read_words(value[begin.end() :] if begin else value, number, where, variables, string)
            else:
                variables[variable] = _expand(value, where, variables)
    if state == "before":
        return string
    if state != "after":
        raise DataError(f"{name}: the array has no closing `)`. The file is cut off.")
    return words


def _read_words(line: str, number: int, where: str, variables: dict[str, str], words: list[tuple[int, str]]) -> str:
    code = re.sub(r"(?:^|\s)#.*", "", line)
    code = _CALC.sub(lambda match: _calc(match, where), code)
    code = _expand(code, where, variables)
    if "$(" in code or "`" in code:
        raise DataError(f"{where}: '{code.strip()}' runs a command. Plain `<tokens> <prefix>` is needed.")
    ends = re.search(r"\)\s*;?\s*$", code)
    try:
        found = shlex.split(code[: ends.start()] if ends else code)
    except ValueError as problem:
        raise DataError(f"{where}: '{line.strip()}' ({problem}). Plain `<tokens> <prefix>` is needed.") from None
    words.extend((number, word) for word in found)
    return "after" if ends else "inside"


def _calc(match: re.Match[str], where: str) -> str:
    try:
        tokens = Fraction(match[1]) * Fraction(match[2])
    except (ValueError, ZeroDivisionError):
        raise DataError(
            f"{where}: '{match[0]}' does not multiply numbers. `$(calc REPEAT TOKENS PATH)` is needed."
        ) from None
    return f"{tokens} {match[3]}" if tokens > 0 else ""


def _expand(text: str, where: str, variables: dict[str, str]) -> str:
    def value(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if name not in variables and name not in os.environ:
            raise DataError(f"{where}: ${{{name}}} is not set. Assign it above the list or export it.")
        return variables.get(name, os.environ.get(name, ""))

    return re.sub(r"\$\{(\w+)\}|\$(\w+)", value, text)
