"""Curves of a stage as columns short enough for a page: buckets of equal numbers of records, with mean, minimum and maximum.

A million logged steps become a few thousand points a curve; a spike stays visible, since a bucket keeps its extremes.
"""

import math
from collections.abc import Sequence
from typing import Any

from megatron_cpt.evaluate.report.stages import Stage

TRAIN_COLUMNS = ("lr", "grad_norm", "tokens_per_second", "tflops_per_gpu", "step_seconds", "global_batch_size")
"""Keys of a training record that are drawn directly; loss and the share of waiting for data are computed from
others."""
TRAIN_FIELDS = frozenset(
    ("kind", "iteration", "consumed_tokens", "loss", "time", "data_seconds", "memory_bytes", "eta_seconds")
) | set(TRAIN_COLUMNS)
"""Part of a training record that a page keeps."""
MOST_POINTS, FEWEST_POINTS, POINTS_OF_A_PAGE = 2000, 200, 24000


def points_per_stage(num_stages: int) -> int:
    """Return how many points a curve of each stage has at most, so that a page of many stages stays a few megabytes."""
    return max(min(MOST_POINTS, POINTS_OF_A_PAGE // max(num_stages, 1)), FEWEST_POINTS)


def train_curves(stage: Stage, most: int) -> dict[str, list[float | None]]:
    """Return the columns of a stage's training records; `loss_low` and `loss_high` are the extremes of a bucket."""
    buckets = _buckets(stage.train, most)
    columns: dict[str, list[float | None]] = {
        "tokens": [stage.offset_tokens + bucket[-1]["consumed_tokens"] for bucket in buckets],
        "iteration": [bucket[-1]["iteration"] for bucket in buckets],
        "hours": _hours(stage, [bucket[-1] for bucket in buckets]),
        "loss": [_mean([record["loss"] for record in bucket]) for bucket in buckets],
    }
    if any(len(bucket) > 1 for bucket in buckets):
        columns["loss_low"] = [_short(min(record["loss"] for record in bucket)) for bucket in buckets]
        columns["loss_high"] = [_short(max(record["loss"] for record in bucket)) for bucket in buckets]
    for name in TRAIN_COLUMNS:
        values = [_mean([record.get(name) for record in bucket]) for bucket in buckets]
        if any(value is not None for value in values):
            columns[name] = values
    waits = [_mean([_data_share(record) for record in bucket]) for bucket in buckets]
    if any(wait is not None for wait in waits):
        columns["data_share"] = waits
    return columns


def validation_curves(stage: Stage, most: int) -> dict[str, dict[str, list[float | None]]]:
    """Return corpus -> columns of its validations: bits per byte where every one has them, else the loss."""
    curves = {}
    for corpus in dict.fromkeys(record["corpus"] for record in stage.validation):
        records = [record for record in stage.validation if record["corpus"] == corpus]
        records = [bucket[-1] for bucket in _buckets(records, most)]
        key = "bits_per_byte" if all(record.get("bits_per_byte") is not None for record in records) else "loss"
        curves[corpus] = {
            "tokens": [stage.offset_tokens + record["consumed_tokens"] for record in records],
            "iteration": [record["iteration"] for record in records],
            "hours": _hours(stage, records),
            key: [_short(record[key]) for record in records],
        }
    return curves


def _buckets(records: Sequence[dict[str, Any]], most: int) -> list[Sequence[dict[str, Any]]]:
    size = math.ceil(len(records) / most) or 1
    return [records[start : start + size] for start in range(0, len(records), size)]


def _hours(stage: Stage, records: Sequence[dict[str, Any]]) -> list[float | None]:
    """Return hours since the stage's first record; None where the metrics carry no time."""
    begin = next((record["time"] for record in [*stage.starts, *stage.train] if record.get("time")), None)
    return [
        None if begin is None or not record.get("time") else round((record["time"] - begin) / 3600, 5)
        for record in records
    ]


def _data_share(record: dict[str, Any]) -> float | None:
    step, data = record.get("step_seconds"), record.get("data_seconds")
    return data / step if step and data is not None else None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return _short(math.fsum(known) / len(known)) if known else None


def _short(value: float) -> float:
    """Return a value with six digits: a page shows no more, and each digit costs a byte a point."""
    return float(f"{value:.6g}")
