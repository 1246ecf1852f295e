"""Pickles that run code, hang or eat the memory of whoever unpickles them carelessly; each would leave a mark.

`attacks(mark)` gives name -> pickle. Python's own `pickle.load` makes the mark with each of `running(mark)`; the tests prove
it, so that an attack that does nothing is not taken for a defence.
"""

import os
import pickle
from collections.abc import Callable
from pathlib import Path

MCORE = b"megatron.core.dist_checkpointing"
"""The module whose names were once let through by their beginning."""


def attacks(mark: Path) -> dict[str, bytes]:
    """Return name -> a pickle that touches `mark`, or misuses the machine, when it is loaded without care."""
    return {**running(mark), **misusing()}


def running(mark: Path) -> dict[str, bytes]:
    """Return name -> a pickle that runs `touch MARK` in a plain unpickler."""
    command = f"touch {mark}"
    found = {f"reduce-{protocol}": pickle.dumps(_Evil(command), protocol) for protocol in range(6)}
    found |= {f"nested-{protocol}": pickle.dumps(_Nested(command), protocol) for protocol in range(6)}
    argument = _text(command)
    system = b"cposix\nsystem\n"
    return {
        **found,
        "dotted": b"\x80\x04" + _global(MCORE + b".strategies.torch", b"os.system") + argument + b"\x85R.",
        "dotted-of-an-allowed-module": b"\x80\x04" + _global(b"torch.serialization", b"os.system") + argument + b"\x85R.",
        "dotted-of-the-file-system": b"\x80\x04"
        + _global(b"torch.distributed.checkpoint.filesystem", b"os.system") + argument + b"\x85R.",
        "inst": b"(S'" + command.encode() + b"'\niposix\nsystem\n.",
        "obj": b"\x80\x02(" + system + argument + b"o.",
        "memo": b"\x80\x04" + system + b"\x94N0h\x00" + argument + b"\x85R.",
        "long-memo": b"\x80\x02" + system + b"r\x00\x01\x00\x000j\x00\x01\x00\x00" + argument + b"\x85R.",
        "stack-global-of-parts": b"\x80\x04" + argument + b"\x940" + _text("posix") + _text("system") + b"\x93h\x00\x85R.",
        "build": b"\x80\x04" + _global(b"types", b"SimpleNamespace") + b")R\x94}" + _text("__setstate__") + system + b"sb"
        + b"h\x00" + argument + b"b.",
        "pop-mark": b"\x80\x04(" + system + b"1" + system + argument + b"\x85R.",
        "in-a-dictionary": b"\x80\x04}" + _text("state_dict_metadata") + system + argument + b"\x85Rs.",
    }  # fmt: skip


def misusing() -> dict[str, bytes]:
    """Return name -> a pickle that hangs, eats memory or changes a class."""
    bomb = b"\x80\x04K\x01" + b"2\x86" * 64
    return {
        "hash-of-nested-tuples": b"\x80\x04}" + bomb[2:] + b"K\x01s.",
        "set-of-nested-tuples": b"\x80\x04\x8f(" + bomb[2:] + b"\x90.",
        "frozenset-of-nested-tuples": b"\x80\x04(" + bomb[2:] + b"\x91.",
        "memo-place-of-64-gib": b"\x80\x02K\x01r\xff\xff\xff\x7f.",
        "bytes-of-an-exabyte": b"\x80\x04\x8e\x00\x00\x00\x00\x00\x00\x00\x10.",
        "bytearray-of-an-exabyte": b"\x80\x05\x96\x00\x00\x00\x00\x00\x00\x00\x10.",
        "build-on-a-class": b"\x80\x02ctorch.distributed.checkpoint.metadata\nMetadata\nN}X\x07\x00\x00\x00versionK\x07s\x86b.",
        "extension": b"\x80\x02\x82\x01.",
        "persistent-id": b"\x80\x02K\x01Q.",
        "next-buffer": b"\x80\x05\x97.",
        "deep-lists": b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b".",
    }


class _Evil:
    def __init__(self, command: str):
        self.command = command

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.system, (self.command,)


class _Nested(_Evil):
    def __reduce__(self) -> tuple[Callable[..., object], tuple[bytes]]:  # type: ignore[override]
        return pickle.loads, (pickle.dumps(_Evil(self.command)),)


def _global(module: bytes, name: bytes) -> bytes:
    return _text(module.decode()) + _text(name.decode()) + b"\x93"


def _text(text: str) -> bytes:
    return b"X" + len(text.encode()).to_bytes(4, "little") + text.encode()
