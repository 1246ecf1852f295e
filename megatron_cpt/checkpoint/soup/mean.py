"""Model soups: which tensors of several models can be merged, and their mean.

The mean streams tensor by tensor: the weighted sum in float32, divided once (weights of 1/3 applied before the sum differ
in 0.75 % of bf16 elements), then rounded. What matched and what did not goes into `merge_info.json` with every input's hash.
"""

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_cpt.checkpoint.convert.hf_mcore import (
    DEFAULT_SHARD_BYTES,
    DTYPES,
    NAMES_IN_CONFIG,
    claimed,
    remove_partial,
)
from megatron_cpt.checkpoint.huggingface.folder import (
    SIDE_FILES,
    HFFolder,
    OutputGroup,
    copy_side_files,
    write_safetensors,
)
from megatron_cpt.checkpoint.huggingface.read_config import architecture_keys
from megatron_cpt.checkpoint.torch_dist.mcore import check_free_space
from megatron_cpt.errors import CheckpointError
from megatron_cpt.files import file_hash, read_json, whole_dir, write_json

logger = logging.getLogger(__name__)

MERGE_INFO = "merge_info.json"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")


@dataclass(frozen=True)
class Comparison:
    """Tensor names of several models, by whether they can be merged."""

    matched: list[str]
    """In every model, with one shape."""
    skipped: list[str]
    """In some models only."""
    mismatched: list[str]
    """In every model, with several shapes."""


def compare_models(folders: Sequence[HFFolder]) -> Comparison:
    """Return which tensors can be merged; the order is the first model's."""
    sets = [set(folder.names()) for folder in folders]
    everywhere = set.intersection(*sets)
    names = list(dict.fromkeys(name for folder in folders for name in folder.names()))
    one_shape = {name for name in everywhere if len({folder.shape(name) for folder in folders}) == 1}
    return Comparison(
        matched=[name for name in names if name in one_shape],
        skipped=[name for name in names if name not in everywhere],
        mismatched=[name for name in names if name in everywhere and name not in one_shape],
    )


def check_mergeable(folders: Sequence[HFFolder], comparison: Comparison, allow: Sequence[str] = ()) -> None:
    """Raise CheckpointError for what `allow` (skipped, mismatched, configuration, tokenizer) does not permit."""
    first = folders[0]
    problems = []
    if comparison.skipped and "skipped" not in allow:
        problems.append(f"{len(comparison.skipped)} tensors are in some models only, such as {comparison.skipped[0]}")
    if comparison.mismatched and "mismatched" not in allow:
        name = comparison.mismatched[0]
        shapes = " and ".join(sorted({str(list(folder.shape(name))) for folder in folders}))
        problems.append(f"{len(comparison.mismatched)} tensors differ in shape, such as {name} with {shapes}")
    for other in folders[1:]:
        left, right = architecture_keys(first.config), architecture_keys(other.config)
        keys = sorted(key for key in {*left, *right} if left.get(key) != right.get(key))
        if keys and "configuration" not in allow:
            problems.append(f"configuration: {other.path} differs from {first.path} in {', '.join(keys)}")
        if _differ(_tokenizer_hashes(first.path), _tokenizer_hashes(other.path)) and "tokenizer" not in allow:
            problems.append(f"tokenizer: {other.path} has another one than {first.path}")
    if problems:
        raise CheckpointError(
            f"soup: {'; '.join(problems)}. Models of one soup must match. "
            "Use --allow skipped, mismatched, configuration or tokenizer where a difference is meant."
        )


def average_hf(
    models: Sequence[Path],
    output: Path,
    *,
    weights: Sequence[float] | None = None,
    base: Path | None = None,
    dtype: str | None = None,
    allow: Sequence[str] = (),
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    num_workers: int = 2,
) -> Path:
    """Write the weighted mean of Hugging Face folders to `output`; return it.

    `base`, when given, is one more model of the average (OpenSeek's rule) and comes first: the output has its tensors,
    configuration and tokenizer, and tensors that do not match stay as it has them, where `allow` permits that at all.
    """
    paths = [base, *models] if base is not None else list(models)
    shares = normalised_weights(paths, weights, has_base=base is not None)
    folders = [HFFolder(path) for path in paths]
    comparison = compare_models(folders)
    check_mergeable(folders, comparison, allow)
    first, matched = folders[0], set(comparison.matched)
    cast = DTYPES[dtype] if dtype else None

    def group(name: str) -> OutputGroup:
        target = cast if cast is not None and first.dtype(name).is_floating_point else first.dtype(name)

        def build() -> Sequence[torch.Tensor]:
            if name not in matched:
                return [first.read(name).to(target)]
            return [weighted_mean([partial(folder.read, name) for folder in folders], shares).to(target)]

        return OutputGroup(((name, first.shape(name), target),), build)

    if output.exists() and _is_made(
        output, merge_info(folders, shares, "linear", comparison, engine="megatron-cpt"), cast
    ):
        logger.info("%s: kept, it was made of the same models", output)
        return output
    groups = [group(name) for name in first.names()]
    check_free_space(output, int(sum(part.num_bytes for part in groups) * 1.01) + (1 << 20))
    remove_partial(output)
    with whole_dir(output) as directory, claimed(directory):
        write_safetensors(directory, groups, max_shard_bytes=max_shard_bytes, num_workers=num_workers)
        copy_side_files(first.path, directory, (*SIDE_FILES, "generation_config.json", "*.py"))
        config = dict(first.config)
        if cast is not None:
            config["dtype"] = config["torch_dtype"] = NAMES_IN_CONFIG[cast]
        write_json(directory / "config.json", config)
        write_json(directory / MERGE_INFO, merge_info(folders, shares, "linear", comparison, engine="megatron-cpt"))
    logger.info("%s: %s", output, summary(comparison, len(folders)))
    return output


