"""Data lists: which token shards a run reads and how much of each, in every format that the field uses.

`FORMATS` names them, with a sample each. A file's format is found from its content. Numbers keep full precision:
token counts are whole numbers, weights are fractions that are written as the shortest decimal which reads back to the
same double (`repr`), never `%.6f`.
"""

import csv
import io
import json
import re
import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import yaml

from megatron_cpt.data.shell_list import read_shell_array
from megatron_cpt.errors import DataError
from megatron_cpt.files import write_text


@dataclass(frozen=True, kw_only=True)
class DataEntry:
    """One line of a data list: a shard and how much of it is read."""

    prefix: str
    """Path of the `.bin/.idx` pair without extension."""
    tokens: int | None = None
    """Tokens to draw from the shard over the run."""
    weight: Fraction | None = None
    """Relative share, where the list states no tokens; None in both: in proportion to the shard's size."""
    corpus: str | None = None
    """Name of the corpus the shard belongs to."""

    @property
    def amount(self) -> Fraction | None:
        """Tokens, else the weight, else None."""
        return Fraction(self.tokens) if self.tokens is not None else self.weight


@dataclass(frozen=True, kw_only=True)
class Format:
    """One format of data lists: `sample` is a complete file in it."""

    meaning: str
    sample: str
    read: Callable[[str, str, str], list[DataEntry]]
    """(text, name for messages, split) -> entries"""
    render: Callable[[Sequence[DataEntry]], str]


def read_data_list(path: Path, split: str = "train") -> list[DataEntry]:
    """Return the entries of a data list in any of `FORMATS`; `split` chooses the part of a per-split JSON file.

    Raises: DataError with file, line, what was found and what is needed.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file. A data list is needed.") from None
    except (UnicodeDecodeError, IsADirectoryError) as problem:
        raise DataError(f"{path}: not a text file ({problem}). A data list is needed.") from None
    return parse_data_list(text, str(path), split)


def parse_data_list(text: str, name: str = "data list", split: str = "train") -> list[DataEntry]:
    """Return the entries of a data list's text; `name` stands for the file in messages."""
    entries = FORMATS[detect_format(text, name)].read(text, name, split)
    if not entries:
        raise DataError(f"{name}: no entry. At least one shard is needed.")
    return entries


def write_data_list(path: Path, entries: Sequence[DataEntry], format: str = "yaml") -> None:
    """Write a data list whole or not at all. Raises: DataError when the format cannot carry the entries."""
    write_text(path, render_data_list(entries, format))


def render_data_list(entries: Sequence[DataEntry], format: str = "yaml") -> str:
    """Return the text of a data list. Raises: DataError when the format cannot carry the entries."""
    if format not in FORMATS:
        raise DataError(f"format {format}: unknown. Use one of {', '.join(FORMATS)}.")
    return FORMATS[format].render(entries)


def detect_format(text: str, name: str = "data list") -> str:
    """Return the key in `FORMATS` that a text's content fits."""
    if text.lstrip().startswith("{"):
        return "json"
    if re.search(r"^\s*(?:export\s+|declare\s+(?:-\w+\s+)?)?\w+=\(", text, re.MULTILINE):
        return "llm-jp"
    lines = [line for _, line in _content_lines(text)]
    if not lines:
        raise DataError(f"{name}: no entry. At least one shard is needed.")
    if lines[0].startswith(("- ", "[")):
        return "yaml"
    if all("," in line for line in lines):
        return "csv"
    words = lines[0].split()
    if _is_number(words[0]) and len(words) <= 3 and not (len(words) == 3 and _is_number(words[2])):
        return "weights" if len(words) == 2 else "blendcorpus"
    return "megatron"


def format_number(number: Fraction | int) -> str:
    """Return an exact whole number, or the shortest decimal that reads back to the same double.

    Raises: DataError when the number is not positive as a double: a weight must not round away.
    """
    if Fraction(number).denominator == 1:
        return str(int(number))
    if float(number) <= 0:
        raise DataError(f"weight {number}: rounds away to 0. State larger weights.")
    return repr(float(number))


