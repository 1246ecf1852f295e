"""Model soups: which tensors of several models can be merged, and their mean.

The mean streams tensor by tensor: the weighted sum in float32, divided once (weights of 1/3 applied before the sum
differ in 0.75 % of bf16 elements), then rounded. `merge_info.json` lists matched and unmatched names and every input's
hash.
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

from megatron_cpt.checkpoint.convert.choices import DEFAULT_SHARD_BYTES
from megatron_cpt.checkpoint.convert.hf_mcore import (
    DTYPES,
    NAMES_IN_CONFIG,
    claimed,
    remove_partial,
)
from megatron_cpt.checkpoint.huggingface.companion_files import keep_companions
from megatron_cpt.checkpoint.huggingface.folder import (
    HFFolder,
    OutputGroup,
    write_safetensors,
)
from megatron_cpt.checkpoint.huggingface.options import CONVERSION
from megatron_cpt.checkpoint.huggingface.read_config import config_differences, family_of_config
from megatron_cpt.checkpoint.huggingface.write_config import portable_config
from megatron_cpt.checkpoint.torch_dist.content import content_hash
from megatron_cpt.checkpoint.torch_dist.mcore import check_free_space
from megatron_cpt.errors import CheckpointError
from megatron_cpt.files import read_json, whole_dir, write_json

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
    listed = [model_names(folder) for folder in folders]
    everywhere = set.intersection(*(set(names) for names in listed))
    names = list(dict.fromkeys(name for part in listed for name in part))
    one_shape = {name for name in everywhere if len({folder.shape(name) for folder in folders}) == 1}
    return Comparison(
        matched=[name for name in names if name in one_shape],
        skipped=[name for name in names if name not in everywhere],
        mismatched=[name for name in names if name in everywhere and name not in one_shape],
    )


def model_names(folder: HFFolder) -> list[str]:
    """Return the names of a model's tensors, without an output layer that repeats tied embeddings.

    Raises: CheckpointError when embeddings are tied and the output layer is another.
    """
    if not folder.config.get("tie_word_embeddings"):
        return folder.names()
    try:
        family = family_of_config(folder.config)
        names = family.output_layer[0].hf[0], family.embedding[0].hf[0]
    except CheckpointError:
        names = "lm_head.weight", "model.embed_tokens.weight"
    return folder.names_to_claim(*names)


def check_mergeable(
    folders: Sequence[HFFolder], comparison: Comparison, allow: Sequence[str] = (), *, but: Sequence[str] = ()
) -> None:
    """Raise CheckpointError for what `allow` (skipped, mismatched, configuration, tokenizer) does not permit.

    `but`: fields of the model that are allowed to differ.
    """
    first = folders[0]
    problems = []
    if comparison.skipped and "skipped" not in allow:
        problems.append(f"{len(comparison.skipped)} tensors are in some models only, such as {comparison.skipped[0]}")
    if comparison.mismatched and "mismatched" not in allow:
        name = comparison.mismatched[0]
        shapes = " and ".join(sorted({str(list(folder.shape(name))) for folder in folders}))
        problems.append(f"{len(comparison.mismatched)} tensors differ in shape, such as {name} with {shapes}")
    for other in folders[1:]:
        found = config_differences(first.config, other.config)
        different = [difference for difference in found if difference.split(":")[0] not in but]
        if different and "configuration" not in allow:
            problems.append(f"configuration: {other.path} differs from {first.path} in {', '.join(different)}")
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
    """Write the weighted mean of Hugging Face folders to `output`; return it. The same mean, made already, is kept.

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

    info = merge_info(folders, shares, "linear", comparison, engine="megatron-cpt")
    info["dtype"] = dtype
    if is_merged(output, info):
        return output
    groups = [group(name) for name in model_names(first)]
    check_free_space(output, int(sum(part.num_bytes for part in groups) * 1.01) + (1 << 20))
    remove_partial(output)
    with whole_dir(output) as directory, claimed(directory):
        write_safetensors(directory, groups, max_shard_bytes=max_shard_bytes, num_workers=num_workers)
        keep_companions(first.path, directory)
        dtypes = [first.dtype(name) for name in model_names(first)] if cast is None else [cast]
        write_json(directory / "config.json", portable_config(first.config, NAMES_IN_CONFIG.get(dtypes[0])))
        write_json(directory / MERGE_INFO, info)
    logger.info("%s: %s", output, summary(comparison, len(folders)))
    return output


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
    folders: Sequence[HFFolder], weights: Sequence[Any], method: str, comparison: Comparison, *, engine: str
) -> dict[str, Any]:
    """Return what `merge_info.json` holds: inputs with their hashes, method, weights, names and their counts."""
    return {
        "method": method,
        "engine": engine,
        "inputs": [
            {
                "path": os.fspath(folder.path),
                "weight": weights[index] if index < len(weights) else None,
                "files": recorded_hashes(folder.path, folder.files),
                "tokenizer": _tokenizer_hashes(folder.path),
            }
            for index, folder in enumerate(folders)
        ],
        "counts": {key: len(getattr(comparison, key)) for key in ("matched", "skipped", "mismatched")},
        "skipped": comparison.skipped,
        "mismatched": comparison.mismatched,
        "matched": comparison.matched,
    }


def is_merged(output: Path, info: dict[str, Any]) -> bool:
    """Return whether `output` is a whole soup of the models, and made in the way, that `info` describes.

    Folders can have moved, so models are compared by their files' hashes.

    Raises: CheckpointError when there is something else.
    """
    if not output.exists():
        return False
    made = read_json(output / MERGE_INFO, CheckpointError) if (output / MERGE_INFO).exists() else {}
    HFFolder(output)  # raises where a file is cut short or missing
    if made and _made_of(made) == _made_of(json.loads(json.dumps(info))):
        logger.info("%s: kept, merged already of the same models", output)
        return True
    raise CheckpointError(
        f"{output}: exists already and was made of other models or in another way. A result is never overwritten. Remove "
        "it or choose another folder."
    )


def _made_of(info: dict[str, Any]) -> dict[str, Any]:
    inputs = [{key: value for key, value in entry.items() if key != "path"} for entry in info["inputs"]]
    return {key: info.get(key) for key in ("method", "engine", "dtype", "recipe")} | {"inputs": inputs}


def recorded_hashes(folder: Path, files: Sequence[Path]) -> dict[str, str]:
    """Return file name -> hash; that of `conversion.json` where the file has not been written since."""
    record_path = folder / CONVERSION
    record = read_json(record_path, CheckpointError) if record_path.is_file() else {}
    known = record.get("files", {}) if isinstance(record, dict) else {}
    hashes = {}
    for file in files:
        entry, status = known.get(file.name) or {}, file.stat()
        is_same = entry.get("bytes") == status.st_size and status.st_mtime_ns <= record_path.stat().st_mtime_ns
        hashes[file.name] = str(entry["hash"]) if is_same else content_hash(file)
    return hashes


def summary(comparison: Comparison, num_models: int) -> str:
    """Return one line about a soup."""
    return (
        f"{num_models} models, {len(comparison.matched)} tensors merged, {len(comparison.skipped)} skipped, "
        f"{len(comparison.mismatched)} with other shapes"
    )


def normalised_weights(paths: Sequence[Path], weights: Sequence[float] | None, *, has_base: bool) -> list[float]:
    """Return a weight per path: the given weights (a base's weight is optional, default 1), or all 1.

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
