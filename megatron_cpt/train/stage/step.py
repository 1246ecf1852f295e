"""One optimizer step: forward and backward over the micro-batches, gradient norm, update."""

import functools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_model_config
from torch import Tensor

from megatron_cpt.config.settings.schema import RunConfig
from megatron_cpt.train.samples.batches import Batch


@dataclass(frozen=True)
class StepResult:
    """Result of a step: mean loss in nats per token, gradient norm before clipping, whether parameters changed."""

    loss: float
    grad_norm: float
    is_updated: bool
    forward_backward_seconds: float
    """Until the loss is known on every rank; on a GPU that waits for both passes."""
    optimizer_seconds: float
    """Reduction and norm of the gradients and the update; a GPU can finish the update during the next step."""


def train_step(
    model: list[Any],
    optimizer: MegatronOptimizer,
    batches: list[Batch],
    config: RunConfig,
    learning_rate: float,
    weight_decay: float | None = None,
) -> StepResult:
    """Run one step over this rank's micro-batches. A loss or gradient that is not finite leaves the parameters alone.

    The optimizer's own `step` updates before anyone can look at the norm, so its parts are called one by one.
    `weight_decay` None is the setting's.
    """
    started = time.monotonic()
    for chunk in model:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    biases = _router_biases(model, config)
    if 0 < config.data.prompt_loss_weight < 1:
        _divide_by_weights(model, batches)
    iterators = [iter(batches) for _ in model]
    results = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if len(model) > 1 else iterators[0],
        model=model,
        num_microbatches=len(batches),
        seq_length=config.training.seq_length,
        micro_batch_size=config.training.micro_batch_size,
        forward_only=False,
    )
    loss = global_loss([result["loss_and_tokens"] for result in results])
    evaluated = time.monotonic()
    set_learning_rate(optimizer, learning_rate, config.optimizer.weight_decay if weight_decay is None else weight_decay)
    found_inf = optimizer.prepare_grads()
    grad_norm = float(optimizer.get_grad_norm())
    is_finite = not found_inf and math.isfinite(grad_norm) and math.isfinite(loss)
    if is_finite:
        if config.optimizer.clip_grad > 0:
            for part in getattr(optimizer, "chained_optimizers", [optimizer]):
                if parameters := part.get_parameters():
                    clip_grad_by_total_norm_fp32(parameters, config.optimizer.clip_grad, grad_norm)
        optimizer.step_with_ready_grads()
    else:
        for bias, before in biases:
            bias.copy_(before)
    ended = time.monotonic()
    return StepResult(loss, grad_norm, is_finite, evaluated - started, ended - evaluated)


def _router_biases(model: list[Any], config: RunConfig) -> list[tuple[Tensor, Tensor]]:
    """Return the biases that balance experts, each with a copy: megatron moves them with the gradients, before the norm."""
    if not config.model.moe_router_enable_expert_bias:
        return []
    buffers = (buffer for chunk in model for name, buffer in chunk.named_buffers() if name.endswith("expert_bias"))
    return [(buffer, buffer.clone()) for buffer in buffers if buffer is not None]


def forward_step(iterator: Iterator[Batch], model: Any) -> tuple[Tensor, Callable[..., Any]]:
    """Run the model on the next micro-batch; the schedule calls the returned function with the output."""
    batch = next(iterator)
    output = model(
        batch.tokens, batch.position_ids, batch.attention_mask, labels=batch.labels, sample_ids=batch.sample_ids
    )
    return output, functools.partial(_loss, batch.loss_mask)


def _divide_by_weights(model: list[Any], batches: list[Batch]) -> None:
    """Let megatron divide the step's gradients by the sum of its weights; it counts tokens itself, in whole numbers."""
    weights = torch.stack([batch.loss_mask.sum() for batch in batches]).sum()

    def finalize(model: list[Any], num_tokens: Tensor | None = None, **options: Any) -> None:
        finalize_model_grads(model, weights, **options)

    for chunk in model:
        get_model_config(chunk).finalize_model_grads_func = finalize


def _loss(loss_mask: Tensor, losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return the summed loss, its tokens (their weights), and both for reporting; megatron divides by the global token count."""
    total = (losses.float() * loss_mask).sum()
    num_tokens = loss_mask.sum()
    return total, num_tokens.to(torch.int), {"loss_and_tokens": torch.stack([total.detach(), num_tokens]).clone()}


def global_loss(parts: list[Tensor]) -> float:
    """Return the mean loss per token over all ranks from this rank's `[sum, tokens]` per micro-batch.

    Only last pipeline stages have parts; all ranks get the result.
    """
    total = torch.zeros(2, dtype=torch.float64, device=torch.cuda.current_device())
    for part in parts:
        total += part.double()
    torch.distributed.all_reduce(total)  # tensor-parallel ranks count alike, so the ratio stands
    return float(total[0] / total[1].clamp(min=1))


def set_learning_rate(optimizer: MegatronOptimizer, learning_rate: float, weight_decay: float) -> None:
    """Give every parameter group this step's learning rate and weight decay, times the group's multipliers."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("lr_mult", 1.0)
        group["weight_decay"] = weight_decay * group.get("wd_mult", 1.0)


def layout_text() -> str:
    """Return this job's layout as `TP2 PP1 CP1 EP1 DP1`."""
    sizes = {
        "TP": parallel_state.get_tensor_model_parallel_world_size(),
        "PP": parallel_state.get_pipeline_model_parallel_world_size(),
        "CP": parallel_state.get_context_parallel_world_size(),
        "EP": parallel_state.get_expert_model_parallel_world_size(),
        "DP": parallel_state.get_data_parallel_world_size(),
    }
    return " ".join(f"{name}{size}" for name, size in sizes.items())
