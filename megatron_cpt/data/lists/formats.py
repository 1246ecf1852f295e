"""How each format of data lists is read and written.

Numbers keep full precision: token counts are whole numbers, weights are fractions that are written as the shortest
decimal which reads back to the same double (`repr`), never `%.6f`. Readers take (text, name for messages, split).
"""

import csv
import dataclasses
import io
import json
import re
import shlex
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from typing import Any

import yaml

from megatron_cpt.config.loading.sources import check_shape
from megatron_cpt.data.lists.entry import DataEntry, weights_as_tokens
from megatron_cpt.data.lists.shell import read_shell_array
from megatron_cpt.errors import ConfigError, DataError


def format_number(number: Fraction | int) -> str:
    """Return an exact whole number, or the shortest decimal that reads back to the same double.

    Raises: DataError when the number is not positive as a double: a weight must not round away.
    """
    if Fraction(number).denominator == 1:
        return str(int(number))
    try:
        value = float(number)
    except OverflowError:
        raise DataError(f"weight {number}: too large. State smaller weights.") from None
    if value <= 0:
        raise DataError(f"weight {number}: rounds away to 0. State larger weights.")
    return repr(value)


def read_llm_jp(text: str, name: str, _split: str) -> list[DataEntry]:
    """Return the entries of an LLM-jp shell array; whole numbers are tokens, fractions weights."""
    return entries_of_words(read_shell_array(text, name), name)


def entries_of_words(words: Sequence[tuple[int, str]], name: str) -> list[DataEntry]:
    """Return the entries of amounts and prefixes by turns, each with its line (0: unknown)."""
    where = [f"{name}:{line}" if line else name for line, _ in words]
    if len(words) % 2:
        raise DataError(f"{where[-1]}: '{words[-1][1]}' is left over. Pairs of `<tokens> <prefix>` are needed.")
    entries = [
        DataEntry(prefix=prefix, weight=_number(number, place))
        for place, (_, number), (_, prefix) in zip(where[::2], words[::2], words[1::2], strict=True)
    ]
    is_whole = all(entry.weight is not None and entry.weight.denominator == 1 for entry in entries)
    return weights_as_tokens(entries, name) if is_whole else entries


def render_llm_jp(entries: Sequence[DataEntry]) -> str:
    """Return an LLM-jp shell array."""
    lines = [f"    {_amount(entry)} {_bare(entry.prefix, shlex.quote)}\n" for entry in entries]
    return "export TRAIN_DATA_PATH=(\n" + "".join(lines) + ")\n"


def read_columns(text: str, name: str, _split: str) -> list[DataEntry]:
    """Return the entries of lines `weight prefix corpus` or `weight prefix`."""
    entries: list[DataEntry] = []
    width = 0
    for number, line in content_lines(text):
        columns = without_comment(line).split()
        width = width or len(columns)
        if len(columns) != width or width not in (2, 3):
            raise DataError(
                f"{name}:{number}: {len(columns)} columns ('{line}'). `weight prefix corpus` or `weight prefix` is "
                "needed, the same in every line."
            )
        entries.append(
            DataEntry(
                prefix=columns[1],
                weight=_number(columns[0], f"{name}:{number}"),
                corpus=columns[2] if width == 3 else None,
            )
        )
    return entries


def render_blendcorpus(entries: Sequence[DataEntry]) -> str:
    """Return lines `weight prefix corpus`."""
    lines = []
    for entry in entries:
        if entry.corpus is None:
            raise DataError(f"{entry.prefix}: no corpus. The format blendcorpus needs one; use the format weights.")
        lines.append(f"{_amount(entry)} {_bare(entry.prefix)} {_bare(entry.corpus)}\n")
    return "".join(lines)


def render_weights(entries: Sequence[DataEntry]) -> str:
    """Return lines `weight prefix`."""
    return "".join(f"{_amount(entry)} {_bare(entry.prefix)}\n" for entry in entries)


def read_megatron(text: str, name: str, _split: str) -> list[DataEntry]:
    """Return the entries of Megatron's blend arguments."""
    lines = [without_comment(line).split() for _, line in content_lines(text)]
    words = [word for line in lines for word in line if word != "\\"]
    return _from_arguments(words[1:] if words[0].startswith("--") else words, name)


