"""torch.distributed.checkpoint files written slice by slice, from worker threads, hashed on the way.

Nothing of a model is needed but the shapes: each slice is built when its turn comes, and memory holds one per worker.

Source: torch 2.13, `torch/distributed/checkpoint/{metadata,filesystem}.py`.
"""

import io
import math
import os
import pickle
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import torch
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

from megatron_cpt.checkpoint.torch_dist.content import ContentDigest
from megatron_cpt.checkpoint.torch_dist.dcp import METADATA
from megatron_cpt.errors import CheckpointError
from megatron_cpt.files import naming, sync_dir

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
    """Write `slices` and the pickled `objects` as DCP files; return file name -> hash of what was written.

    Memory: `num_workers` slices and their sources at a time. Files are flushed to disk; `.metadata` comes last.
    """
    storage: dict[MetadataIndex, _StorageInfo] = {}
    hashes: dict[str, str] = {}

    def write_part(number: int) -> tuple[str, str, dict[MetadataIndex, _StorageInfo]]:
        # The names that torch's own writer gives files of rank 0.
        name = f"__0_{number}.distcp"
        placed = {}
        with naming(directory / name), (directory / name).open("wb") as raw:
            file = cast("IO[bytes]", hashing := HashingWriter(raw))
            for part in parts[number]:
                # torch.save only appends to this file, so hash, offset and length follow from what passes through.
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
    # After all parts: the index names offsets, which are known only when everything is written.
    index = Metadata(_state_dict_metadata(slices, objects or {}), storage_data=storage)
    index.storage_meta, index.version = StorageMeta(), CURRENT_DCP_VERSION
    with naming(directory / METADATA), (directory / METADATA).open("wb") as raw:
        file = HashingWriter(raw)
        pickle.dump(index, file)
        raw.flush()
        os.fsync(raw.fileno())
    sync_dir(directory)
    return {**hashes, METADATA: file.hexdigest()}


class HashingWriter(io.RawIOBase):
    """A file opened for writing that hashes what passes through it (see `content.py`)."""

    def __init__(self, raw: IO[bytes]):
        self._raw = raw
        self._digest = ContentDigest()
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


def _checked(part: Slice) -> torch.Tensor:
    values = part.build().detach()
    if tuple(values.shape) != part.shape or values.dtype != part.dtype:
        raise CheckpointError(
            f"{part.key}: {list(values.shape)} {values.dtype} instead of {list(part.shape)} {part.dtype} was about to be written."
        )
    # torch.save writes the whole storage of a view (torch's own writer clones for the same reason).
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
