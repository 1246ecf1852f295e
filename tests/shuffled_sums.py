"""A processor that this machine is not: each matrix product splits its sum at a random place, as another kernel would.

`SHUFFLED_SUMS=1 pytest ...` runs the functions of ranks so (`tests/distributed.py`). Two runs of the same program then differ by
rounding, in bf16 in one element of a thousand, and a comparison with a tolerance that holds on one processor only fails.
Tests of the same bits fail too, and rightly: their promise is for one machine and one kernel.
"""

import random
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten


class ShuffledSums(TorchDispatchMode):
    """While it is entered, products of matrices in fp32 and bf16 are two products of parts, added in fp32."""

    def __init__(self) -> None:
        super().__init__()
        self._chooser = random.SystemRandom()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (aten.mm.default, aten.bmm.default) and args[0].dtype in (torch.float32, torch.bfloat16):
            return self._product(function, *args)
        if function is aten.addmm.default and not kwargs and args[1].dtype in (torch.float32, torch.bfloat16):
            product = self._product(aten.mm.default, args[1].float(), args[2].float())
            return (args[0].float() + product).to(args[1].dtype)
        return function(*args, **(kwargs or {}))

    def _product(self, function: Any, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """Return `left @ right`, `[..., m, k]` and `[..., k, n]`, as the sum over `[0, cut)` and over `[cut, k)`."""
        cut = self._chooser.randrange(left.shape[-1] + 1)
        one, other = left.float(), right.float()
        first = function(one[..., :cut], other[..., :cut, :])
        return (first + function(one[..., cut:], other[..., cut:, :])).to(left.dtype)
