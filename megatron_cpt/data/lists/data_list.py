"""Data lists: which token shards a run reads and how much of each, in every format that the field uses.

`FORMATS` lists them, with a sample each; `list_formats.py` reads and writes them. A file's format is found from its
content.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from megatron_cpt.data.lists import formats as list_formats
from megatron_cpt.data.lists.entry import DataEntry
from megatron_cpt.data.lists.formats import content_lines, is_number, without_comment
from megatron_cpt.errors import DataError
from megatron_cpt.files import write_text


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

    Raises: DataError with file, line, the text found and the text needed.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file. A data list is needed.") from None
    except (UnicodeDecodeError, OSError) as problem:
        raise DataError(f"{path}: not a text file that can be read ({problem}). A data list is needed.") from None
    return parse_data_list(text, str(path), split)


def parse_data_list(text: str, name: str = "data list", split: str = "train") -> list[DataEntry]:
    """Return the entries of a data list's text; messages use `name` for the file."""
    entries = FORMATS[detect_format(text, name)].read(text, name, split)
    if not entries:
        raise DataError(f"{name}: no entry. At least one shard is needed.")
    stated: dict[str, DataEntry] = {}
    for entry in entries:
        stated.setdefault(_kind(entry), entry)
    if len(stated) > 1:
        found = " and ".join(f"{kind} ({entry.prefix})" for kind, entry in stated.items())
        raise DataError(f"{name}: some entries state {found}. All must state the same.")
    return entries


def write_data_list(path: Path, entries: Sequence[DataEntry], format: str = "yaml") -> None:
    """Write a data list whole or not at all. Raises: DataError when the format cannot carry the entries."""
    write_text(path, render_data_list(entries, format))


def save_data_list(path: Path, text: str, *, overwrite: bool = False) -> None:
    """Write a rendered list to a file that a person named, whole or not at all; the same text again changes nothing.

    Raises: DataError when the file holds something else and `overwrite` is not given.
    """
    if path.is_dir():
        raise DataError(f"{path}: is a folder. Name a file.")
    if path.exists() and not overwrite:
        if path.read_bytes() == text.encode():
            return
        raise DataError(f"{path}: exists already and holds something else. Name another file, or give --overwrite.")
    try:
        write_text(path, text)
    except OSError as problem:
        raise DataError(f"{path}: cannot be written ({problem.strerror}). Make room, or name another place.") from None


def render_data_list(entries: Sequence[DataEntry], format: str = "yaml") -> str:
    """Return the text of a data list. Raises: DataError when the format cannot carry the entries."""
    if format not in FORMATS:
        raise DataError(f"format {format}: unknown. Use one of {', '.join(FORMATS)}.")
    buffered = [entry.prefix for entry in entries if entry.first_sample is not None]
    if buffered and format != "yaml":
        raise DataError(f"{buffered[0]}: comes from a replay buffer, whose position only the format yaml carries.")
    for entry in entries:
        try:
            f"{entry.prefix}{entry.corpus}".encode()
        except UnicodeEncodeError:
            raise DataError(f"{entry.prefix!r}: the name is not UTF-8. Rename the file or its folder.") from None
    text = FORMATS[format].render(entries)
    if not entries:
        raise DataError(f"format {format}: no entry to write. At least one shard is needed.")
    _check_round_trip(entries, text, format)
    return text


def detect_format(text: str, name: str = "data list") -> str:
    """Return the key in `FORMATS` that a text's content fits."""
    if text.lstrip().startswith("{"):
        return "json"
    if is_shell_list(text):
        return "llm-jp"
    lines = [line for _, line in content_lines(text)]
    if not lines:
        raise DataError(f"{name}: no entry. At least one shard is needed.")
    if lines[0].startswith(("- ", "[")):
        return "yaml"
    rows = [without_comment(line).split() for line in lines]
    starts_with_number = is_number(rows[0][0])
    if all("," in line for line in lines) and not starts_with_number:
        return "csv"
    if starts_with_number and len(rows[0]) == 2:
        return "weights"
    # a third column of numbers is a corpus's name (2024) where every line has it, else Megatron's next weight
    has_corpora = len(rows) > 1 and all(len(row) == 3 and is_number(row[0]) for row in rows)
    if starts_with_number and len(rows[0]) == 3 and (has_corpora or not is_number(rows[0][2])):
        return "blendcorpus"
    return "megatron"


