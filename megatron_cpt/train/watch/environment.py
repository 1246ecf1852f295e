"""On what a run trains: versions, device and the variables that matter for its speed and results."""

import importlib.metadata
import os
import platform

import torch

_VARIABLES = ("CUDA_", "NCCL_", "GLOO_", "OMP_NUM_THREADS", "NVTE_", "TORCH_NCCL_", "PYTORCH_", "ONEDNN_")
"""Beginnings of the variables that are written down; none of them holds a secret."""


def environment() -> dict[str, str]:
    """Return what rank 0 sees, name -> value, versions first."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("megatron-core", "transformer-engine", "transformers", "numpy"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if torch.cuda.is_available():
        found |= {"device": torch.cuda.get_device_name(), "cuda": str(torch.version.cuda)}
    else:
        found["device"] = f"CPU, {torch.get_num_threads()} threads a rank, {platform.machine()}"
    return found | {name: os.environ[name] for name in sorted(os.environ) if name.startswith(_VARIABLES)}