def _is_made(output: Path, info: dict[str, Any], cast: torch.dtype | None) -> bool:
    """Return whether a folder holds the very soup that is asked for, whole by its headers."""
    if not (output / MERGE_INFO).is_file() or read_json(output / MERGE_INFO, CheckpointError) != json.loads(
        json.dumps(info)
    ):
        return False
    made = HFFolder(output)
    return cast is None or made.config.get("dtype") == NAMES_IN_CONFIG[cast]


def weighted_mean(reads: Sequence[Callable[[], torch.Tensor]], weights: Sequence[float]) -> torch.Tensor:
    """Return the weighted mean in float32 (integers must be equal); one input is in memory at a time.

    Raises: CheckpointError when integer tensors differ.
    """
    total = None
    for read, weight in zip(reads, weights, strict=True):
        values = read()
        if not values.is_floating_point():
            if total is not None and not torch.equal(total, values):
                raise CheckpointError("soup: integer tensors differ between the models and have no mean.")
            total = values
        elif total is None:
            total = values.float() if weight == 1 else values.float() * weight
        else:
            total.add_(values.float(), alpha=weight)
    if total is None:
        raise CheckpointError("soup: no models.")
    return total if not total.is_floating_point() else total.div_(sum(weights))


def uniform_soup(candidates: Sequence[Path], output: Path, **options: Any) -> Path:
    """Write the plain mean of all candidates to `output`; return it."""
    return average_hf(candidates, output, **options)


def greedy_soup(
    candidates: Sequence[Path], output: Path, score: Callable[[Path], float], **options: Any
) -> tuple[Path, list[dict[str, Any]]]:
    """Write the mean of the candidates that each lower `score` (such as held-out bits per byte); return it and the steps.

    The best candidate starts; the others are tried in the order of their own scores. The steps are in `merge_info.json` too.

    Source: arXiv:2203.05482, Recipe 1.
    """
    scored = sorted(((score(path), path) for path in candidates), key=lambda pair: pair[0])
    best, chosen = scored[0][0], [scored[0][1]]
    steps: list[dict[str, Any]] = [{"added": os.fspath(chosen[0]), "score": best, "kept": True}]
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.greedy-") as scratch:
        for number, (_, path) in enumerate(scored[1:]):
            trial = score(average_hf([*chosen, path], Path(scratch) / str(number), **options))
            steps.append({"added": os.fspath(path), "score": trial, "kept": trial <= best})
            if trial <= best:
                best, chosen = trial, [*chosen, path]
            shutil.rmtree(Path(scratch) / str(number))
    average_hf(chosen, output, **options)
    info = json.loads((output / MERGE_INFO).read_text(encoding="utf-8"))
    write_json(output / MERGE_INFO, {**info, "method": "greedy", "greedy_steps": steps})
    return output, steps


def merge_info(
    folders: Sequence[HFFolder], weights: Sequence[float], method: str, comparison: Comparison, *, engine: str
) -> dict[str, Any]:
    """Return what `merge_info.json` holds: inputs with their hashes, method, weights, names and their counts."""
    return {
        "method": method,
        "engine": engine,
        "inputs": [
            {
                "path": os.fspath(folder.path),
                "weight": weights[index] if index < len(weights) else None,
                "files": {file.name: file_hash(file) for file in folder.files},
                "tokenizer": _tokenizer_hashes(folder.path),
            }
            for index, folder in enumerate(folders)
        ],
        "counts": {key: len(getattr(comparison, key)) for key in ("matched", "skipped", "mismatched")},
        "skipped": comparison.skipped,
        "mismatched": comparison.mismatched,
        "matched": comparison.matched,
    }


def summary(comparison: Comparison, num_models: int) -> str:
    """Return one line about a soup."""
    return (
        f"{num_models} models, {len(comparison.matched)} tensors merged, {len(comparison.skipped)} skipped, "
        f"{len(comparison.mismatched)} with other shapes"
    )


def normalised_weights(paths: Sequence[Path], weights: Sequence[float] | None, *, has_base: bool) -> list[float]:
    """Return a weight per path: those given (the base's, where there is one, may be left out and is 1), else all 1.

    Raises: CheckpointError when their number or sum makes no mean.
    """
    if not paths:
        raise CheckpointError("soup: no models. Name at least one.")
    shares = [1.0] * len(paths) if weights is None else [float(weight) for weight in weights]
    if has_base and len(shares) == len(paths) - 1:
        shares = [1.0, *shares]
    if len(shares) != len(paths):
        raise CheckpointError(f"soup: {len(shares)} weights for {len(paths)} models. Give one for each.")
    if sum(shares) <= 0:
        raise CheckpointError(f"soup: the weights sum to {sum(shares)}. A positive sum is needed.")
    return shares


def _tokenizer_hashes(path: Path) -> dict[str, str]:
    return {
        name: hashlib.blake2b((path / name).read_bytes(), digest_size=16).hexdigest()
        for name in _TOKENIZER_FILES
        if (path / name).exists()
    }


def _differ(left: dict[str, str], right: dict[str, str]) -> bool:
    return any(left[name] != right[name] for name in left.keys() & right.keys())
