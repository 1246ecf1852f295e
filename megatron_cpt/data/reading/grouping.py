"""Runs of sources of about the same size, in their order; files are never cut here."""

from collections.abc import Sequence

from megatron_cpt.data.reading.documents import Source


def even_groups(sources: Sequence[Source], number: int) -> list[list[Source]]:
    """Return at most `number` runs of sources of similar size, in order; none is empty."""
    total = sum(source.size for source in sources)
    groups: list[list[Source]] = [[] for _ in range(number)]
    before = 0
    for index, source in enumerate(sources):
        middle = (before + source.size / 2) / total if total else index / len(sources)
        groups[min(int(middle * number), number - 1)].append(source)
        before += source.size
    return [group for group in groups if group]


def groups_of(sources: Sequence[Source], target_bytes: float) -> list[list[Source]]:
    """Return runs of sources of about `target_bytes`, in order."""
    groups: list[list[Source]] = []
    filled = target_bytes
    for source in sources:
        if filled + source.size / 2 >= target_bytes:
            groups.append([])
            filled = 0.0
        groups[-1].append(source)
        filled += source.size
    return groups


def packed_share(source: Source) -> float:
    """Return bytes on disk per byte of plain file, by format; a rough figure is enough to group by."""
    return {None: 1.0, "gz": 0.35, "zst": 0.33, "xz": 0.28, "bz2": 0.3}[source.compression]