def _read_llm_jp(text: str, name: str, _split: str) -> list[DataEntry]:
    words = read_shell_array(text, name)
    if len(words) % 2:
        raise DataError(
            f"{name}:{words[-1][0]}: '{words[-1][1]}' is left over. Pairs of `<tokens> <prefix>` are needed."
        )
    return _as_tokens(
        [
            DataEntry(prefix=prefix, weight=_number(number, f"{name}:{line}"))
            for (line, number), (_, prefix) in zip(words[::2], words[1::2], strict=True)
        ]
    )


def _render_llm_jp(entries: Sequence[DataEntry]) -> str:
    lines = [f"    {_amount(entry)} {_bare(entry.prefix, shlex.quote)}\n" for entry in entries]
    return "export TRAIN_DATA_PATH=(\n" + "".join(lines) + ")\n"


def _read_columns(text: str, name: str, _split: str) -> list[DataEntry]:
    entries: list[DataEntry] = []
    width = 0
    for number, line in _content_lines(text):
        columns = line.split()
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


def _render_blendcorpus(entries: Sequence[DataEntry]) -> str:
    lines = []
    for entry in entries:
        if entry.corpus is None:
            raise DataError(f"{entry.prefix}: no corpus. The format blendcorpus needs one; use the format weights.")
        lines.append(f"{_amount(entry)} {_bare(entry.prefix)} {_bare(entry.corpus)}\n")
    return "".join(lines)


def _render_weights(entries: Sequence[DataEntry]) -> str:
    return "".join(f"{_amount(entry)} {_bare(entry.prefix)}\n" for entry in entries)


def _read_megatron(text: str, name: str, _split: str) -> list[DataEntry]:
    words = [word for _, line in _content_lines(text) for word in line.split()]
    return _from_arguments(words[1:] if words[0].startswith("--") else words, name)


def _render_megatron(entries: Sequence[DataEntry]) -> str:
    return " ".join(_arguments(entries)) + "\n"


def _read_json(text: str, name: str, split: str) -> list[DataEntry]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as problem:
        raise DataError(f"{name}:{problem.lineno}: not valid JSON ({problem.msg}).") from None
    words = value.get(split)
    if not isinstance(words, list) or not words:
        raise DataError(f"{name}: no list under '{split}' (it has {', '.join(value) or 'nothing'}).")
    return _from_arguments([str(word) for word in words], name)


def _render_json(entries: Sequence[DataEntry]) -> str:
    return json.dumps({"train": _arguments(entries), "valid": None, "test": None}, indent=2) + "\n"


def _read_csv(text: str, name: str, _split: str) -> list[DataEntry]:
    rows = [(n, next(csv.reader([line]))) for n, line in _content_lines(text)]
    header = [column.strip() for column in rows[0][1]]
    if {"prefix", "path"} & set(header):
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


def _render_csv(entries: Sequence[DataEntry]) -> str:
    output = io.StringIO()
    writer = csv.writer(output, lineterminator="\n")
    column = "tokens" if all(entry.tokens is not None for entry in entries) else "weight"
    writer.writerow([column, "prefix", "corpus"])
    writer.writerows([_amount(entry), entry.prefix, entry.corpus or ""] for entry in entries)
    return output.getvalue()


def _read_yaml(text: str, name: str, _split: str) -> list[DataEntry]:
    try:
        # The base loader keeps every scalar as text: no float ever touches a number.
        rows = yaml.load(text, Loader=yaml.BaseLoader)
    except yaml.YAMLError as problem:
        raise DataError(f"{name}: not valid YAML ({problem}).") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{name}: not a list of mappings. `- {{tokens: N, prefix: PATH, corpus: NAME}}` is needed.")
    return [_entry(row, f"{name}: entry {index}") for index, row in enumerate(rows, 1)]


