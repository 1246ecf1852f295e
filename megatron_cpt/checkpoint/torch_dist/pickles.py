"""Pickles read without running code: `weights_only`, and an allow-list of what Megatron puts beside the tensors.

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
from pathlib import Path
from typing import IO, Any

import numpy
import torch
from numpy._core.multiarray import _reconstruct

from megatron_cpt.errors import CheckpointError

_MEGATRON_CLASSES = (
    "megatron.core.enums.ModelType",
    "megatron.core.transformer.enums.AttnBackend",
    "megatron.core.transformer.enums.CudaGraphScope",
    "megatron.core.rerun_state_machine.RerunState",
    "megatron.core.rerun_state_machine.RerunMode",
    "megatron.core.rerun_state_machine.RerunDiagnostic",
    "megatron.training.tokenizer.tokenizer._GPT2BPETokenizer",
)

_LOCK = threading.Lock()
"""torch keeps its allow-list per process."""


class Placeholder:
    """Stands for an object beside the tensors that is not needed (Megatron-Core's MCoreMetadata, cached plans, enums)."""

    def __init__(self, *ignored: Any, **also_ignored: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


def load_safely(source: Path | IO[bytes], where: str, *, mmap: bool = False, only_tensors: bool = False) -> Any:
    """Return the content of a `torch.save` file, on the CPU; `only_tensors`: without the allow-list.

    Raises: CheckpointError naming the class that is not allowed, or saying that the file is damaged.
    """
    try:
        if only_tensors:
            return torch.load(source, map_location="cpu", weights_only=True, mmap=mmap or None)
        with _LOCK, torch.serialization.safe_globals(_not_yet_allowed()):
            return torch.load(source, map_location="cpu", weights_only=True, mmap=mmap or None)
    except pickle.UnpicklingError as problem:
        found = re.search(r"GLOBAL ([\w.]+)", str(problem))
        if found is None and "Unsupported class" not in str(problem) and "Unsupported global" not in str(problem):
            raise CheckpointError(f"{where}: cannot be read ({_first_line(problem)}). It is damaged.") from None
        raise CheckpointError(
            f"{where}: holds {found[1] if found else 'a class'}, which is not on the allow-list of weights and arguments. "
            "It is not loaded, because it could run code."
        ) from None
    except (RuntimeError, EOFError) as problem:
        raise CheckpointError(f"{where}: cannot be read ({_first_line(problem)}). The file is damaged.") from None


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


def _first_line(problem: Exception) -> str:
    return (str(problem).splitlines() or [type(problem).__name__])[0]
