"""Corpora of a command line: `NAME=PATH`; repeat a name for several paths."""

import glob
from collections.abc import Sequence
from pathlib import Path, PurePath

from megatron_cpt.data.reading.documents import Source, list_sources, plain_name
from megatron_cpt.errors import DataError


def named_corpora(inputs: Sequence[str], keep_bad_files: bool = False) -> dict[str, list[Source]]:
    """Return the sources of each corpus; an input without a name is a corpus named after its last part without wildcards.

    A folder or file that exists is a path also where it has an equals sign (`lang=ja/part.parquet`).

    Raises: DataError when an input matches nothing, two inputs without a name get the same one, a name cannot be a
    folder's, or a file belongs to two corpora.
    """
    patterns: dict[str, list[str]] = {}
    unnamed: dict[str, str] = {}
    for text in inputs:
        name, equals, path = text.partition("=")
        if not equals or "/" in name or Path(text).exists():
            name, path = _last_part(text), text
            if other := unnamed.get(name):
                raise DataError(f"{text}, {other}: would both be the corpus {name}. Name them: NAME={text}.")
            unnamed[name] = text
        if name in ("", ".", "..") or name.startswith("."):
            raise DataError(f"{text}: {name!r} cannot name a corpus. Write NAME=PATH with a name fit for a folder.")
        patterns.setdefault(name, []).append(path)
    corpora = {name: list_sources(paths, keep_bad_files=keep_bad_files) for name, paths in patterns.items()}
    owners: dict[Path, str] = {}
    for name, sources in corpora.items():
        for source in sources:
            other = owners.setdefault(source.path.absolute(), name)
            if other != name:
                raise DataError(f"{source.path}: belongs to the corpora {other} and {name}. Name it once.")
    return corpora


def _last_part(text: str) -> str:
    parts = [part for part in PurePath(text).parts if not glob.has_magic(part)] if glob.has_magic(text) else []
    name = parts[-1] if parts else Path(text).absolute().name
    return plain_name(name.strip("/")) or "corpus"
