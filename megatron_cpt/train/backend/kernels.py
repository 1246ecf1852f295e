"""Replacements on torch's own kernels for the parts of Transformer Engine and Apex that megatron-core uses, if both are
missing.

Its own fallback, torch's AdamW, cannot replace FusedAdam in megatron-core 0.19.2, on a GPU or a CPU: the first update
fails on moments that `init_state_fn` made (they have no `step`), and the distributed optimizer cannot save a `step` per
parameter. Its norm asks the GPU for one number per parameter, and it scales gradients one by one.
"""

from typing import Any

import torch


def substitute_kernels() -> None:
    """Give megatron's optimizer these kernels, unless Transformer Engine or Apex gave it theirs; compile RoPE on a GPU."""
    # imported here: on CPU other substitutions come before the first import of megatron's parts
    from megatron.core import optimizer
    from megatron.core.models.common.embeddings import rope_utils
    from megatron.core.optimizer import clip_grads, distrib_optimizer
    from megatron.core.optimizer import optimizer as mixed_precision

    if torch.cuda.is_available():
        # eight passes over queries and keys become one
        rope_utils._apply_rotary_pos_emb_bshd = torch.compile(rope_utils._apply_rotary_pos_emb_bshd)
    if not optimizer.USING_PYTORCH_OPTIMIZER:
        return
    optimizer.Adam = distrib_optimizer.Adam = FusedAdam
    optimizer.USING_PYTORCH_OPTIMIZER = False
    distrib_optimizer.HAVE_APEX_OR_TE = True
    distrib_optimizer.USING_APEX_OPTIMIZER = True
    clip_grads.l2_norm_impl = multi_tensor_l2_norm
    clip_grads.multi_tensor_scale_impl = mixed_precision.multi_tensor_scale_impl = multi_tensor_scale
    # With fp32 parameters the optimizer copies into leaf views while loading; megatron omits no_grad there.
    original = distrib_optimizer.DistributedOptimizer.load_state_dict
    distrib_optimizer.DistributedOptimizer.load_state_dict = torch.no_grad()(original)


class FusedAdam(torch.optim.Optimizer):
    """AdamW with the state layout of FusedAdam: `step` once per group, `exp_avg` and `exp_avg_sq` per parameter.

    One kernel for all parameters on a GPU (`is_fused` asks for torch's on CPU too).

    Source: decoupled weight decay, arXiv:1711.05101, algorithm 2.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        is_fused: bool = False,
        **ignored: Any,
    ) -> None:
        self.is_fused = is_fused
        self.adam_w_mode = 1 if adam_w_mode else 0
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "bias_correction": True}
        )

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            group["step"] = int(group.get("step", 0)) + 1
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not parameters:
                continue
            for parameter in parameters:
                state = self.state[parameter]
                if not state:
                    state["exp_avg"] = torch.zeros_like(parameter)
                    state["exp_avg_sq"] = torch.zeros_like(parameter)
            self._update(group, parameters)

    def _update(self, group: dict[str, Any], parameters: list[torch.Tensor]) -> None:
        gradients = [parameter.grad for parameter in parameters]
        averages = [self.state[parameter]["exp_avg"] for parameter in parameters]
        squares = [self.state[parameter]["exp_avg_sq"] for parameter in parameters]
        beta1, beta2 = group["betas"]
        if parameters[0].is_cuda or self.is_fused:
            update = torch._fused_adamw_ if self.adam_w_mode else torch._fused_adam_
            steps = [torch.full((), float(group["step"]), device=parameters[0].device)] * len(parameters)
            update(
                parameters, gradients, averages, squares, [], steps,
                lr=group["lr"], beta1=beta1, beta2=beta2, weight_decay=group["weight_decay"], eps=group["eps"],
                amsgrad=False, maximize=False,
            )  # fmt: skip
            return
        if self.adam_w_mode:
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        elif group["weight_decay"]:
            gradients = list(torch._foreach_add(gradients, parameters, alpha=group["weight_decay"]))
        torch._foreach_lerp_(averages, gradients, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - beta2)
        roots = torch._foreach_sqrt(squares)
        torch._foreach_div_(roots, (1 - beta2 ** group["step"]) ** 0.5)
        torch._foreach_add_(roots, group["eps"])
        torch._foreach_addcdiv_(parameters, averages, roots, -group["lr"] / (1 - beta1 ** group["step"]))


def multi_tensor_l2_norm(
    chunk_size: int, overflow: torch.Tensor, tensor_lists: list[list[torch.Tensor]], per_tensor: bool
) -> tuple[torch.Tensor, None]:
    """Return the norm over all tensors `[1]`, left where they are, as `amp_C.multi_tensor_l2norm` does."""
    return torch.stack(torch._foreach_norm(tensor_lists[0])).norm().view(1), None


def multi_tensor_scale(
    chunk_size: int, overflow: torch.Tensor, tensor_lists: list[list[torch.Tensor]], scale: float
) -> None:
    """Write the first list's tensors times `scale` into the second's, as `amp_C.multi_tensor_scale` does."""
    source, target = tensor_lists
    if source is target:
        torch._foreach_mul_(target, scale)
    else:
        torch._foreach_copy_(target, torch._foreach_mul(source, scale))
