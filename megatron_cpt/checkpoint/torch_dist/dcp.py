"""torch.distributed.checkpoint files read tensor by tensor: no process group, no model, bounded memory.

A `torch_dist` folder is `.metadata` (a pickled index: which slice of which tensor lies where) and `__R_I.distcp` files
(each slice one `torch.save`). The index is read as data (index_pickle.py) and slices with `weights_only`, so that
nothing in a checkpoint can run code. torch writes a CRC-32 with each slice but does not check it when it loads; it is
checked here, so that a flipped bit is an error in any checkpoint.

Source: torch 2.13, `torch/distributed/checkpoint/{metadata,filesystem}.py`.
"""

import io
import math
import os
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

from megatron_cpt.checkpoint.torch_dist.index_pickle import NameRefused, read_index
from megatron_cpt.checkpoint.torch_dist.pickles import first_line, load_safely
from megatron_cpt.errors import CheckpointError, DamagedError
from megatron_cpt.files import naming

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
            stored = self._slice(key, chunk)
            here = stored[
                tuple(slice(low - off, high - off) for (low, high), off in zip(overlap, chunk.offsets, strict=True))
            ]
            if here.numel() == wanted:
                # A part of a slice is copied: a view would keep the whole slice in memory.
                return here.reshape(shape) if here.shape == stored.shape else here.clone()
            if result is None:
                result = self._empty(key, shape)
            result[tuple(slice(low - off, high - off) for (low, high), off in zip(overlap, start, strict=True))] = here
            # Slices of one tensor do not overlap (torch and megatron-core store each replica once), so the sum
            # reaches `wanted` only when every element is there.
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

    def _slice(self, key: str, chunk: ChunkStorageMetadata) -> torch.Tensor:
        stored = self._load(MetadataIndex(key, chunk.offsets))
        if not isinstance(stored, torch.Tensor) or stored.shape != chunk.sizes or stored.dtype != self.dtype(key):
            raise CheckpointError(
                f"{self.directory}: {key} at {list(chunk.offsets)} is not the {list(chunk.sizes)} {self.dtype(key)} that "
                "the index says. The checkpoint is damaged. Use another one."
            )
        return stored

    def _empty(self, key: str, shape: tuple[int, ...]) -> torch.Tensor:
        try:
            return torch.empty(shape, dtype=self.dtype(key))
        except (RuntimeError, MemoryError):
            raise CheckpointError(
                f"{self.directory}: {key} is {list(shape)} {self.dtype(key)} by the index, more than the memory. "
                "Use a machine with more memory; if no model is as large, the checkpoint is damaged."
            ) from None

    def _load(self, index: MetadataIndex, *, only_tensors: bool = True) -> Any:
        # MetadataIndex compares name and offset; its `index` is only a hint (torch 2.13).
        info = self.metadata.storage_data.get(index)
        if info is None:
            raise CheckpointError(
                f"{self.directory}: the index does not say where {index.fqn} at {list(index.offset or ())} lies. "
                "The checkpoint is damaged. Use another one."
            )
        path = self.directory / info.relative_path
        try:
            with path.open("rb", buffering=0) as file, naming(path):
                view = cast("IO[bytes]", _FileView(file, info.offset, info.length))
                where = f"{path}: {index.fqn} at byte {info.offset}"
                _check_crc(view, where)
                view.seek(0)
                return load_safely(view, where, only_tensors=only_tensors)
        except FileNotFoundError:
            raise DamagedError(f"{path}: no such file. {index.fqn} is in it. Use another checkpoint.") from None


def read_metadata(directory: Path) -> Metadata:
    """Return the index of a `torch_dist` folder, built from checked values (see index_pickle.py).

    Raises: CheckpointError when it is missing, damaged, or names a class that has no business in an index.
    """
    path = directory / METADATA
    try:
        with naming(path):
            content = path.read_bytes()
        return read_index(content)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file. A torch_dist checkpoint folder is needed.") from None
    except NameRefused as name:
        raise CheckpointError(
            f"{path}: names {name}, which has no business in an index and could run code. It is not loaded. "
            "Do not use a checkpoint from this source."
        ) from None
    except OSError:
        raise
    except Exception as problem:  # a damaged pickle can raise nearly anything
        raise DamagedError(
            f"{path}: cannot be read ({first_line(problem)}). The checkpoint is damaged. Use another one."
        ) from None


def _check_crc(view: IO[bytes], where: str) -> None:
    """Raise CheckpointError when a `torch.save` archive does not have the CRC-32 it was written with."""
    try:
        archive = zipfile.ZipFile(view)
    except zipfile.BadZipFile:
        return  # truncated: torch says so
    with archive:
        # torch.serialization.set_crc32_options(False) leaves 0 in the CRC field of every record and no flag (torch
        # 2.13). So if even the smallest record does not fit, none was computed.
        for number, info in enumerate(sorted(archive.infolist(), key=lambda info: info.file_size)):
            try:
                with archive.open(info) as record:
                    while record.read(_CHUNK_BYTES):
                        pass
            except zipfile.BadZipFile:
                if number == 0 and info.file_size < 64:
                    return  # the smallest record too: written without (torch.serialization.set_crc32_options)
                raise DamagedError(
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


def _overlap(start: Sequence[int], shape: Sequence[int], chunk: ChunkStorageMetadata) -> list[tuple[int, int]] | None:
    """Return per axis the bounds that a wanted region and a stored slice share, None when they share nothing."""
    bounds = [
        (max(low, offset), min(low + size, offset + length))
        for low, size, offset, length in zip(start, shape, chunk.offsets, chunk.sizes, strict=True)
    ]
    return bounds if all(low < high for low, high in bounds) else None
