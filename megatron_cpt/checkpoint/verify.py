"""Proof of a conversion: every tensor on both sides, compared bit by bit and hashed."""

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from megatron_cpt.checkpoint.hf import HFFolder
from megatron_cpt.checkpoint.mapping import Unit
from megatron_cpt.checkpoint.sources import MegatronWeights
from megatron_cpt.config.schema import ModelConfig
from megatron_cpt.errors import CheckpointError


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
    """Return tensor name -> BLAKE2b-128 of its bytes, after comparing every Hugging Face tensor with Megatron's.

    `hf_cast` and `stored_cast` are the types that the conversion turned either side's tensors into.

    Raises: CheckpointError naming the first tensor that differs.
    """

    def compare(step: Unit) -> dict[str, str]:
        rows = model.vocab_size if step.how == "vocab" else None
        hashes = {}
        for name, values in zip(step.hf, step.to_hf(weights.read(step, rows), model), strict=True):
            original = folder.read(name)
            is_bias = step.key.endswith("expert_bias")
            left = tensor_bytes(original if hf_cast is None or is_bias else original.to(hf_cast))
            right = tensor_bytes(values if stored_cast is None or is_bias else values.to(stored_cast))
            if not torch.equal(left, right):
                raise CheckpointError(
                    f"{name}: differs between {folder.path} and Megatron's {step.key}. The conversion is wrong. Report it."
                )
            hashes[name] = hashlib.blake2b(left.numpy(), digest_size=16).hexdigest()
        return hashes

    with ThreadPoolExecutor(num_workers) as pool:
        return {name: digest for hashes in pool.map(compare, steps) for name, digest in hashes.items()}


def tensor_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor's bytes, so that comparing them tells NaN from NaN and 0 from -0."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)
