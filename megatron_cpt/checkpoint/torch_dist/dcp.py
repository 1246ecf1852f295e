"""torch.distributed.checkpoint files read tensor by tensor: no process group, no model, bounded memory.

A `torch_dist` folder is `.metadata` (a pickled index: which slice of which tensor lies where) and `__R_I.distcp` files
(each slice one `torch.save`). The index is unpickled through an allow-list and slices with `weights_only`, so that
nothing in a checkpoint can run code. torch writes a CRC-32 with each slice but does not look at it when it loads; it is
checked here, so that a flipped bit is an error whoever made the checkpoint.

Source: torch 2.13, `torch/distributed/checkpoint/{metadata,filesystem}.py`.
"""

import io
import math
import os
import pathlib
import pickle
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from megatron_cpt.checkpoint.torch_dist.pickles import Placeholder, load_safely
from megatron_cpt.errors import CheckpointError

METADATA = ".metadata"
_CHUNK_BYTES = 1 << 22


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
        """Return a stored object, read as `safe.load_safely` does."""
        return self._load(MetadataIndex(key), only_tensors=False)

    def _tensor(self, key: str) -> TensorStorageMetadata:
        try:
            return self._tensors[key]
        except KeyError:
            raise CheckpointError(f"{self.directory}: no tensor {key}. It holds {len(self._tensors)} others.") from None

    def _load(self, index: MetadataIndex, *, only_tensors: bool = True) -> Any:
        info = self.metadata.storage_data[index]
        path = self.directory / Path(info.relative_path).name
        try:
            with path.open("rb", buffering=0) as file:
                view = cast("IO[bytes]", _FileView(file, info.offset, info.length))
                where = f"{path}: {index.fqn} at byte {info.offset}"
                _check_crc(view, where)
                view.seek(0)
                return load_safely(view, where, only_tensors=only_tensors)
        except FileNotFoundError:
            raise CheckpointError(f"{path}: no such file. {index.fqn} is in it. Use another checkpoint.") from None


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


def _check_crc(view: IO[bytes], where: str) -> None:
    """Raise CheckpointError when a `torch.save` archive does not have the CRC-32 it was written with."""
    try:
        archive = zipfile.ZipFile(view)
    except zipfile.BadZipFile:
        return  # truncated: torch says so
    with archive:
        for number, info in enumerate(sorted(archive.infolist(), key=lambda info: info.file_size)):
            try:
                with archive.open(info) as record:
                    while record.read(_CHUNK_BYTES):
                        pass
            except zipfile.BadZipFile:
                if number == 0 and info.file_size < 64:
                    return  # the smallest record too: written without (torch.serialization.set_crc32_options)
                raise CheckpointError(
                    f"{where}: its CRC-32 does not fit its content. The file is damaged. Use another checkpoint."
                ) from None


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


_ALLOWED = {
    *(("torch.distributed.checkpoint.metadata", name) for name in (
        "ChunkStorageMetadata", "TensorProperties", "TensorStorageMetadata", "BytesStorageMetadata", "Metadata",
        "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING",
    )),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    ("builtins", "set"),
}  # fmt: skip
_BOOKKEEPING = ("megatron.core.dist_checkpointing", "torch.distributed.checkpoint.planner")


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module in ("pathlib", "pathlib._local") and name == "PosixPath":
            return pathlib.PosixPath
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) in _ALLOWED:
            return super().find_class(module, name)
        if module.startswith(_BOOKKEEPING):
            return Placeholder
        raise CheckpointError(
            f"the index names {module}.{name}, which has no business in it. Do not use a checkpoint from this source."
        )


def _overlap(start: Sequence[int], shape: Sequence[int], chunk: ChunkStorageMetadata) -> list[tuple[int, int]] | None:
    """Return per axis the bounds that a wanted region and a stored slice share, None when they share nothing."""
    bounds = [
        (max(low, offset), min(low + size, offset + length))
        for low, size, offset, length in zip(start, shape, chunk.offsets, chunk.sizes, strict=True)
    ]
    return bounds if all(low < high for low, high in bounds) else None
