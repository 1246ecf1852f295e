"""Whether a converted model computes what the original does: the same tokens through megatron-core and transformers.

Weights that are equal bit by bit (`convert verify`) can still mean different models: another rotary base, another norm
epsilon, another router. Logits show it. One rank, fp32 by default, no tensor or pipeline parallelism.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_cpt.checkpoint.mcore import read_manifest
from megatron_cpt.config.schema import ModelConfig, ParallelConfig, RunConfig, TrainingConfig
from megatron_cpt.errors import CheckpointError
from megatron_cpt.train import cpu
from megatron_cpt.train.checkpointing import load_checkpoint
from megatron_cpt.train.model import build_model_chunks
from megatron_cpt.train.parallel import finish_parallel, initialize_parallel

NUM_SEQUENCES, MAX_TOKENS = 2, 512


@dataclass(frozen=True)
class LogitDifference:
    """How far two models' logits are apart over the same tokens."""

    largest: float
    mean: float
    loss: float
    """Difference of the mean loss in nats per token."""
    agreement: float
    """Part of the positions where both models find the same token most likely."""
    num_tokens: int


def compare_logits(hf_dir: Path, checkpoint: Path, *, precision: str = "fp32", seed: int = 1234) -> LogitDifference:
    """Return the difference between a Hugging Face folder's logits and a Megatron checkpoint's on random tokens.

    Raises: CheckpointError when one of them cannot be loaded or their vocabularies differ.
    """
    stored = read_manifest(checkpoint)["model"]
    names = {field.name for field in dataclasses.fields(ModelConfig)}
    model = ModelConfig(**{name: value for name, value in stored.items() if name in names})
    length = min(model.max_position_embeddings, MAX_TOKENS)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(model.vocab_size, (NUM_SEQUENCES, length), generator=generator)
    ours = mcore_logits(checkpoint, model, tokens, precision)
    theirs = hf_logits(hf_dir, tokens, precision)
    if ours.shape != theirs.shape:
        raise CheckpointError(
            f"{hf_dir}: {theirs.shape[-1]} logits per token, {checkpoint} has {ours.shape[-1]}. "
            "These are not the same model."
        )
    return difference(ours, theirs, tokens)


def difference(one: Tensor, other: Tensor, tokens: Tensor) -> LogitDifference:
    """Return how far logits `[b, s, v]` are apart over `tokens` `[b, s]`."""
    gap = (one - other).abs()
    return LogitDifference(
        largest=gap.max().item(),
        mean=gap.mean().item(),
        loss=abs(_loss(one, tokens) - _loss(other, tokens)),
        agreement=(one.argmax(-1) == other.argmax(-1)).float().mean().item(),
        num_tokens=tokens.numel(),
    )


def mcore_logits(checkpoint: Path, model: ModelConfig, tokens: Tensor, precision: str) -> Tensor:
    """Return logits `[b, s, v]` in fp32 of the model in a Megatron checkpoint, on one rank."""
    config = RunConfig(
        task="verify",
        params="verify",
        size="verify",
        model=dataclasses.replace(model, hidden_dropout=0.0, attention_dropout=0.0),
        parallel=ParallelConfig(use_distributed_optimizer=False),
        training=TrainingConfig(
            seq_length=tokens.shape[1],
            micro_batch_size=tokens.shape[0],
            global_batch_size=tokens.shape[0],
            train_iters=1,
            precision="bf16" if precision == "bf16" else "fp32",
        ),
    )
    initialize_parallel(config)
    try:
        (chunk,) = build_model_chunks(config)
        load_checkpoint(checkpoint, [chunk], None)
        device: Any = "cpu" if cpu.is_cpu() else "cuda"
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        with torch.inference_mode():
            logits = chunk.eval()(tokens.to(device), positions.to(device), None)
        return logits[..., : model.vocab_size].float().cpu()
    finally:
        finish_parallel()


def hf_logits(hf_dir: Path, tokens: Tensor, precision: str) -> Tensor:
    """Return logits `[b, s, v]` in fp32 of a Hugging Face folder."""
    # imported here: it takes seconds, and a missing checkpoint is found before
    from transformers import AutoModelForCausalLM

    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    try:
        model = AutoModelForCausalLM.from_pretrained(hf_dir, dtype=dtype, local_files_only=True)
    except (OSError, ValueError, RuntimeError) as problem:
        raise CheckpointError(f"{hf_dir}: cannot be loaded ({' '.join(str(problem).split())[:300]}).") from None
    device: Any = "cpu" if cpu.is_cpu() else "cuda"
    with torch.inference_mode():
        return model.eval().to(device)(tokens.to(device), use_cache=False).logits.float().cpu()


def _loss(logits: Tensor, tokens: Tensor) -> float:
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).item()
