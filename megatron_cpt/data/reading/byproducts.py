"""Files that megatron-cpt writes next to documents, and how a scan of a folder distinguishes them from documents.

Reports and records of ours are JSON objects whose first key is `megatron_cpt` (its value is their kind), so that a
folder of documents can hold them under any name. Manifests of shards are next to an `.idx` of their name. Rejected
lines are in files that end in `.rejects` or `.rejects.jsonl`. None of them is read as documents unless it is named
explicitly.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from megatron_cpt.files import write_json

MARK = "megatron_cpt"
_PARTIAL = re.compile(r"\.(.+)\.[^.]+\.partial")
_START = b'{\n  "megatron_cpt": "'


def write_record(path: Path, kind: str, value: Mapping[str, Any]) -> dict[str, Any]:
    """Write a report or record as JSON with our mark, whole or not at all; return what was written."""
    record = {MARK: kind, **value}
    write_json(path, record)
    return record


def rejects_beside(path: Path) -> Path:
    """Return the file of the lines that were left out of a document file."""
    return path.with_name(path.name + ".rejects")


def remove_partials(files: Iterable[Path]) -> None:
    """Remove what a killed process left half-written of the files; each folder is listed once."""
    names: dict[Path, set[str]] = {}
    for file in files:
        names.setdefault(file.parent, set()).add(file.name)
    for folder, wanted in names.items():
        for path in folder.glob(".*.partial") if folder.is_dir() else ():
            match = _PARTIAL.fullmatch(path.name)
            if match and match[1] in wanted:
                path.unlink(missing_ok=True)


def is_own(path: Path) -> bool:
    """Return whether a file of a document format is one of ours: a report, a manifest, rejected lines."""
    if path.name.endswith(".rejects.jsonl"):
        return True
    if not path.name.endswith(".json"):
        return False
    if path.with_suffix(".idx").exists():
        return True
    try:
        with path.open("rb") as file:
            return file.read(len(_START)) == _START
    except OSError:
        return False
