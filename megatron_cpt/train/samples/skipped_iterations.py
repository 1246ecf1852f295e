"""Iterations that pass without a step, and the count of tokens per corpus without them.

Skipped iterations are listed in `data.skip_iterations` and `<run>/skip_iterations.txt`. The checkpoint stores the
iterations already skipped: adding a range of trained iterations later does not change the past.
"""

from pathlib import Path
from typing import Any

import numpy

from megatron_cpt.config.settings.batch_sizes import BatchSizes
from megatron_cpt.config.settings.iteration_ranges import Ranges, clipped, merged, parse_range, ranges_text, read_ranges
from megatron_cpt.config.settings.schema import DataConfig
from megatron_cpt.data.lists.data_list import DataEntry
from megatron_cpt.files import write_text
from megatron_cpt.run.directory import RunDir
from megatron_cpt.train.samples.stage_samples import BlendedSamples


def skipped_ranges(data: DataConfig, run: RunDir, manifest: dict[str, Any] | None) -> Ranges:
    """Return the iterations that a run skips: before the checkpoint what it did skip, after it what is to be skipped.

    Raises: ConfigError when the file holds something else.
    """
    wanted = merged([*map(parse_range, data.skip_iterations), *read_ranges(run.skip_iterations_path)])
    if manifest is None:
        return wanted
    passed = merged(map(parse_range, manifest.get("skipped_iterations", ())))
    future = clipped(wanted, int(manifest["iteration"]) + 1, max((last for _, last in wanted), default=0))
    return merged([*passed, *future])


def passed_ranges(ranges: Ranges, iteration: int) -> list[str]:
    """Return the skipped ranges among the first `iteration` iterations, as a checkpoint keeps them."""
    return ranges_text(clipped(ranges, 1, iteration))


def append_line(path: Path, line: str) -> None:
    """Add a line to `skip_iterations.txt`, which then appears whole."""
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    if before and not before.endswith("\n"):
        before += "\n"
    write_text(path, before + line)


def tokens_per_corpus(
    entries: list[DataEntry],
    dataset: BlendedSamples,
    sizes: BatchSizes,
    iterations: tuple[int, int],
    skipped: Ranges,
    seq_length: int,
    before: dict[str, int],
) -> dict[str, int]:
    """Return the tokens of each corpus up to the end of the last of `iterations`, without the skipped ones.

    `before` are those of the first `iterations[0]`, which can belong to another blend; the rest is counted from the
    blend's own index.
    """
    start, end = iterations

    def counts(first: int, last: int) -> Any:
        index = dataset.dataset_index[sizes.samples(first) : sizes.samples(last)]
        return numpy.bincount(index, minlength=len(entries))

    passed = clipped(skipped, start + 1, end)
    trained = counts(start, end) - sum(counts(first - 1, last) for first, last in passed)
    totals = dict(before)
    for entry, count in zip(entries, trained, strict=True):
        name = entry.corpus or entry.prefix
        totals[name] = totals.get(name, 0) + int(count) * seq_length
    return totals