def render_megatron(entries: Sequence[DataEntry]) -> str:
    """Return Megatron's blend arguments on one line."""
    return " ".join(_arguments(entries)) + "\n"


def read_json(text: str, name: str, split: str) -> list[DataEntry]:
    """Return the entries of one split of a per-split JSON file."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as problem:
        raise DataError(f"{name}:{problem.lineno}: not valid JSON ({problem.msg}).") from None
    except (ValueError, RecursionError) as problem:
        raise DataError(f"{name}: not valid JSON ({str(problem)[:200]}).") from None
    if not isinstance(value, dict):
        raise DataError(f"{name}: holds {type(value).__name__}. A JSON object with a list per split is needed.")
    words = value.get(split)
    if not isinstance(words, list) or not words:
        raise DataError(f"{name}: no list under '{split}' (it has {', '.join(value) or 'nothing'}).")
    return _from_arguments([str(word) for word in words], name)


def render_json(entries: Sequence[DataEntry]) -> str:
    """Return a per-split JSON file with a train split."""
    return json.dumps({"train": _arguments(entries), "valid": None, "test": None}, indent=2) + "\n"


def read_csv(text: str, name: str, _split: str) -> list[DataEntry]:
    """Return the entries of comma-separated rows, with or without a header."""
    rows = [(n, next(csv.reader([line]))) for n, line in content_lines(text)]
    header = [column.strip() for column in rows[0][1]]
    if {"prefix", "path"} & set(header):
        unknown = set(header) - {"prefix", "path", "tokens", "weight", "corpus", "name", "_", ""}
        if unknown or len(set(header)) < len(header):
            raise DataError(
                f"{name}:{rows[0][0]}: the columns are {','.join(header)}. Known are prefix (or path), tokens, weight, "
                f"corpus and name, each once{'; ' + ', '.join(sorted(unknown)) + ' would be ignored' if unknown else ''}."
            )
        rows = rows[1:]
    elif len(header) == 3:
        header = ["_", "path", "tokens"]
    else:
        raise DataError(f"{name}:{rows[0][0]}: {len(header)} columns and no header. `name,path,tokens` is needed.")
    entries = []
    for number, row in rows:
        if len(row) != len(header):
            raise DataError(f"{name}:{number}: {len(row)} columns. {len(header)} are needed ({','.join(header)}).")
        cells = {column: cell.strip() for column, cell in zip(header, row, strict=True)}
        entries.append(_entry({"prefix": cells.get("path"), **cells}, f"{name}:{number}"))
    return entries


def render_csv(entries: Sequence[DataEntry]) -> str:
    """Return comma-separated rows with a header."""
    output = io.StringIO()
    writer = csv.writer(output, lineterminator="\n")
    column = "tokens" if all(entry.tokens is not None for entry in entries) else "weight"
    writer.writerow([column, "prefix", "corpus"])
    writer.writerows([_amount(entry), entry.prefix, entry.corpus or ""] for entry in entries)
    return output.getvalue()


def read_yaml(text: str, name: str, _split: str) -> list[DataEntry]:
    """Return the entries of this toolkit's YAML list."""
    try:
        # The base loader keeps every scalar as text: no float ever touches a number.
        check_shape(text)
        rows = yaml.load(text, Loader=yaml.BaseLoader)
    except (yaml.YAMLError, ConfigError, ValueError, TypeError, AttributeError, RecursionError) as problem:
        raise DataError(f"{name}: not valid YAML ({problem}).") from None
    if not isinstance(rows, list) or not all(
        isinstance(row, dict) and all(isinstance(value, str) for value in row.values()) for row in rows
    ):
        raise DataError(f"{name}: not a list of mappings. `- {{tokens: N, prefix: PATH, corpus: NAME}}` is needed.")
    fields = {field.name for field in dataclasses.fields(DataEntry)}
    for index, row in enumerate(rows, 1):
        if unknown := [key for key in row if key not in fields]:
            raise DataError(f"{name}: entry {index}: unknown key {unknown[0]}. Known are {', '.join(sorted(fields))}.")
    return [_entry(row, f"{name}: entry {index}") for index, row in enumerate(rows, 1)]


