"""Corpora as they are named on a command line: `NAME=PATH`, several times a name for several paths."""

from collections.abc import Sequence
from pathlib import Path

from megatron_cpt.data.documents import Source, list_sources, plain_name
from megatron_cpt.errors import DataError


def named_corpora(inputs: Sequence[str]) -> dict[str, list[Source]]:
    """Return the sources of each corpus; an input without a name is a corpus named after its last part.

    Raises: DataError when an input matches nothing, or a file belongs to two corpora.
    """
    patterns: dict[str, list[str]] = {}
    for text in inputs:
        name, equals, path = text.partition("=")
        if not equals or "/" in name:
            name, path = plain_name(Path(text.rstrip("/*")).name) or "corpus", text
        patterns.setdefault(name, []).append(path)
    corpora = {name: list_sources(paths) for name, paths in patterns.items()}
    owners: dict[Path, str] = {}
    for name, sources in corpora.items():
        for source in sources:
            other = owners.setdefault(source.path.absolute(), name)
            if other != name:
                raise DataError(f"{source.path}: belongs to the corpora {other} and {name}. Name it once.")
    return corpora
