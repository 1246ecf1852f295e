"""What stands in for Transformer Engine's and Apex's kernels computes what they do."""

import pytest
import torch

from megatron_cpt.train.backend.kernels import multi_tensor_l2_norm, multi_tensor_scale
from tests.tolerances import assert_fp32_rounding


def adam_difference(is_fused):
    """Return our parameters and torch's AdamW's after ten steps, our state's keys and its step."""
    from megatron_cpt.train.backend.kernels import FusedAdam

    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(5, 3)), torch.nn.Parameter(torch.randn(4))]
    theirs = [torch.nn.Parameter(parameter.detach().clone()) for parameter in ours]
    settings = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    optimizers = FusedAdam(ours, is_fused=is_fused, **settings), torch.optim.AdamW(theirs, **settings)
    for _ in range(10):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    values = [[parameter.detach().numpy() for parameter in side] for side in (ours, theirs)]
    group = optimizers[0].param_groups[0]
    return *values, sorted(optimizers[0].state[ours[0]]), group["step"]


@pytest.mark.parametrize("is_fused", [False, True])
def test_our_adamw_is_torchs_with_the_step_in_the_group(ranks, is_fused):
    ((ours, theirs, state, step),) = ranks.run(adam_difference, 1, is_fused)
    assert_fp32_rounding(ours, theirs, roundings=10 * 8, of_largest=True)  # ten updates of eight operations
    assert state == ["exp_avg", "exp_avg_sq"] and step == 10


def test_the_norm_is_that_of_one_long_vector():
    tensors = [torch.randn(3, 5), torch.randn(7), torch.zeros(2)]
    norm, _ = multi_tensor_l2_norm(1, torch.zeros(1), [tensors], False)
    assert norm.shape == (1,)
    assert_fp32_rounding(norm[0], torch.cat([tensor.flatten() for tensor in tensors]).norm(), roundings=24)  # 24 values


def test_scaling_writes_in_place_or_into_another_type():
    gradients = [torch.arange(4.0), torch.ones(2)]
    kept = list(gradients)
    multi_tensor_scale(1, torch.zeros(1), [gradients, gradients], 0.5)
    assert kept[0].tolist() == [0, 0.5, 1, 1.5] and kept[1].tolist() == [0.5, 0.5]
    halves = [torch.zeros(4, dtype=torch.bfloat16)]
    multi_tensor_scale(1, torch.zeros(1), [[torch.arange(4.0)], halves], 2.0)
    assert halves[0].tolist() == [0, 2, 4, 6]


def kernels_of_megatron(_):
    """Return what megatron-core's optimizer uses after the substitution."""
    from megatron.core.optimizer import clip_grads, distrib_optimizer

    from megatron_cpt.train.backend import cpu, kernels

    cpu.substitute()
    assert clip_grads.l2_norm_impl is kernels.multi_tensor_l2_norm
    assert clip_grads.multi_tensor_scale_impl is kernels.multi_tensor_scale
    return distrib_optimizer.Adam is kernels.FusedAdam


def test_megatron_uses_them_where_transformer_engine_and_apex_are_missing(ranks):
    assert ranks.run(kernels_of_megatron, 1, None) == [True]