def render_yaml(entries: Sequence[DataEntry]) -> str:
    """Return this toolkit's YAML list, one entry per line."""
    lines = []
    for entry in entries:
        fields = []
        if entry.amount is not None:
            fields.append(f"{'weight' if entry.tokens is None else 'tokens'}: {_amount(entry)}")
        # JSON strings are YAML strings: any path is quoted safely.
        fields.append(f"prefix: {json.dumps(entry.prefix, ensure_ascii=False)}")
        if entry.corpus is not None:
            fields.append(f"corpus: {json.dumps(entry.corpus, ensure_ascii=False)}")
        if entry.first_sample is not None:
            fields.append(f"first_sample: {entry.first_sample}")
        lines.append(f"- {{{', '.join(fields)}}}\n")
    return "".join(lines)


def content_lines(text: str) -> list[tuple[int, str]]:
    """Return (line number, stripped line) of the lines that are neither blank nor comments."""
    lines = ((number, line.strip()) for number, line in enumerate(text.splitlines(), 1))
    return [(number, line) for number, line in lines if line and not line.startswith("#")]


def without_comment(line: str) -> str:
    """Return a line of columns without the comment that ends it."""
    return re.sub(r"\s#.*", "", line)


def _from_arguments(words: Sequence[str], name: str) -> list[DataEntry]:
    if not any(is_number(word) for word in words):
        return [DataEntry(prefix=word) for word in words]
    for index, word in enumerate(words[::2]):
        if not is_number(word):
            raise DataError(f"{name}: argument {2 * index + 1} is '{word}'. `weight prefix weight prefix` is needed.")
    if len(words) % 2:
        raise DataError(f"{name}: weight '{words[-1]}' has no prefix. Pairs of `weight prefix` are needed.")
    return [
        DataEntry(prefix=prefix, weight=_number(number, name))
        for number, prefix in zip(words[::2], words[1::2], strict=True)
    ]


def _arguments(entries: Iterable[DataEntry]) -> list[str]:
    entries = list(entries)
    if all(entry.amount is None for entry in entries):
        return [_bare(entry.prefix) for entry in entries]
    return [word for entry in entries for word in (_amount(entry), _bare(entry.prefix))]


def _entry(row: dict[str, Any], where: str) -> DataEntry:
    if not row.get("prefix"):
        raise DataError(f"{where}: no prefix. The path of a .bin/.idx pair without extension is needed.")
    tokens = _number(row["tokens"], where) if row.get("tokens") else None
    if tokens is not None and tokens.denominator != 1:
        raise DataError(f"{where}: tokens is {row['tokens']}. A whole number is needed.")
    return DataEntry(
        prefix=row["prefix"],
        tokens=None if tokens is None else int(tokens),
        weight=_number(row["weight"], where) if tokens is None and row.get("weight") else None,
        corpus=row.get("corpus") or None,
        first_sample=_number_or_none(row.get("first_sample"), where),
    )


def _number_or_none(text: str | None, where: str) -> int | None:
    if not text:
        return None
    if not text.isdecimal():
        raise DataError(f"{where}: first_sample is {text}. A whole number is needed.")
    return int(text)


def _amount(entry: DataEntry) -> str:
    if entry.amount is None:
        raise DataError(f"{entry.prefix}: neither tokens nor weight. This format needs one of them.")
    return format_number(entry.amount)


def _number(text: str, where: str) -> Fraction:
    if not is_number(text):
        raise DataError(f"{where}: '{text}' is not a number. A token count or a weight is needed.")
    number = Fraction(text)
    if number <= 0:
        raise DataError(f"{where}: {text} is not positive. Remove the entry, or write the weight with full precision.")
    return number


def is_number(text: str) -> bool:
    """Return whether a word is a decimal number or a fraction such as 1/3."""
    return re.fullmatch(r"[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d{1,3})?|\d+/0*[1-9]\d*", text) is not None


def _bare(text: str, quote: Callable[[str], str] | None = None) -> str:
    if re.search(r"\s", text) and quote is None:
        raise DataError(f"{text}: holds white space, which this format cannot carry. Use the format yaml or csv.")
    return quote(text) if quote else text