def is_shell_list(text: str) -> bool:
    """Return whether a text assigns an array or a DATA_PATH as a shell does."""
    return bool(re.search(r"^\s*(?:export\s+|declare\s+(?:-\w+\s+)?)?(?:\w+=\(|\w*DATA_PATH=)", text, re.MULTILINE))


def _kind(entry: DataEntry) -> str:
    return "tokens" if entry.tokens is not None else "a weight" if entry.weight is not None else "neither"


def _check_round_trip(entries: Sequence[DataEntry], text: str, format: str) -> None:
    """Raise DataError unless a list reads back as what was written: not every format carries every path."""
    try:
        found = parse_data_list(text)
    except DataError:
        found = []
    for index, entry in enumerate(entries):
        back = found[index] if index < len(found) else None
        carries_corpus = format in ("yaml", "csv", "blendcorpus")
        same_corpus = back is not None and (back.corpus == (entry.corpus or None) or not carries_corpus)
        if (
            back is None
            or back.prefix != entry.prefix
            or not same_corpus
            or not _same_number(back.amount, entry.amount)
        ):
            raise DataError(
                f"{entry.prefix}{f' of {entry.corpus}' if entry.corpus else ''}: cannot be written in the format "
                f"{format}, which would read it as {back.prefix if back else 'something else'}. Use the format yaml."
            )


def _same_number(first: Fraction | None, second: Fraction | None) -> bool:
    if first is None or second is None:
        return first is second
    return first == second or float(first) == float(second)


FORMATS: dict[str, Format] = {
    "yaml": Format(
        meaning="this toolkit's own: tokens or weight, prefix, corpus",
        sample="- {tokens: 9242740213, prefix: data/en_text_document, corpus: en}\n",
        read=list_formats.read_yaml,
        render=list_formats.render_yaml,
    ),
    "llm-jp": Format(
        meaning="LLM-jp's shell array of tokens and prefixes; comments, assignments and $(calc REPEAT TOKENS PATH) too",
        sample="export TRAIN_DATA_PATH=(\n    9242740213 data/en_text_document\n)\n",
        read=list_formats.read_llm_jp,
        render=list_formats.render_llm_jp,
    ),
    "blendcorpus": Format(
        meaning="BlendCorpus, AuroraGPT: weight prefix corpus",
        sample="0.05 data/en_text_document en\n",
        read=list_formats.read_columns,
        render=list_formats.render_blendcorpus,
    ),
    "weights": Format(
        meaning="two columns: weight prefix",
        sample="0.05 data/en_text_document\n",
        read=list_formats.read_columns,
        render=list_formats.render_weights,
    ),
    "megatron": Format(
        meaning="Megatron's --data-path arguments or --data-args-path file",
        sample="0.3 data/en_text_document 0.7 data/ja_text_document\n",
        read=list_formats.read_megatron,
        render=list_formats.render_megatron,
    ),
    "json": Format(
        meaning="Megatron's --per-split-data-args-path file",
        sample='{"train": ["0.3", "data/en_text_document", "0.7", "data/ja_text_document"]}\n',
        read=list_formats.read_json,
        render=list_formats.render_json,
    ),
    "csv": Format(
        meaning="comma-separated `name,path,tokens`, or columns under a header: prefix, tokens or weight, corpus",
        sample="tokens,prefix,corpus\n9242740213,data/en_text_document,en\n",
        read=list_formats.read_csv,
        render=list_formats.render_csv,
    ),
}
