"""torch.distributed.checkpoint files read and written tensor by tensor: no process group, no model, bounded memory.

A `torch_dist` folder is `.metadata` (a pickled index: which slice of which tensor lies where) and `__R_I.distcp` files
(each slice one `torch.save`). The index is unpickled through an allow-list and slices with `weights_only`, so that
nothing in a checkpoint can run code.

Source: torch 2.13, `torch/distributed/checkpoint/{metadata,filesystem}.py`.
"""

import collections
import hashlib
import io
import math
import os
import pathlib
import pickle
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_cpt.errors import CheckpointError
from megatron_cpt.files import sync_dir

METADATA = ".metadata"
PART_BYTES = 1 << 30


@dataclass(frozen=True)
class Slice:
    """What one write produces: `key[offsets : offsets + shape]` of a tensor with `global_shape`."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    offsets: tuple[int, ...]
    global_shape: tuple[int, ...]
    build: Callable[[], torch.Tensor]
    """Returns the values; called once, in a worker thread."""

    @property
    def num_bytes(self) -> int:
        """Bytes of the values."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_dcp(
    directory: Path,
    slices: Sequence[Slice],
    *,
    objects: Mapping[str, Any] | None = None,
    num_workers: int = 2,
    progress: Callable[[int], None] = lambda _: None,
) -> dict[str, str]:
    """Write `slices` and the pickled `objects` as DCP files; return file name -> BLAKE2b-128 of what was written.

    Memory: `num_workers` slices and their sources at a time. Files are flushed to disk; `.metadata` comes last.
    """
    storage: dict[MetadataIndex, _StorageInfo] = {}
    hashes: dict[str, str] = {}

    def write_part(number: int) -> tuple[str, str, dict[MetadataIndex, _StorageInfo]]:
        name = f"__0_{number}.distcp"
        placed = {}
        with (directory / name).open("wb") as raw:
            file = cast("IO[bytes]", hashing := HashingWriter(raw))
            for part in parts[number]:
                offset = file.tell()
                torch.save(_checked(part), file)
                index = MetadataIndex(part.key, part.offsets)
                placed[index] = _StorageInfo(name, offset, file.tell() - offset)
                progress(part.num_bytes)
            for key, value in (objects or {}).items() if number == 0 else ():
                offset = file.tell()
                torch.save(value, file)
                placed[MetadataIndex(key)] = _StorageInfo(name, offset, file.tell() - offset)
            raw.flush()
            os.fsync(raw.fileno())
        return name, hashing.hexdigest(), placed

    parts = _split_evenly(slices, max(num_workers, -(-sum(part.num_bytes for part in slices) // PART_BYTES)))
    with ThreadPoolExecutor(num_workers) as pool:
        for name, digest, placed in pool.map(write_part, range(len(parts))):
            hashes[name] = digest
            storage.update(placed)
    index = Metadata(_state_dict_metadata(slices, objects or {}), storage_data=storage)
    index.storage_meta, index.version = StorageMeta(), CURRENT_DCP_VERSION
    with (directory / METADATA).open("wb") as raw:
        file = HashingWriter(raw)
        pickle.dump(index, file)
        raw.flush()
        os.fsync(raw.fileno())
    sync_dir(directory)
    return {**hashes, METADATA: file.hexdigest()}


class DcpReader:
    """Tensors of a `torch_dist` folder by key, or slices of them. Safe to use from several threads."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.metadata = read_metadata(directory)
        self._tensors = {
            key: value
            for key, value in self.metadata.state_dict_metadata.items()
            if isinstance(value, TensorStorageMetadata)
        }

    def tensor_keys(self) -> list[str]:
        """Return the tensors' keys in the order of the index."""
        return list(self._tensors)

    def object_keys(self) -> list[str]:
        """Return the keys of pickled objects."""
        return [key for key in self.metadata.state_dict_metadata if key not in self._tensors]

    def shape(self, key: str) -> tuple[int, ...]:
        """Return a tensor's whole shape."""
        return tuple(self._tensor(key).size)

    def dtype(self, key: str) -> torch.dtype:
        """Return a tensor's type on disk."""
        return self._tensor(key).properties.dtype

    def read(self, key: str, start: Sequence[int] | None = None, shape: Sequence[int] | None = None) -> torch.Tensor:
        """Return `key[start : start + shape]` (default: all of it) from every stored slice that overlaps.

        Raises: CheckpointError when the stored slices do not cover it.
        """
        whole = self.shape(key)
        start = tuple(start) if start is not None else (0,) * len(whole)
        shape = tuple(shape) if shape is not None else whole
        wanted = math.prod(shape)
        result: torch.Tensor | None = None
        covered = 0
        for chunk in self._tensor(key).chunks:
            overlap = _overlap(start, shape, chunk)
            if overlap is None:
                continue
            stored = self._load(MetadataIndex(key, chunk.offsets))
            here = stored[
                tuple(slice(low - off, high - off) for (low, high), off in zip(overlap, chunk.offsets, strict=True))
            ]
            if here.numel() == wanted:
                return here.reshape(shape) if here.shape == stored.shape else here.clone()
            if result is None:
                result = torch.empty(shape, dtype=self.dtype(key))
            result[tuple(slice(low - off, high - off) for (low, high), off in zip(overlap, start, strict=True))] = here
            covered += here.numel()
        if result is None or covered != wanted:
            raise CheckpointError(
                f"{self.directory}: {key} {list(shape)} at {list(start)} is covered by {covered} of {wanted} elements. "
                "The checkpoint is damaged. Use another one."
            )
        return result

    def read_object(self, key: str) -> Any:
        """Return a stored object, unpickled with `weights_only`."""
        return self._load(MetadataIndex(key))

    def _tensor(self, key: str) -> TensorStorageMetadata:
        try:
            return self._tensors[key]
        except KeyError:
            raise CheckpointError(f"{self.directory}: no tensor {key}. It holds {len(self._tensors)} others.") from None

    def _load(self, index: MetadataIndex) -> Any:
        info = self.metadata.storage_data[index]
        path = self.directory / Path(info.relative_path).name
        try:
            with path.open("rb", buffering=0) as file:
                view = cast("IO[bytes]", _FileView(file, info.offset, info.length))
                return torch.load(view, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            raise CheckpointError(f"{path}: no such file. {index.fqn} is in it. Use another checkpoint.") from None
        except (RuntimeError, pickle.UnpicklingError, EOFError) as problem:
            raise CheckpointError(
                f"{path}: {index.fqn} at byte {info.offset} cannot be read ({str(problem).splitlines()[0]}). "
                "The file is damaged. Use another checkpoint."
            ) from None


def read_metadata(directory: Path) -> Metadata:
    """Return the index of a `torch_dist` folder, unpickled through an allow-list.

    Raises: CheckpointError when it is missing, damaged, or names a class that has no business in an index.
    """
    path = directory / METADATA
    try:
        with path.open("rb") as file:
            index = _IndexUnpickler(file).load()
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file. A torch_dist checkpoint folder is needed.") from None
    except CheckpointError:
        raise
    except Exception as problem:  # a damaged pickle can raise nearly anything
        raise CheckpointError(
            f"{path}: cannot be read ({problem}). The checkpoint is damaged. Use another one."
        ) from None
    if not isinstance(index, Metadata) or index.storage_data is None:
        raise CheckpointError(f"{path}: is no index of a torch_dist checkpoint. Use another checkpoint.")
    return index


class HashingWriter(io.RawIOBase):
    """A file opened for writing that hashes (BLAKE2b-128) what passes through it."""

    def __init__(self, raw: IO[bytes]):
        self._raw = raw
        self._digest = hashlib.blake2b(digest_size=16)
        self._position = 0

    def write(self, data: Any) -> int:
        """Write and hash `data`."""
        view = memoryview(data).cast("B")
        self._raw.write(view)
        self._digest.update(view)
        self._position += len(view)
        return len(view)

    def writable(self) -> bool:
        """Return True."""
        return True

    def tell(self) -> int:
        """Return the bytes written so far."""
        return self._position

    def hexdigest(self) -> str:
        """Return the hash of everything written."""
        return self._digest.hexdigest()


class _FileView(io.RawIOBase):
    """The bytes `offset` to `offset + length` of a file as a file of their own."""

    def __init__(self, file: IO[bytes], offset: int, length: int):
        self._descriptor, self._offset, self._length, self._position = file.fileno(), offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, position: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}[whence]
        self._position = base + position
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        view = view[: max(self._length - self._position, 0)]
        count = os.preadv(self._descriptor, [view], self._offset + self._position) if len(view) else 0
        self._position += count
        return count


_ALLOWED_MODULES = {
    dcp_metadata.__name__,
    "torch.distributed.checkpoint.filesystem",
    "torch.distributed.checkpoint.planner",
}
_ALLOWED_NAMES = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    ("builtins", "set"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
}


class _Placeholder:
    """Stands for bookkeeping of other writers (Megatron-Core's MCoreMetadata, MCoreSavePlan) that is not needed."""


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module in ("pathlib", "pathlib._local") and name == "PosixPath":
            return pathlib.PosixPath
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if module == "collections" and name == "OrderedDict":
            return collections.OrderedDict
        if (module, name) in _ALLOWED_NAMES or (module in _ALLOWED_MODULES and re.fullmatch(r"_?[A-Z]\w*", name)):
            return super().find_class(module, name)
        if module.startswith("megatron.core.dist_checkpointing"):
            return _Placeholder
        raise CheckpointError(
            f"the index names {module}.{name}, which has no business in it. Do not use a checkpoint from this source."
        )


def _checked(part: Slice) -> torch.Tensor:
    values = part.build().detach()
    if tuple(values.shape) != part.shape or values.dtype != part.dtype:
        raise CheckpointError(
            f"{part.key}: {list(values.shape)} {values.dtype} instead of {list(part.shape)} {part.dtype} was about to be written."
        )
    values = values.contiguous()
    return values if values.untyped_storage().nbytes() == values.nbytes else values.clone()


def _split_evenly(slices: Sequence[Slice], num_parts: int) -> list[list[Slice]]:
    """Split in order into about `num_parts` parts of equal bytes, none empty."""
    target = max(sum(part.num_bytes for part in slices) / num_parts, 1)
    parts: list[list[Slice]] = [[]]
    done = 0
    for part in slices:
        if parts[-1] and done >= target * len(parts):
            parts.append([])
        parts[-1].append(part)
        done += part.num_bytes
    return parts


def _state_dict_metadata(slices: Sequence[Slice], objects: Mapping[str, Any]) -> dict[str, Any]:
    index: dict[str, Any] = {}
    for part in slices:
        entry = index.setdefault(
            part.key,
            TensorStorageMetadata(TensorProperties(dtype=part.dtype), torch.Size(part.global_shape), []),
        )
        entry.chunks.append(ChunkStorageMetadata(torch.Size(part.offsets), torch.Size(part.shape)))
    return {**index, **{key: BytesStorageMetadata() for key in objects}}


def _overlap(start: Sequence[int], shape: Sequence[int], chunk: ChunkStorageMetadata) -> list[tuple[int, int]] | None:
    """Return per axis the bounds that a wanted region and a stored slice share, None when they share nothing."""
    bounds = [
        (max(low, offset), min(low + size, offset + length))
        for low, size, offset, length in zip(start, shape, chunk.offsets, chunk.sizes, strict=True)
    ]
    return bounds if all(low < high for low, high in bounds) else None
