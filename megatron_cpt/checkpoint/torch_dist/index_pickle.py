"""The pickled index of a `torch_dist` folder, read as data: no class of any module is looked up, none of ours can act.

Names are compared as (module, name) with a fixed table. Pickle's protocol 4 has dotted names (`strategies.torch`,
`os.system`), so that a check by prefix lets any function through. Known objects become a `Record`, an inert copy of the
stored values; the index is rebuilt from records after each value was checked. Only checked values are therefore used.

The unpickler is Python's pure-Python one: the C version allocates 64 GiB for a memo index of 4294967295, and hashes a
key of nested tuples without end.
"""

import functools
import io
import pickle
from collections.abc import Callable
from pathlib import PurePosixPath
from typing import Any, ClassVar

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)


class NameRefused(Exception):
    """The pickle names something that has no business in an index."""


class Record:
    """A pickle's description of one object: its constructor arguments and its state."""

    def __init__(self, *arguments: Any):
        self.arguments = arguments
        self.state: Any = None

    def field(self, name: str | int) -> Any:
        """Return a field of the object by name, or by place where it keeps a tuple. Raises: KeyError, TypeError when it has none."""
        return self.state[name]


@functools.lru_cache(maxsize=1)
def read_index(content: bytes) -> Metadata:
    """Return the index that `content` holds, made of checked values only; the last one is kept, as loading asks for it thrice.

    Raises: NameRefused; otherwise nearly any exception when the pickle is damaged or holds something else.
    """
    root = _Machine(content).load()
    if not isinstance(root, _CLASSES["Metadata"] | _CLASSES["MCoreMetadata"]):
        raise ValueError("it holds no index")
    index = Metadata(
        {_text(key): _entry(value) for key, value in root.field("state_dict_metadata").items()},
        storage_data={_place(key): _storage(value) for key, value in root.field("storage_data").items()},
        storage_meta=StorageMeta(),
    )
    version = root.state.get("version")
    index.version = version if isinstance(version, str) else None
    return index


def _entry(value: Record) -> TensorStorageMetadata | BytesStorageMetadata:
    if isinstance(value, _CLASSES["BytesStorageMetadata"]):
        return BytesStorageMetadata()
    _is_a(value, "TensorStorageMetadata")
    dtype = _is_a(value.field("properties"), "TensorProperties").field(0)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"a tensor's type is {type(dtype).__name__}")
    size = _numbers(value.field("size"))
    chunks = [_chunk(chunk, size) for chunk in value.field("chunks")]
    return TensorStorageMetadata(TensorProperties(dtype=dtype), size, chunks)


def _chunk(value: Record, size: torch.Size) -> ChunkStorageMetadata:
    _is_a(value, "ChunkStorageMetadata")
    offsets, sizes = _numbers(value.field("offsets")), _numbers(value.field("sizes"))
    if not len(offsets) == len(sizes) == len(size) or any(
        offset + length > whole for offset, length, whole in zip(offsets, sizes, size, strict=True)
    ):
        raise ValueError(f"a slice of {list(sizes)} at {list(offsets)} in a tensor of {list(size)}")
    return ChunkStorageMetadata(offsets, sizes)


def _place(value: Record) -> MetadataIndex:
    _is_a(value, "MetadataIndex")
    offset = value.state.get("offset")
    return MetadataIndex(_text(value.field("fqn")), None if offset is None else _numbers(offset))


def _storage(value: Record) -> _StorageInfo:
    _is_a(value, "_StorageInfo")
    name = _text(value.field("relative_path"))
    # A path with a separator would read files outside of the checkpoint's folder.
    if PurePosixPath(name).name != name or name in ("", "..") or "\0" in name:
        raise ValueError(f"a slice lies in {name[:80]!r}, which is not a file of the folder")
    if value.field("length") < 0 or value.state.get("transform_descriptors"):
        raise ValueError("a slice is transformed, or of negative length")
    (offset,), (length,) = _numbers([value.field("offset")]), _numbers([value.field("length")])
    return _StorageInfo(name, offset, length)


def _is_a(value: Any, name: str) -> Record:
    if not isinstance(value, _CLASSES[name]):
        raise ValueError(f"{type(value).__name__} where {name} belongs")
    return value


def _text(value: Any) -> str:
    if type(value) is not str:
        raise ValueError(f"{type(value).__name__} where a name belongs")
    return value


def _numbers(values: Any) -> torch.Size:
    values = list(values)
    # torch.Size takes True for 1, and its numbers end below 2^63.
    if values and not (set(map(type, values)) == {int} and min(values) >= 0 and max(values) < 1 << 63):
        raise ValueError("a size or place is no number between 0 and 2^63")
    return torch.Size(values)


