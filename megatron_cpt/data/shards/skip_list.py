"""Documents that a run leaves out: lines `<prefix> <first document> <last document>`, both counted from 0 and included.

Lines that are blank or start with # are passed over. `megatron-cpt data trace` lists the documents of a bad batch.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from megatron_cpt.config.settings.schema import RunConfig
from megatron_cpt.data.lists.formats import content_lines
from megatron_cpt.data.shards.indexed import idx_path
from megatron_cpt.errors import DataError

SkipList = Mapping[str, Sequence[tuple[int, int]]]
"""Per prefix the spans (first, last) of documents to leave out, sorted and apart from each other."""


def read_skip_list(path: Path) -> dict[str, list[tuple[int, int]]]:
    """Return the spans of a skip-list file per prefix; overlapping ones are joined.

    Raises: DataError with file and line.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file. A skip list is needed.") from None
    except (UnicodeDecodeError, IsADirectoryError) as problem:
        raise DataError(f"{path}: not a text file ({problem}). A skip list is needed.") from None
    spans: dict[str, list[tuple[int, int]]] = {}
    for number, line in content_lines(text):
        words = line.rsplit(maxsplit=2)  # a prefix may hold spaces
        if len(words) != 3 or not (words[1].isdecimal() and words[2].isdecimal()) or int(words[1]) > int(words[2]):
            raise DataError(f"{path}:{number}: '{line}'. `<prefix> <first document> <last document>` is needed.")
        spans.setdefault(words[0], []).append((int(words[1]), int(words[2])))
    return {prefix: _join(found) for prefix, found in spans.items()}


def stage_skip_list(config: RunConfig) -> dict[str, list[tuple[int, int]]]:
    """Return the skip list of `data.skip_list` with prefixes as a blend names them; empty where there is none.

    Raises: DataError when a line names no shard, so that nothing is skipped: documents would be read that must not be.
    """
    if config.data.skip_list is None:
        return {}
    data_dir = Path(config.paths.data_dir)
    path = data_dir / config.data.skip_list
    spans = read_skip_list(path)
    if missing := [prefix for prefix in spans if not _exists(prefix, data_dir)]:
        raise DataError(
            f"{path}: {missing[0]} is no shard, neither as it stands nor in {data_dir}. Correct the prefix."
        )
    found: dict[str, list[tuple[int, int]]] = {}
    for prefix, parts in spans.items():
        for name in {str(Path(prefix)), str(data_dir / prefix), os.path.normpath(data_dir / prefix)}:
            found[name] = _join([*found.get(name, []), *parts])
    return found


def _exists(prefix: str, data_dir: Path) -> bool:
    return any(idx_path(path).exists() for path in (Path(prefix), data_dir / prefix))


def unread_prefixes(config: RunConfig, prefixes: Sequence[str]) -> list[str]:
    """Return the prefixes of the skip list that are none of these."""
    if config.data.skip_list is None:
        return []
    data_dir = Path(config.paths.data_dir)
    read = {os.path.realpath(prefix) for prefix in prefixes}
    listed = read_skip_list(data_dir / config.data.skip_list)
    return [prefix for prefix in listed if not {os.path.realpath(prefix), os.path.realpath(data_dir / prefix)} & read]


def kept_documents(num_documents: int, spans: Sequence[tuple[int, int]]) -> np.ndarray:
    """Return the numbers of the documents that stay, int32 [kept].

    Raises: DataError when a span lies outside of the shard.
    """
    if not spans:
        return np.arange(num_documents, dtype=np.int32)
    keep = np.ones(num_documents, dtype=bool)
    for first, last in spans:
        if last >= num_documents:
            raise DataError(f"skip list: documents {first} to {last} of a shard that has {num_documents}.")
        keep[first : last + 1] = False
    return np.flatnonzero(keep).astype(np.int32)


def _join(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    joined: list[tuple[int, int]] = []
    for first, last in sorted(spans):
        if joined and first <= joined[-1][1] + 1:
            joined[-1] = (joined[-1][0], max(last, joined[-1][1]))
        else:
            joined.append((first, last))
    return joined
