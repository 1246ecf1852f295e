"""Continual pre-training on Megatron-Core: from raw text and a base model to a better model.

In Python the work is done by twelve functions, imported when they are first used: `import megatron_cpt as cpt` takes no time. Four
of them (config, train, run, evaluate) share their names with packages of the library: these packages can be called.
"""

import importlib
import sys
import types
from typing import Any

__version__ = "0.1.0"

_INTERFACE = {
    **dict.fromkeys(("config", "init", "plan", "train"), "tasks"),
    **dict.fromkeys(("dedup", "tokenize", "shard"), "texts"),
    **dict.fromkeys(("convert", "soup", "evaluate", "generate"), "models"),
    "run": "runs",
}
"""Function -> module of `megatron_cpt.interface`."""
_PACKAGES = ("config", "train", "run", "evaluate")


class _CallablePackage(types.ModuleType):
    """A package that is a function of the interface too."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return _function(self.__name__.rpartition(".")[2])(*arguments, **options)


class _Root(types.ModuleType):
    """This module: makes each of `_PACKAGES` callable when the import system binds it."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _PACKAGES and isinstance(value, types.ModuleType):
            value.__class__ = _CallablePackage
        super().__setattr__(name, value)


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return importlib.import_module(f"megatron_cpt.{name}")
    if name in _INTERFACE:
        return _function(name)
    raise AttributeError(f"module 'megatron_cpt' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*_INTERFACE, "__version__"]


def _function(name: str) -> Any:
    return getattr(importlib.import_module(f"megatron_cpt.interface.{_INTERFACE[name]}"), name)


sys.modules[__name__].__class__ = _Root
