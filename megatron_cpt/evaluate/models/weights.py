"""Numbers about weights: per tensor minimum, maximum, mean and norm; per layer the distance from a base model.

The distance of a group of weights in one layer is `||w - w_base|| / ||w_base||`, Frobenius norms in fp64 over all its
tensors, as in SnakModel's analysis of how far adaptation moved each layer.
"""

import math
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_cpt.checkpoint.huggingface.folder import HFFolder
from megatron_cpt.errors import CheckpointError
from megatron_cpt.evaluate.models.folders import hf_folder
from megatron_cpt.evaluate.models.forgetting import markdown_table

_LAYER = re.compile(r"\.layers\.(\d+)\.(.+)")
GROUPS = {"attention": ("self_attn", "attention"), "feed-forward": ("mlp", "block_sparse_moe"), "norms": ("norm",)}
OUTSIDE_LAYERS = "embeddings and output"


@dataclass(frozen=True, kw_only=True)
class TensorStats:
    """Statistics of one tensor in `analyze stats`."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    minimum: float
    maximum: float
    mean: float
    norm: float
    nonfinite: int


def tensor_stats(path: Path) -> list[TensorStats]:
    """Return the statistics of every tensor of a Hugging Face folder or Megatron checkpoint, one in memory at a time."""
    with hf_folder(path) as folder_path:
        folder = HFFolder(folder_path)
        return [_stats(name, folder.read(name)) for name in folder.names()]


def stats_table(stats: list[TensorStats]) -> str:
    """Return statistics as a Markdown table, a row per tensor."""
    rows = [
        [
            found.name,
            "x".join(map(str, found.shape)),
            found.dtype,
            *(f"{value:.4g}" for value in (found.minimum, found.maximum, found.mean, found.norm)),
            str(found.nonfinite),
        ]
        for found in stats
    ]
    heads = ["tensor", "shape", "type", "min", "max", "mean", "norm", "not finite"]
    return markdown_table(heads, rows, num_left=3)


def layer_divergence(path: Path, base_path: Path) -> dict[str, list[float]]:
    """Return group of weights -> relative distance from the base per layer.

    Embeddings and output layer are a group of one value.

    Raises: CheckpointError when the two models do not have the same tensors.
    """
    moved: dict[tuple[str, int], float] = defaultdict(float)
    size: dict[tuple[str, int], float] = defaultdict(float)
    with hf_folder(path) as folder_path, hf_folder(base_path) as base_folder_path:
        model, base = HFFolder(folder_path), HFFolder(base_folder_path)
        different = set(model.names()) ^ set(base.names())
        if different:
            raise CheckpointError(
                f"{path}: {len(different)} tensors are in one of it and {base_path} only ({min(different)}). "
                "Models of the same architecture are needed."
            )
        for name in base.names():
            before, after = base.read(name).double(), model.read(name).double()
            if before.shape != after.shape:
                raise CheckpointError(
                    f"{path}: {name} is {list(after.shape)}, in {base_path} {list(before.shape)}. "
                    "Models of the same architecture are needed."
                )
            key = _group(name)
            moved[key] += (after - before).square().sum().item()
            size[key] += before.square().sum().item()
    divergence: dict[str, list[float]] = {}
    for group in (*GROUPS, OUTSIDE_LAYERS):
        layers = sorted(layer for name, layer in size if name == group)
        if layers:
            divergence[group] = [
                math.sqrt(moved[group, layer] / size[group, layer]) if size[group, layer] else 0.0 for layer in layers
            ]
    return divergence


def divergence_table(divergence: dict[str, dict[str, list[float]]]) -> str:
    """Return distances as a Markdown table: a row per model and group of weights, a column per layer."""
    num_layers = max(len(values) for groups in divergence.values() for values in groups.values())
    rows = [
        [model, group, *(f"{value:.4f}" for value in values), *[""] * (num_layers - len(values))]
        for model, groups in divergence.items()
        for group, values in groups.items()
    ]
    return markdown_table(["model", "weights", *map(str, range(num_layers))], rows, num_left=2)


def _group(name: str) -> tuple[str, int]:
    match = _LAYER.search(name)
    if match is None:
        return OUTSIDE_LAYERS, 0
    for group, parts in GROUPS.items():
        if group != "norms" and any(part in match[2] for part in parts) and "layernorm" not in match[2]:
            return group, int(match[1])
    return "norms", int(match[1])


def _stats(name: str, tensor: torch.Tensor) -> TensorStats:
    values = tensor.double() if tensor.is_floating_point() else tensor.to(torch.float64)
    return TensorStats(
        name=name,
        shape=tuple(tensor.shape),
        dtype=str(tensor.dtype).removeprefix("torch."),
        minimum=values.min().item(),
        maximum=values.max().item(),
        mean=values.mean().item(),
        norm=values.norm().item(),
        nonfinite=int((~values.isfinite()).sum().item()),
    )
