"""Which sources of document files make which output: mirrored one by one, or grouped by size within folders or across them."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_cpt.data.cleaning.rewrite import COMPRESSIONS, Rewriting, record_path
from megatron_cpt.data.reading.documents import Source, plain_name
from megatron_cpt.data.reading.grouping import even_groups, groups_of, packed_share
from megatron_cpt.errors import ConfigError, DataError
from megatron_cpt.files import read_json


@dataclass(frozen=True, kw_only=True)
class Grouping:
    """How files are merged."""

    target_bytes: int | None = None
    """Input bytes per output, about; None: one output per source."""
    num_files: int | None = None
    """Alternative: total number of outputs, of similar size, independent of the folders."""
    is_across_folders: bool = False
    """Whether files of different folders are merged."""
    is_split: bool = False
    """Whether a source that is larger than the target is cut into parts behind a line."""


def plan_tree_of_files(
    sources: Sequence[Source],
    output_dir: Path,
    grouping: Grouping = Grouping(),
    part: tuple[int, int] | None = None,
    **settings: Any,
) -> list[Rewriting]:
    """Return one rewriting per source, mirroring the tree, or per group of sources of a format.

    `part` (i, n) leaves every n-th rewriting from the i-th on, in the order of size, for the members of a job array.

    Raises: DataError when two sources would have the same output, an output exists that is not ours, or an earlier run
    with another target size or compression left files of the same sources in the folder.
    """
    compression = settings.get("compression", "none")
    if compression not in COMPRESSIONS:
        raise ConfigError(f"compression is {compression!r}. Choose one of {', '.join(COMPRESSIONS)}.")
    is_merge = grouping.target_bytes is not None or grouping.num_files is not None
    if is_merge and settings.get("txt_documents") == "file" and any(s.format == "txt" for s in sources):
        raise ConfigError(
            "text files that are one document each (--txt-documents file) cannot be merged. Leave them out."
        )
    suffix = "" if compression == "none" else f".{compression}"
    rewritings: dict[Path, Rewriting] = {}
    for name, format, group, target in _outputs(sources, output_dir, grouping):
        output = name.with_name(f"{name.name}.{format}{suffix}")
        if output in rewritings:
            other = rewritings[output].sources[0].path
            raise DataError(f"{group[0].path} and {other}: would both become {output}. Exclude one of them.")
        if any(output.absolute() == source.path.absolute() for source in group):
            raise DataError(f"{output}: is its own source. Choose another --output-dir.")
        rewritings[output] = Rewriting(sources=tuple(group), output=output, part_bytes=target, **settings)
    _check_folders(rewritings)
    planned = list(rewritings.values())
    if part is None:
        return planned
    sizes = [sum(source.size for source in work.sources) for work in planned]
    by_size = sorted(range(len(planned)), key=lambda index: (-sizes[index], index))
    return [planned[index] for index in sorted(by_size[part[0] :: part[1]])]


def _outputs(
    sources: Sequence[Source], output_dir: Path, grouping: Grouping
) -> list[tuple[Path, str, list[Source], int | None]]:
    """Return (path without suffixes, format, sources, plain bytes of a part or None) of each output."""
    found: list[tuple[Path, str, list[Source], int | None]] = []
    groups: dict[tuple[Path, str], list[Source]] = {}
    for source in sources:
        format = "txt" if source.format == "txt" else "jsonl"
        folder = output_dir / source.relative.parent
        target = grouping.target_bytes
        if grouping.is_split and target is not None and source.size > target and not source.problem:
            name = plain_name(source.relative.name)
            found.append((folder / name, format, [source], int(target / packed_share(source))))
        elif target is None and grouping.num_files is None:
            found.append((folder / plain_name(source.relative.name), format, [source], None))
        else:
            is_across = grouping.is_across_folders or grouping.num_files is not None
            groups.setdefault((output_dir if is_across else folder, format), []).append(source)
    for (folder, format), members in groups.items():
        if grouping.num_files is not None:
            merged = even_groups(members, grouping.num_files)
        else:
            merged = groups_of(members, grouping.target_bytes or 0)
        name = "documents" if folder == output_dir else folder.name
        for number, group in enumerate(merged):
            found.append((folder / f"{name}-{number:05d}", format, group, None))
    return found


def _check_folders(rewritings: Mapping[Path, Rewriting]) -> None:
    """Refuse outputs that are not ours, and older outputs of the same sources in the folder."""
    makers = {os.path.abspath(source.path): work.output for work in rewritings.values() for source in work.sources}
    for output in rewritings:
        if rewritings[output].part(0).exists() and not record_path(output).exists():
            raise DataError(f"{output}: exists already, from other work. Remove it or choose another --output-dir.")
    for folder in {output.parent for output in rewritings}:
        for path in sorted(folder.glob(".*.sources.json")):
            output = path.with_name(path.name[1:].removesuffix(".sources.json"))
            if output in rewritings or not (output.exists() or list(folder.glob(f"{plain_name(output.name)}-part-*"))):
                continue
            for entry in read_json(path, DataError)["identity"]["sources"]:
                if entry["path"] in makers:
                    raise DataError(
                        f"{output}: holds {entry['path']} from an earlier run, which would go to "
                        f"{makers[entry['path']]} as well. Remove it or choose another --output-dir."
                    )
