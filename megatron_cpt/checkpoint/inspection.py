"""Content of a checkpoint, differences of two, and a manifest for a foreign one."""

import dataclasses
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_cpt.checkpoint.foreign.opening import open_foreign
from megatron_cpt.checkpoint.torch_dist import mcore
from megatron_cpt.checkpoint.torch_dist.dcp import DcpReader
from megatron_cpt.config.settings.schema import ModelConfig
from megatron_cpt.errors import CheckpointError
from megatron_cpt.log import aligned, format_bytes, format_count

logger = logging.getLogger(__name__)

_OPTIMIZER = ("optimizer.", "chained_")


def describe_checkpoint(directory: Path, *, with_tensors: bool = False) -> str:
    """Return what a checkpoint's manifest and index say; `with_tensors`: a line per tensor."""
    manifest = mcore.read_manifest(directory)
    reader = DcpReader(directory)
    weights = [key for key in reader.tensor_keys() if not key.startswith(_OPTIMIZER)]
    rows = [
        ("iteration", str(manifest.get("iteration"))),
        ("content", str(manifest.get("content"))),
        ("consumed samples", str(manifest.get("consumed_samples"))),
        ("consumed tokens", format_count(manifest.get("consumed_tokens") or 0)),
        *((f"  {name}", format_count(count)) for name, count in (manifest.get("tokens_per_corpus") or {}).items()),
        ("layout at save", _layout(manifest.get("layout") or {})),
        ("tokenizer", str((manifest.get("tokenizer") or {}).get("name"))),
        ("parameters", format_count(sum(math.prod(reader.shape(key)) for key in weights))),
        ("tensors", f"{len(weights)} weights, {len(reader.tensor_keys()) - len(weights)} of the optimizer"),
        ("files", f"{len(manifest['files'])}, {format_bytes(sum(f['bytes'] for f in manifest['files'].values()))}"),
    ]
    text = aligned(rows)
    if with_tensors:
        tensors = [
            (key, "x".join(map(str, reader.shape(key))) or "scalar", str(reader.dtype(key)).removeprefix("torch."))
            for key in reader.tensor_keys()
        ]
        text += aligned(tensors)
    return text


@dataclass(frozen=True)
class Difference:
    """How two checkpoints differ."""

    settings: list[str]
    """`key: left -> right` of model and run configuration."""
    only_left: list[str]
    only_right: list[str]
    shapes: list[str]
    values: list[tuple[str, float, float]]
    """Weights that differ: key, largest |difference|, norm of the difference over the norm of the left."""
    equal: int
    """Weights that are equal bit by bit."""

    def text(self) -> str:
        """Return the difference as lines."""
        lines = [f"setting  {line}" for line in self.settings]
        lines += [f"only in the first   {key}" for key in self.only_left]
        lines += [f"only in the second  {key}" for key in self.only_right]
        lines += [f"shape    {line}" for line in self.shapes]
        rows = [(key, f"{largest:.3e}", f"{relative:.3e}") for key, largest, relative in self.values]
        table = aligned([("weight", "max |diff|", "relative"), *rows]) if rows else ""
        return "".join(f"{line}\n" for line in lines) + table + f"{self.equal} weights are equal bit by bit\n"


def diff_checkpoints(left: Path, right: Path) -> Difference:
    """Return how two checkpoints differ in settings and weights; one tensor of each is in memory at a time."""
    manifests = [mcore.read_manifest(path) for path in (left, right)]
    first, second = DcpReader(left), DcpReader(right)
    keys = [{key for key in reader.tensor_keys() if not key.startswith(_OPTIMIZER)} for reader in (first, second)]
    shapes, values, equal = [], [], 0
    for key in sorted(keys[0] & keys[1]):
        if first.shape(key) != second.shape(key):
            shapes.append(f"{key}: {list(first.shape(key))} -> {list(second.shape(key))}")
            continue
        before, after = first.read(key), second.read(key)
        if before.dtype == after.dtype and torch.equal(before, after):
            equal += 1
            continue
        change = (after.double() - before.double()).abs()
        values.append((key, change.max().item(), (change.norm() / before.double().norm().clamp_min(1e-30)).item()))
    settings = [
        change for section in ("model", "config") for change in _changes(section, *(m.get(section) for m in manifests))
    ]
    return Difference(settings, sorted(keys[0] - keys[1]), sorted(keys[1] - keys[0]), shapes, values, equal)


def adopt_checkpoint(directory: Path, model: ModelConfig) -> None:
    """Write a manifest for a `torch_dist` folder that Megatron-LM made, after reading its index.

    Raises: CheckpointError when there is a manifest already or the folder is no checkpoint.
    """
    if (directory / mcore.MANIFEST).exists():
        raise CheckpointError(f"{directory}: has a manifest already. Nothing is to be adopted.")
    iteration = mcore.iteration_of(directory)
    if iteration is None:
        raise CheckpointError(f"{directory}: is not called iter_NNNNNNN or release. Rename it as Megatron would.")
    foreign = open_foreign(directory, model)
    if foreign.missing:
        logger.warning("%s: adopted for its weights only: %s", directory, foreign.missing)
    mcore.write_manifest(
        directory,
        {
            "iteration": iteration,
            "consumed_samples": 0,
            "consumed_tokens": 0,
            "tokens_per_corpus": {},
            "layout": {},
            "tokenizer": None,
            "model": dataclasses.asdict(model),
            "config": None,
            "content": "full" if foreign.moments else "weights",
            "hf": None,
            "source": {"kind": "adopted"},
        },
    )


def _layout(layout: dict[str, Any]) -> str:
    return layout.get("text") or " ".join(f"{key.upper()}{value}" for key, value in layout.items())


def _changes(key: str, left: Any, right: Any) -> list[str]:
    if isinstance(left, dict) and isinstance(right, dict):
        return [
            change
            for name in sorted(left.keys() | right.keys())
            for change in _changes(f"{key}.{name}", left.get(name), right.get(name))
        ]
    return [] if left == right else [f"{key}: {left} -> {right}"]
