"""Everything megatron-core 0.19.2 needs in order to train on CPU with gloo, each substitution with its reason.

megatron-core names CUDA devices directly. Without a GPU, `substitute()` (1) runs every torch call through one
`TorchFunctionMode` that turns `device="cuda"` into CPU, (2) makes `torch.cuda` return harmless CPU values. `kernels.py`
replaces Transformer Engine and Apex if they are missing, also on a GPU; a machine with a GPU gets no other
substitution.

Factories are not replaced by name: a replaced `torch.empty` makes transformers leave rotary buffers uninitialised.
"""

import contextlib
import os
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from megatron_cpt.train.backend.kernels import substitute_kernels

_CPU = torch.device("cpu")
_substituted = False


def is_cpu() -> bool:
    """Return whether this process trains on CPU."""
    return not torch.cuda.is_available()


def substitute() -> None:
    """Make megatron-core run on what is here; on a GPU with Transformer Engine, or when done already, do nothing."""
    global _substituted
    if _substituted:
        return
    _substituted = True
    if is_cpu():
        _disable_compilation()
        _substitute_torch_cuda()
        # Never left: megatron-core names CUDA devices wherever it computes, for the life of the process.
        _CpuMode().__enter__()
        _substitute_moe()
        _substitute_uneven_collectives()
    substitute_kernels()


def _disable_compilation() -> None:
    """Run megatron's `jit_fuser` functions (SwiGLU, dropout-add) uncompiled: compiling them costs a start minutes."""
    import torch._dynamo

    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # for functions that are decorated from here on
    torch._dynamo.config.disable = True  # for those that were before


class _CpuMode(TorchFunctionMode):
    """Answer for CUDA devices with CPU ones, in factories, `.cuda()`, `.to()` and type names."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Iterable[Any], args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if "device" in kwargs and _is_cuda(kwargs["device"]):
            kwargs = {**kwargs, "device": _CPU}
        if kwargs.get("pin_memory"):  # rope_utils.py pins index tensors under context parallelism
            kwargs = {**kwargs, "pin_memory": False}
        if function is torch.Tensor.cuda:
            return args[0]
        if function is torch.Tensor.to and any(_is_cuda(argument) for argument in args[1:]):
            args = tuple(_CPU if _is_cuda(argument) else argument for argument in args)
        if function is torch.Tensor.type and len(args) == 1 and not kwargs:
            # clip_grads.py and distrib_optimizer.py compare with "torch.cuda.FloatTensor"
            return function(*args).replace("torch.", "torch.cuda.")
        return function(*args, **kwargs)


def _is_cuda(device: object) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.startswith("cuda")


class _NullStream:
    """Stands for a CUDA stream or event: everything on CPU is in order already."""

    device = _CPU

    def __init__(self, *arguments: Any, **options: Any) -> None: ...

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *arguments, **options: self  # an event of a stream, the elapsed time of nothing

    def __enter__(self) -> "_NullStream":
        return self

    def __exit__(self, *problem: object) -> None: ...


def _substitute_torch_cuda() -> None:
    cuda = torch.cuda

    # torch._dynamo keeps one rule per function object, so every name gets a function of its own
    def constant(value: Any) -> Callable[..., Any]:
        return lambda *arguments, **options: value

    replacements: dict[str, Any] = {
        "current_device": constant(_CPU),  # param_and_grad_buffer, rotary, p2p, layers, mappings, router, utils
        "device_count": constant(1),  # the async checkpoint worker takes rank % device_count
        "set_device": constant(None),
        "synchronize": constant(None),
        "empty_cache": constant(None),
        "memory_allocated": constant(0),
        "max_memory_allocated": constant(0),
        "memory_reserved": constant(0),
        "reset_peak_memory_stats": constant(None),
        "Stream": _NullStream,
        "Event": _NullStream,
        "current_stream": lambda *arguments, **options: _NullStream(),
        "default_stream": lambda *arguments, **options: _NullStream(),
        "stream": lambda *arguments, **options: contextlib.nullcontext(),
        "manual_seed": torch.manual_seed,  # tensor_parallel/random.py keeps one RNG state per parallel role
        "get_rng_state": lambda *arguments, **options: torch.get_rng_state(),
        "set_rng_state": lambda state, *arguments, **options: torch.set_rng_state(state),
        "_lazy_call": lambda callback, **options: callback(),
    }
    for name, replacement in replacements.items():
        setattr(cuda, name, replacement)
    cuda.nvtx.range_push, cuda.nvtx.range_pop = constant(None), constant(None)
    from megatron.core.tensor_parallel import random  # after the names above stand, since it imports some of them

    random._get_cuda_rng_state = lambda *arguments, **options: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *arguments, **options: torch.set_rng_state(state)


def _substitute_moe() -> None:
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    if not hasattr(moe_utils, "te_general_gemm"):  # named without a guard where Transformer Engine is missing
        moe_utils.te_general_gemm = None

    def to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        # megatron's own converts CUDA tensors only; the dispatcher needs numpy splits all the same
        return tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor

    moe_utils.maybe_move_tensor_to_cpu = token_dispatcher.maybe_move_tensor_to_cpu = to_cpu


def _substitute_uneven_collectives() -> None:
    """Gather and reduce-scatter parts of different length, which gloo refuses: experts under EP > 1 with TP inside them.

    Parts are padded to the longest for the gather; the reduce-scatter sums everything and keeps this rank's part.
    """
    from megatron.core.tensor_parallel import mappings

    gather, reduce_scatter = mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim

    def gather_any(part: Any, group: Any, output_split_sizes: Any = None, use_global_buffer: bool = False) -> Any:
        sizes = None if output_split_sizes is None else [int(size) for size in output_split_sizes]
        if sizes is None or group.size() == 1 or len(set(sizes)) == 1:
            return gather(part, group, sizes, use_global_buffer)
        padded = part.new_zeros(max(sizes), *part.shape[1:])
        padded[: part.shape[0]] = part
        gathered = [torch.empty_like(padded) for _ in sizes]
        torch.distributed.all_gather(gathered, padded, group=group)
        return torch.cat([piece[:size] for piece, size in zip(gathered, sizes, strict=True)])

    def reduce_scatter_any(
        whole: Any, group: Any, input_split_sizes: Any = None, use_global_buffer: bool = False
    ) -> Any:
        if input_split_sizes is None or group.size() == 1:
            return reduce_scatter(whole, group, input_split_sizes, use_global_buffer)
        total = whole.clone()
        torch.distributed.all_reduce(total, group=group)
        return total.split([int(size) for size in input_split_sizes])[group.rank()].contiguous()

    mappings._gather_along_first_dim = gather_any
    mappings._reduce_scatter_along_first_dim = reduce_scatter_any


def set_threads() -> None:
    """Share the cores between the ranks of this machine, unless OMP_NUM_THREADS is set."""
    if is_cpu() and "OMP_NUM_THREADS" not in os.environ:
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(max((os.cpu_count() or 1) // ranks, 1))
