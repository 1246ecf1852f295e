"""Pickles read without running code: `weights_only`, and an allow-list of Megatron's objects other than tensors.

Megatron stores arguments (a `Namespace`), random states, paths and its own enumerations. The classes of megatron-core
are not needed and become empty placeholders. A class on neither list is an error, because it could run code.
"""

import argparse
import pathlib
import pickle
import re
import signal
import threading
import types
import zipfile
from pathlib import Path
from typing import IO, Any

import numpy
import torch
from numpy._core.multiarray import _reconstruct

from megatron_cpt.errors import CheckpointError, DamagedError

_MEGATRON_CLASSES = (
    "megatron.core.enums.ModelType",
    "megatron.core.transformer.enums.AttnBackend",
    "megatron.core.transformer.enums.CudaGraphScope",
    "megatron.core.transformer.enums.CudaGraphModule",
    "megatron.core.transformer.enums.InferenceCudaGraphScope",
    "megatron.core.optimizer.optimizer_config.OptimizerConfig",
    "megatron.core.rerun_state_machine.RerunState",
    "megatron.core.rerun_state_machine.RerunMode",
    "megatron.core.rerun_state_machine.RerunDiagnostic",
    "megatron.training.tokenizer.tokenizer._GPT2BPETokenizer",
)

_LOCK = threading.Lock()
"""torch keeps its allow-list per process."""


class Placeholder:
    """Placeholder for an object that is not needed (Megatron-Core's MCoreMetadata, cached plans, enums)."""

    def __init__(self, *ignored: Any, **also_ignored: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


def load_safely(source: Path | IO[bytes], where: str, *, mmap: bool = False, only_tensors: bool = False) -> Any:
    """Return the content of a `torch.save` file, on the CPU; `only_tensors`: without the allow-list.

    `mmap` applies to the archives that torch has written since 1.6; older files are read into memory.

    Raises: CheckpointError naming the class that is not allowed, or saying that the file is damaged. OSError.
    """
    mmap = mmap and zipfile.is_zipfile(source)
    try:
        if only_tensors:
            return torch.load(source, map_location="cpu", weights_only=True, mmap=mmap or None)
        with _LOCK, torch.serialization.safe_globals(_not_yet_allowed()):
            return torch.load(source, map_location="cpu", weights_only=True, mmap=mmap or None)
    except OSError:
        raise
    except Exception as problem:  # a damaged or hostile file can raise nearly anything
        refused = _refused_name(problem)
        if refused is None:
            raise DamagedError(
                f"{where}: cannot be read ({first_line(problem)}). The file is damaged. Use another one."
            ) from None
        raise CheckpointError(
            f"{where}: holds {refused}, which is not on the allow-list of weights and arguments. "
            "It is not loaded, because it could run code. Do not use a checkpoint from this source."
        ) from None


def first_line(problem: BaseException) -> str:
    """Return the first line of an exception's text, its class where it has none."""
    return (str(problem).splitlines() or [type(problem).__name__])[0]


def _refused_name(problem: Exception) -> str | None:
    """Return the name that torch would not look up, None when it failed for another reason."""
    if not isinstance(problem, pickle.UnpicklingError):
        return None
    found = re.search(r"GLOBAL ([^\s,]+)", str(problem))
    if found:
        return found[1]
    return (
        "a class"
        if re.search("Unsupported (class|global|operand)|Trying to (call|load|instantiate)|Can only", str(problem))
        else None
    )


def _allowed() -> list[Any]:
    return [
        argparse.Namespace,
        types.SimpleNamespace,
        pathlib.PosixPath,
        signal.Signals,
        numpy.ndarray,
        numpy.dtype,
        numpy.dtypes.UInt32DType,
        _reconstruct,
        (_reconstruct, "numpy.core.multiarray._reconstruct"),
        *((Placeholder, name) for name in _MEGATRON_CLASSES),
    ]


def _not_yet_allowed() -> list[Any]:
    """Return what is missing on torch's list: its context removes on leaving what megatron-core had put there before."""
    known = torch.serialization.get_safe_globals()
    return [allowed for allowed in _allowed() if allowed not in known]
