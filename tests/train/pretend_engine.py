"""Transformer Engine's Python part on a machine without a GPU: its wheels, and a pretend module for the compiled part.

Layers can be constructed and their parameters and keys compared; a forward pass needs a GPU. The wheels are installed into a folder
of their own, because the tested environment has to work without them.
"""

import enum
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

PINNED = (
    "transformer-engine==2.20.2", "transformer-engine-cu13==2.20.2", "nvidia-cudnn-frontend==1.32.0", "einops==0.8.2",
    "onnxscript==0.7.2", "onnx==1.23.2", "onnx-ir==1.1.0", "ml-dtypes==0.6.0", "nvdlfw-inspect==0.2.2",
)  # fmt: skip
_MEMBERS = {
    "DType": ("kByte", "kInt32", "kFloat32", "kFloat16", "kBFloat16", "kFloat8E4M3", "kFloat8E5M2", "kFloat4E2M1"),
    "NVTE_Fused_Attn_Backend": ("NVTE_No_Backend", "NVTE_F16_arbitrary_seqlen", "NVTE_FP8"),
    "FP8FwdTensors": tuple(f"GEMM{number}_{kind}" for number in (1, 2, 3) for kind in ("INPUT", "WEIGHT", "OUTPUT")),
    "FP8BwdTensors": tuple(f"GRAD_{kind}{number}" for number in (1, 2, 3) for kind in ("OUTPUT", "INPUT")),
    "NVTEScalingMode": ("NVTE_DELAYED_TENSOR_SCALING", "NVTE_MXFP8_1D_SCALING"),
}
"""The enums whose members Transformer Engine compares with its Python copies while it is imported."""


def install_wheels(folder: Path) -> str | None:
    """Put the wheels into `folder`, once; return why that failed."""
    mark = folder / "complete"
    if mark.exists() and mark.read_text() == "\n".join(PINNED):
        return None
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--only-binary=:all:",
        "--no-compile",
        "--upgrade",
    ]
    try:
        done = subprocess.run([*command, "--target", folder, *PINNED], capture_output=True, text=True, timeout=280)
    except subprocess.TimeoutExpired:
        return "pip did not end within 280 s"
    if done.returncode:
        return done.stderr.strip().splitlines()[-1][:300]
    mark.write_text("\n".join(PINNED))
    return None


def import_transformer_engine(folder: Path) -> None:
    """Import `transformer_engine.pytorch` from `folder`; the names of its compiled part are empty classes."""
    import torch  # noqa: F401  # loads libnccl, which the core library needs

    sys.path.append(str(folder))
    module = types.ModuleType("transformer_engine_torch")
    for name, members in _MEMBERS.items():
        setattr(module, name, enum.IntEnum(name, {member: number for number, member in enumerate(members)}))
    module.__getattr__ = lambda name: _absent(module, name)  # type: ignore[method-assign]
    sys.modules["transformer_engine_torch"] = module
    import transformer_engine.common

    transformer_engine.common.load_framework_extension = lambda *_, **__: None
    import transformer_engine.pytorch


class _Numbered(type):
    """A class whose every attribute is a number: an enum of which nobody compares the members."""

    def __getattr__(cls, name: str) -> int:
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(cls, name, len(vars(cls)))
        return getattr(cls, name)


def _absent(module: types.ModuleType, name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    setattr(module, name, _Numbered(name, (), {}))
    return getattr(module, name)
