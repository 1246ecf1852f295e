"""Averages of Megatron checkpoints without exports: `torch_dist` in, `torch_dist` or a Hugging Face folder out, streaming."""

import json
import logging
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_cpt.checkpoint.convert.choices import ExportChoices
from megatron_cpt.checkpoint.convert.converted import is_made, release_manifest
from megatron_cpt.checkpoint.convert.hf_mcore import claimed, mcore_to_hf, remove_partial
from megatron_cpt.checkpoint.huggingface.companion_files import keep_companions
from megatron_cpt.checkpoint.huggingface.options import OPTIONS, ImportOptions
from megatron_cpt.checkpoint.huggingface.read_config import TRAINING_FIELDS, differing_fields
from megatron_cpt.checkpoint.huggingface.write_config import hf_config_from_model
from megatron_cpt.checkpoint.mapping.units import Unit, family_of, units
from megatron_cpt.checkpoint.soup.mean import MERGE_INFO, normalised_weights, weighted_mean
from megatron_cpt.checkpoint.torch_dist import mcore
from megatron_cpt.checkpoint.torch_dist.dcp_writer import Slice, write_dcp
from megatron_cpt.checkpoint.torch_dist.kept_files import KEPT, kept_companions
from megatron_cpt.checkpoint.torch_dist.megatron_arguments import write_megatron_metadata
from megatron_cpt.checkpoint.torch_dist.weights import TorchDistWeights
from megatron_cpt.config.settings.schema import ModelConfig
from megatron_cpt.errors import CheckpointError
from megatron_cpt.files import text_hash, whole_dir, write_json

logger = logging.getLogger(__name__)


class AveragedWeights:
    """The weighted mean of several checkpoints, computed while reading."""

    def __init__(self, sources: Sequence[TorchDistWeights], shares: Sequence[float]):
        self.sources, self.shares = sources, shares

    def shape(self, unit: Unit) -> tuple[int, ...]:
        """Return the shape of a unit on disk; it must be the same everywhere."""
        shapes = {source.shape(unit) for source in self.sources}
        if len(shapes) > 1:
            raise CheckpointError(f"soup: {unit.key} has shapes {sorted(shapes)}. Checkpoints of one soup must match.")
        return shapes.pop()

    def dtype(self, unit: Unit) -> torch.dtype:
        """Return the first checkpoint's type."""
        return self.sources[0].dtype(unit)

    def read(self, unit: Unit, num_rows: int | None = None) -> torch.Tensor:
        """Return the mean, summed in float32."""
        mean = weighted_mean([partial(source.read, unit, num_rows) for source in self.sources], self.shares)
        return mean.to(self.dtype(unit))

    def unclaimed(self, units: Sequence[Unit]) -> list[str]:
        """Return the weights of any checkpoint that no unit reads."""
        return sorted({key for source in self.sources for key in source.unclaimed(units)})


def average_checkpoints(
    checkpoints: Sequence[Path],
    output: Path,
    *,
    weights: Sequence[float] | None = None,
    to: str = "megatron",
    tokenizer: Path | None = None,
    dtype: str | None = None,
    num_workers: int = 2,
) -> Path:
    """Average `iter_*` or `release` folders into `<output>/release` (to megatron) or the folder `output` (to huggingface).

    Raises: CheckpointError when a checkpoint is damaged, or their models or tokenizers differ.
    """
    shares = normalised_weights(checkpoints, weights, has_base=False)
    manifests = [mcore.verify_checkpoint(path, "size") for path in checkpoints]
    models = [mcore.manifest_model(manifest, path) for manifest, path in zip(manifests, checkpoints, strict=True)]
    for path, manifest, model in zip(checkpoints[1:], manifests[1:], models[1:], strict=True):
        different = differing_fields(models[0], model, TRAINING_FIELDS - {"make_vocab_size_divisible_by"})
        if _tokenizer(manifest) != _tokenizer(manifests[0]):
            different.append("tokenizer")
        if different:
            raise CheckpointError(
                f"{path}: differs from {checkpoints[0]} in {'; '.join(different)}. One soup, one model."
            )
    source = AveragedWeights([TorchDistWeights(path) for path in checkpoints], shares)
    inputs = [
        {"path": os.fspath(path), "weight": share, "files": manifest["files"]}
        for path, share, manifest in zip(checkpoints, shares, manifests, strict=True)
    ]
    manifest = {**manifests[0], "files": {"soup": text_hash(json.dumps([inputs], sort_keys=True))}}
    steps = units(models[0], family_of(_configuration(models[0], manifest)["architectures"][0]))
    info = {
        "method": "linear",
        "engine": "megatron-cpt",
        "inputs": inputs,
        "counts": {"matched": len({step.key for step in steps}), "skipped": 0, "mismatched": 0},
    }
    if to == "huggingface":
        return mcore_to_hf(
            checkpoints[0],
            output,
            options=ExportChoices(tokenizer=tokenizer, dtype=dtype, extra_files={MERGE_INFO: info}),
            num_workers=num_workers,
            weights=source,
            manifest=manifest,
        )
    left = source.unclaimed(steps)
    if left:
        raise CheckpointError(
            f"soup: {', '.join(left[:3])} belong to no layer of the model. The manifest is another model's."
        )
    mcore.check_holds_no_run(output)
    target = mcore.checkpoint_dir(output, "release")
    made_of = {
        "kind": "soup",
        "inputs": [os.fspath(checkpoint) for checkpoint in checkpoints],
        "content": text_hash(json.dumps(inputs, sort_keys=True)),
    }
    if is_made(target, made_of, models[0]):
        logger.info("%s: kept, it was made of the same checkpoints", target)
        return target
    slices = [_slice(step, source) for step in steps]
    mcore.check_free_space(output, int(sum(part.num_bytes for part in slices) * 1.01) + (1 << 20))
    remove_partial(target)
    with whole_dir(target) as directory, claimed(directory):
        hashes = write_dcp(directory, slices, num_workers=num_workers)
        write_megatron_metadata(directory, models[0])
        write_json(directory / MERGE_INFO, info)
        kept_files = kept_companions(checkpoints[0])
        if kept_files is not None:
            keep_companions(kept_files, directory / KEPT)
        kept = {key: manifests[0].get(key) for key in ("tokenizer", "hf", OPTIONS) if key in manifests[0]}
        mcore.write_manifest(directory, release_manifest(manifests[0]["model"], made_of, **kept), hashes)
    mcore.write_tracker(output, "release")
    logger.info("%s: mean of %d checkpoints", target, len(checkpoints))
    return target


def _configuration(model: ModelConfig, manifest: dict[str, Any]) -> dict[str, Any]:
    return hf_config_from_model(model, manifest.get("hf"), ignore=ImportOptions.of(manifest).ignore_config)


def _slice(step: Unit, source: AveragedWeights) -> Slice:
    shape = source.shape(step)
    experts = () if step.expert is None else (1,)
    whole = shape if step.num_experts is None else (step.num_experts, *shape)
    return Slice(step.key, (*experts, *shape), source.dtype(step), step.offsets, whole, lambda: source.read(step))


def _tokenizer(manifest: dict[str, Any]) -> Any:
    return (manifest.get("tokenizer") or {}).get("hash")
