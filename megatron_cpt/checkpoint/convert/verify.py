"""Proof of a conversion: every tensor on both sides, compared bit by bit and hashed."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import xxhash

from megatron_cpt.checkpoint.huggingface.folder import HFFolder
from megatron_cpt.checkpoint.huggingface.options import ImportOptions
from megatron_cpt.checkpoint.huggingface.read_config import (
    TRAINING_FIELDS,
    differing_fields,
    family_of_config,
    model_config_from_hf,
)
from megatron_cpt.checkpoint.mapping.units import Unit, check_coverage, units
from megatron_cpt.checkpoint.torch_dist.mcore import manifest_model, read_manifest
from megatron_cpt.checkpoint.torch_dist.weights import MegatronWeights, TorchDistWeights
from megatron_cpt.config.settings.schema import ModelConfig
from megatron_cpt.errors import CheckpointError


def compare_weights(hf_dir: Path, checkpoint: Path) -> dict[str, str]:
    """Return tensor name -> hash after comparing a Hugging Face folder with a Megatron checkpoint bit by bit.

    Raises: CheckpointError naming the first tensor that differs, or is on one side only.
    """
    folder, weights, manifest = HFFolder(hf_dir), TorchDistWeights(checkpoint), read_manifest(checkpoint)
    model = manifest_model(manifest, checkpoint)
    imported = ImportOptions.of(manifest)
    options = folder.options.joined(imported.ignore_config, imported.skip_tensors)
    where = str(hf_dir / "config.json")
    described = model_config_from_hf(folder.config, ignore=options.ignore_config, where=where)
    different = differing_fields(described, model, TRAINING_FIELDS)
    if different:
        raise CheckpointError(f"{hf_dir}: another model than {checkpoint}: {'; '.join(different)}.")
    family = family_of_config(folder.config, where)
    steps = units(model, family)
    check_coverage(steps, folder.names_to_claim(*family.repeated_output(model)), str(hf_dir), options.skip_tensors)
    return verify_against_hf(folder, weights, steps, model, None)


def verify_against_hf(
    folder: HFFolder,
    weights: MegatronWeights,
    steps: Sequence[Unit],
    model: ModelConfig,
    hf_cast: torch.dtype | None,
    num_workers: int = 2,
    *,
    stored_cast: torch.dtype | None = None,
) -> dict[str, str]:
    """Return tensor name -> xxh3-128 of its bytes, after comparing every Hugging Face tensor with Megatron's.

    `hf_cast` and `stored_cast` are the types that the conversion turned either side's tensors into.

    Raises: CheckpointError naming the first tensor that differs.
    """

    def compare(step: Unit) -> dict[str, str]:
        hashes = {}
        for name, values in zip(step.hf, step.to_hf(weights.read(step, step.rows(model)), model), strict=True):
            original = folder.read(name)
            is_bias = step.key.endswith("expert_bias")
            left = tensor_bytes(original if hf_cast is None or is_bias else original.to(hf_cast))
            right = tensor_bytes(values if stored_cast is None or is_bias else values.to(stored_cast))
            if not torch.equal(left, right):
                raise CheckpointError(
                    f"{name}: differs between {folder.path} and Megatron's {step.key}. The conversion is wrong. Report it."
                )
            hashes[name] = xxhash.xxh3_128_hexdigest(left.numpy())
        return hashes

    with ThreadPoolExecutor(num_workers) as pool:
        return {name: digest for hashes in pool.map(compare, steps) for name, digest in hashes.items()}


def tensor_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor's bytes, so that a comparison distinguishes different NaNs, and 0 from -0."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)