_METADATA = "torch.distributed.checkpoint.metadata"
_FILESYSTEM = "torch.distributed.checkpoint.filesystem"
_PLANNER = "torch.distributed.checkpoint.planner"
_MCORE = "megatron.core.dist_checkpointing.strategies.torch"
_NAMES = {
    _METADATA: (
        "ChunkStorageMetadata", "TensorProperties", "TensorStorageMetadata", "BytesStorageMetadata", "Metadata",
        "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING",
    ),
    _FILESYSTEM: ("_StorageInfo", "_StoragePrefix"),
    _PLANNER: ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData"),
    _MCORE: ("MCoreMetadata", "MCoreSavePlan"),
    "torch.serialization": ("_get_layout",),
    "collections": ("OrderedDict",),
    "builtins": ("set",),
    "pathlib": ("PosixPath",),
    "pathlib._local": ("PosixPath",),
}  # fmt: skip
"""The table: every (module, name) that Megatron-Core and torch write into an index."""
_CLASSES: dict[str, type[Record]] = {name: type(name, (Record,), {}) for names in _NAMES.values() for name in names}
_DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}


_PythonUnpickler: Any = pickle._Unpickler
_Stop: Any = pickle.__dict__["_Stop"]


class _Machine(_PythonUnpickler):
    """Python's unpickler with every step that looks up, calls, builds or hashes replaced by one that cannot do harm."""

    dispatch: ClassVar[dict[int, Callable[..., None]]] = dict(_PythonUnpickler.dispatch)

    def __init__(self, content: bytes):
        file = io.BytesIO(content)
        super().__init__(file)
        self.read, self.readinto, self.readline = file.read, file.readinto, file.readline

    def load(self) -> Any:
        """Return the content of the pickle. Python's own loop reads through a second layer, which doubles the time."""
        self.metastack: list[Any] = []
        self.stack: list[Any] = []
        self.proto = 0
        self.append = self.stack.append
        try:
            while key := self.read(1):
                self.dispatch[key[0]](self)
        except _Stop as stop:
            return stop.value
        raise EOFError("it ends too early")

    def load_frame(self) -> None:
        # A frame's length only tells the C version how much to buffer. It is not needed here, and not trusted.
        self.read(8)

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name == "Size":
            return _numbers
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if name in _NAMES.get(module, ()):
            return _CLASSES[name]
        raise NameRefused(f"{module}.{name}")

    def get_extension(self, code: int) -> None:
        raise NameRefused(f"extension {code}")

    def load_reduce(self) -> None:
        arguments = self.stack.pop()
        self.stack[-1] = self._made(self.stack[-1], arguments)

    def load_newobj(self) -> None:
        arguments = self.stack.pop()
        self.stack[-1] = self._made(self.stack[-1], arguments)

    def load_newobj_ex(self) -> None:
        self.stack.pop()
        self.load_newobj()

    def _instantiate(self, kind: Any, arguments: Any) -> None:
        self.append(self._made(kind, arguments))

    def _made(self, kind: Any, arguments: Any) -> Any:
        if type(arguments) not in (tuple, list):
            raise ValueError("arguments that are none")
        if kind is _numbers:
            return _numbers(*arguments)
        if isinstance(kind, type) and issubclass(kind, Record):
            return kind(*arguments)
        raise ValueError(f"{type(kind).__name__} is called")

    def load_build(self) -> None:
        state = self.stack.pop()
        if not isinstance(self.stack[-1], Record):
            raise ValueError(f"{type(self.stack[-1]).__name__} is given a state")
        self.stack[-1].state = state

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set(self.stack[-1], [key, value])

    def load_setitems(self) -> None:
        items = self.pop_mark()
        self._set(self.stack[-1], items)

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.append({})
        self._set(self.stack[-1], items)

    def _set(self, target: Any, items: list[Any]) -> None:
        """Set keys whose hash costs nothing: a tuple of tuples of tuples takes 2^n steps."""
        if isinstance(target, Record):
            return  # an OrderedDict of the planner's, which nothing reads
        if type(target) is not dict:
            raise ValueError(f"{type(target).__name__} is given keys")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[key if type(key) in (str, int) or isinstance(key, Record) else _Unhashed()] = value

    def load_additems(self) -> None:
        self.pop_mark()

    def load_empty_set(self) -> None:
        self.append(_CLASSES["set"]())

    def load_frozenset(self) -> None:
        self.pop_mark()
        self.load_empty_set()

    def load_append(self) -> None:
        value = self.stack.pop()
        self._extend([value])

    def load_appends(self) -> None:
        values = self.pop_mark()
        self._extend(values)

    def _extend(self, values: list[Any]) -> None:
        if type(self.stack[-1]) is not list:
            raise ValueError(f"{type(self.stack[-1]).__name__} is appended to")
        self.stack[-1].extend(values)

    replaced: ClassVar[tuple[tuple[bytes, Callable[..., None]], ...]] = (
        (pickle.FRAME, load_frame), (pickle.REDUCE, load_reduce), (pickle.NEWOBJ, load_newobj), (pickle.NEWOBJ_EX, load_newobj_ex),
        (pickle.BUILD, load_build), (pickle.SETITEM, load_setitem), (pickle.SETITEMS, load_setitems),
        (pickle.DICT, load_dict), (pickle.ADDITEMS, load_additems), (pickle.EMPTY_SET, load_empty_set),
        (pickle.FROZENSET, load_frozenset), (pickle.APPEND, load_append), (pickle.APPENDS, load_appends),
    )  # fmt: skip
    # Python's unpickler calls plain functions from this table, so overriding a method of the same name would change
    # nothing.
    dispatch |= {code[0]: step for code, step in replaced}


class _Unhashed:
    """Takes the place of a key that nothing reads."""