def _render_yaml(entries: Sequence[DataEntry]) -> str:
    lines = []
    for entry in entries:
        fields = []
        if entry.amount is not None:
            fields.append(f"{'weight' if entry.tokens is None else 'tokens'}: {_amount(entry)}")
        # JSON strings are YAML strings: any path is quoted safely.
        fields.append(f"prefix: {json.dumps(entry.prefix, ensure_ascii=False)}")
        if entry.corpus is not None:
            fields.append(f"corpus: {json.dumps(entry.corpus, ensure_ascii=False)}")
        lines.append(f"- {{{', '.join(fields)}}}\n")
    return "".join(lines)


def _content_lines(text: str) -> list[tuple[int, str]]:
    lines = ((number, line.strip()) for number, line in enumerate(text.splitlines(), 1))
    return [(number, line) for number, line in lines if line and not line.startswith("#")]


def _from_arguments(words: Sequence[str], name: str) -> list[DataEntry]:
    if not any(_is_number(word) for word in words):
        return [DataEntry(prefix=word) for word in words]
    for index, word in enumerate(words[::2]):
        if not _is_number(word):
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
    )


def _as_tokens(entries: list[DataEntry]) -> list[DataEntry]:
    if any(entry.weight is None or entry.weight.denominator != 1 for entry in entries):
        return entries
    return [DataEntry(prefix=entry.prefix, tokens=int(entry.weight or 0), corpus=entry.corpus) for entry in entries]


def _amount(entry: DataEntry) -> str:
    if entry.amount is None:
        raise DataError(f"{entry.prefix}: neither tokens nor weight. This format needs one of them.")
    return format_number(entry.amount)


def _number(text: str, where: str) -> Fraction:
    if not _is_number(text):
        raise DataError(f"{where}: '{text}' is not a number. A token count or a weight is needed.")
    number = Fraction(text)
    if number <= 0:
        raise DataError(f"{where}: {text} is not positive. Remove the entry, or write the weight with full precision.")
    return number


def _is_number(text: str) -> bool:
    return re.fullmatch(r"[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?|\d+/\d+", text) is not None


def _bare(text: str, quote: Callable[[str], str] | None = None) -> str:
    if re.search(r"\s", text) and quote is None:
        raise DataError(f"{text}: holds white space, which this format cannot carry. Use the format yaml or csv.")
    return quote(text) if quote else text


FORMATS: dict[str, Format] = {
    "yaml": Format(
        meaning="this toolkit's own: tokens or weight, prefix, corpus",
        sample="- {tokens: 9242740213, prefix: data/en_text_document, corpus: en}\n",
        read=_read_yaml,
        render=_render_yaml,
    ),
    "llm-jp": Format(
        meaning="LLM-jp's shell array of tokens and prefixes; assignments, comments and $(calc REPEAT TOKENS PATH) are understood",
        sample="export TRAIN_DATA_PATH=(\n    9242740213 data/en_text_document\n)\n",
        read=_read_llm_jp,
        render=_render_llm_jp,
    ),
    "blendcorpus": Format(
        meaning="BlendCorpus, AuroraGPT: weight prefix corpus",
        sample="0.05 data/en_text_document en\n",
        read=_read_columns,
        render=_render_blendcorpus,
    ),
    "weights": Format(
        meaning="two columns: weight prefix",
        sample="0.05 data/en_text_document\n",
        read=_read_columns,
        render=_render_weights,
    ),
    "megatron": Format(
        meaning="Megatron's --data-path arguments or --data-args-path file",
        sample="0.3 data/en_text_document 0.7 data/ja_text_document\n",
        read=_read_megatron,
        render=_render_megatron,
    ),
    "json": Format(
        meaning="Megatron's --per-split-data-args-path file",
        sample='{"train": ["0.3", "data/en_text_document", "0.7", "data/ja_text_document"]}\n',
        read=_read_json,
        render=_render_json,
    ),
    "csv": Format(
        meaning="comma-separated rows `name,path,tokens`, or any columns under a header with prefix, tokens or weight, corpus",
        sample="tokens,prefix,corpus\n9242740213,data/en_text_document,en\n",
        read=_read_csv,
        render=_render_csv,
    ),
}
