"""The loss over a vocabulary that is split between tensor-parallel ranks, for GPUs: nothing of its size is kept in fp32.

megatron-core's keeps the softmax in fp32 (8.4 GB for 4 x 4096 tokens and 128k rows) and goes over it some six times. Here
the forward pass reads the logits for their normaliser and the backward pass reads them again for the gradient, each in one
compiled function. On a CPU, where nothing is compiled, megatron's is the faster one and `model.py` keeps it.

Padded rows of the vocabulary count for nothing. Source of the z-loss: PaLM, arXiv:2204.02311, section 5.
"""

from typing import Any

import torch
from megatron.core.jit import jit_fuser
from torch import Tensor


def vocab_parallel_loss(
    logits: Tensor, labels: Tensor, *, vocab_size: int, z_loss_coeff: float, group: torch.distributed.ProcessGroup
) -> Tensor:
    """Return the loss per token `[s, b]` in fp32 from this rank's logits `[s, b, v/tp]` and labels `[s, b]`.

    `vocab_size` is that without padded rows; the loss is cross-entropy plus the coefficient times the squared logarithm
    of the normaliser.
    """
    first_row = group.rank() * logits.shape[-1]
    num_real = min(max(vocab_size - first_row, 0), logits.shape[-1])
    loss: Tensor = _VocabParallelLoss.apply(logits, labels - first_row, num_real, z_loss_coeff, group)
    return loss


class _VocabParallelLoss(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, logits: Tensor, rows: Tensor, num_real: int, z_loss_coeff: float, group: Any) -> Tensor:
        normalizer, chosen = _normalizer_and_chosen(logits, rows, num_real)
        if group.size() > 1:
            largest = normalizer.clone()
            torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX, group=group)
            sums = torch.stack([(normalizer - largest).exp(), chosen])
            torch.distributed.all_reduce(sums, group=group)
            normalizer, chosen = sums[0].log() + largest, sums[1]
        context.save_for_backward(logits, rows, normalizer)
        context.num_real, context.z_loss_coeff = num_real, z_loss_coeff
        return normalizer - chosen + z_loss_coeff * normalizer.square()

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        logits, rows, normalizer = context.saved_tensors
        gradient = _gradient(logits, rows, normalizer, gradients[0], context.num_real, context.z_loss_coeff)
        return gradient, None, None, None, None


@jit_fuser
def _normalizer_and_chosen(logits: Tensor, rows: Tensor, num_real: int) -> tuple[Tensor, Tensor]:
    """Return log(sum(exp)) over this rank's real rows, and the logit of the label where it is one of them, else 0."""
    values = logits.float()
    if num_real < logits.shape[-1]:
        is_real = torch.arange(logits.shape[-1], device=logits.device) < num_real
        values = values.masked_fill(~is_real, -torch.inf)
    is_here = (rows >= 0) & (rows < num_real)
    chosen = logits.gather(-1, rows.where(is_here, 0).unsqueeze(-1)).squeeze(-1).float()
    return values.logsumexp(-1), chosen.where(is_here, 0.0)


@jit_fuser
def _gradient(
    logits: Tensor, rows: Tensor, normalizer: Tensor, gradient: Tensor, num_real: int, z_loss_coeff: float
) -> Tensor:
    """Return the loss's gradient by this rank's logits, in their type."""
    numbers = torch.arange(logits.shape[-1], device=logits.device)
    softmax = (logits.float() - normalizer.unsqueeze(-1)).exp()
    factor = gradient * (1 + 2 * z_loss_coeff * normalizer)
    result = softmax * factor.unsqueeze(-1) - (numbers == rows.unsqueeze(-1)) * gradient.unsqueeze(-1)
    if num_real < logits.shape[-1]:
        result = result.masked_fill(numbers >= num_real, 0.0)
    return result.to(logits.dtype)
