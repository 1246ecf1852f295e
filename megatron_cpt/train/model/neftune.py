"""NEFTune: uniform noise on the embeddings' output while a model trains, the same for a sample under every layout.

    x + u x alpha / sqrt(s x h),   u uniform in [-1, 1), one number per position and channel

The noise follows from `training.seed` and the sample's number in the stage's order, which no other iteration draws. So a
resumed run and every layout (TP, SP, PP, CP, DP, micro-batch) add the same; on a GPU other numbers than on CPU.

Source: arXiv:2310.05914, algorithm 1; its code divides by the length of the batch, which is seq_length here.
"""

import hashlib
import math
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_cpt.config.settings.schema import ParallelConfig, RunConfig
from megatron_cpt.train.model.attention import context_parallel_chunks


def add_embedding_noise(model: Any, config: RunConfig) -> None:
    """Let a GPTModel's embedding add noise while it trains; its `sample_ids` `[b]` say to which samples."""

    def add(embedding: torch.nn.Module, inputs: Any, output: Tensor) -> Tensor:
        if not model.training:
            return output
        noise = embedding_noise(
            [int(number) for number in model.sample_ids],
            config.training.seed,
            config.training.neftune_alpha,
            (config.training.seq_length, output.shape[2]),
            output.device,
        )
        return output + local_positions(noise, config.parallel).to(output.dtype)

    model.embedding.register_forward_hook(add)


def embedding_noise(
    sample_ids: list[int], seed: int, alpha: float, shape: tuple[int, int], device: torch.device | str = "cpu"
) -> Tensor:
    """Return the noise of samples, `[s, b, h]` float32, for `shape` (s, h)."""
    largest = alpha / math.sqrt(shape[0] * shape[1])
    samples = []
    for number in sample_ids:
        digest = hashlib.blake2b(f"neftune {seed} {number}".encode(), digest_size=8).digest()
        generator = torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)
        samples.append(torch.rand(shape, generator=generator, device=device) * 2 - 1)
    return torch.stack(samples, dim=1) * largest


def local_positions(whole: Tensor, parallel: ParallelConfig) -> Tensor:
    """Return this rank's positions of `[s, b, h]`: its context-parallel chunks, of these its tensor-parallel part."""
    size = parallel_state.get_context_parallel_world_size()
    if size > 1:
        chunks = whole.chunk(2 * size)
        whole = torch.cat(
            [chunks[chunk] for chunk in context_parallel_chunks(parallel_state.get_context_parallel_rank(), size)]
        )
    if parallel.sequence_parallel:
        parts = whole.chunk(parallel_state.get_tensor_model_parallel_world_size())
        whole = parts[parallel_state.get_tensor_model_parallel_rank()]
    return whole
