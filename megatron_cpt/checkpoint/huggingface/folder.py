"""Hugging Face folders: tensors read one at a time with plain reads, shards written in one pass.

A safetensors file is eight bytes (length of the header, little endian), a JSON header (name -> dtype, shape, offsets) and
the values. Reading with `preadv` into a tensor of our own keeps the memory bounded by what is asked for, which a mapped
file does not. `pytorch_model*.bin` folders are read by `safe.load_safely`, mapped.
"""

import contextlib
import hashlib
import itertools
import json
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_cpt.checkpoint.huggingface.options import CONVERSION, ImportOptions
from megatron_cpt.checkpoint.huggingface.quantized import (
    BLOCK_SCALES,
    BLOCKS,
    FLOAT8,
    SCALE,
    fp8_values,
    mxfp4_shape,
    mxfp4_values,
    quantization,
)
from megatron_cpt.checkpoint.huggingface.weight_files import weight_files
from megatron_cpt.checkpoint.torch_dist.dcp_writer import HashingWriter
from megatron_cpt.checkpoint.torch_dist.pickles import load_safely
from megatron_cpt.errors import CheckpointError
from megatron_cpt.files import naming, read_json, write_json

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
NAME_OF_DTYPE = {dtype: name for name, dtype in DTYPES.items()}
SIDE_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "tokenization_*.py",
)
"""What belongs to a tokenizer (globs)."""
_MOST_HEADER_BYTES = 100_000_000
"""The safetensors library's own limit."""
_SAMPLES, _SAMPLE_BYTES = 16, 1 << 16


class HFFolder:
    """A model folder: its configuration and its tensors by name, quantized ones as ordinary ones (or all `as_stored`)."""

    def __init__(self, path: Path, *, as_stored: bool = False):
        self.path, self._as_stored = path, as_stored
        self.config = _read_config(path / "config.json")
        self._entries: dict[str, tuple[Path, int, int, torch.dtype, tuple[int, ...]]] = {}
        self._pickled: dict[str, torch.Tensor] = {}
        self.files, self._named = weight_files(path)
        for file in self.files:
            content = _read_header(file) if file.suffix == ".safetensors" else _read_pickled(file)
            for name, value in content.items():
                self._add(name, value, file)
        self._check_index()
        self._quantized: tuple[str, tuple[int, int]] | None = None
        if not as_stored:
            with contextlib.suppress(CheckpointError):  # another kind: its tensors read as they are stored
                self._quantized = quantization(self.config, str(path / "config.json"))
        if self._quantized:
            self.config = {key: value for key, value in self.config.items() if key != "quantization_config"}

    @property
    def options(self) -> ImportOptions:
        """What a conversion that wrote the folder was told to pass over."""
        return ImportOptions.of(_read_record(self.path / CONVERSION))

    def names(self) -> list[str]:
        """Return the names of all tensors, in file order."""
        stored = [*self._entries, *self._pickled]
        if self._quantized is None:
            return stored
        names, present = [], set(stored)
        for name in stored:
            if name.endswith(BLOCKS) and name.removesuffix(BLOCKS) + BLOCK_SCALES in present:
                names.append(name.removesuffix(BLOCKS))
            elif not (
                (name.endswith(BLOCK_SCALES) and name.removesuffix(BLOCK_SCALES) + BLOCKS in present)
                or (name.endswith(SCALE) and name.removesuffix(SCALE) in present)
            ):
                names.append(name)
        return names

    def names_to_claim(self, output: str | None, embedding: str) -> list[str]:
        """Return the names without the layer `output` (of a model with tied embeddings) that repeats `embedding` bit for bit.

        Raises: CheckpointError when it does not repeat them.
        """
        names = self.names()
        if output is None or output not in names or embedding not in names:
            return names
        if not torch.equal(self.read(output), self.read(embedding)):
            raise CheckpointError(
                f"{self.path}: tie_word_embeddings is true but {output} differs from {embedding}. One of them is wrong. "
                "Set tie_word_embeddings to false in config.json if the output layer is meant."
            )
        return [name for name in names if name != output]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape."""
        if self._is_packed(name):
            return mxfp4_shape(self._shape(name + BLOCKS))
        return self._shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """Return a tensor's type: that on disk, or that which a quantized tensor is made into."""
        if self._is_packed(name):
            return self._unpacked_type()
        dtype = self._dtype(name)
        if dtype not in FLOAT8 or self._as_stored:
            return dtype
        if self._quantized is None or not self._has(name + SCALE):
            raise CheckpointError(
                f"{self.path}: {name} is float8 without a scale ({name}{SCALE} and quantization_config are needed). Its values "
                "mean nothing alone. Fetch the folder again, or its weights in bf16."
            )
        return self._unpacked_type()

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor, read into memory of its own."""
        if self._is_packed(name):
            return mxfp4_values(self._read(name + BLOCKS), self._read(name + BLOCK_SCALES), self.dtype(name))
        if self._dtype(name) not in FLOAT8 or self._as_stored:
            return self._read(name)
        dtype = self.dtype(name)
        assert self._quantized is not None
        return fp8_values(self._read(name), self._read(name + SCALE), self._quantized[1], dtype)

    def _read(self, name: str) -> torch.Tensor:
        if name in self._pickled:
            return self._pickled[name].clone()
        file, offset, length, dtype, shape = self._entry(name)
        if math.prod(shape) == 0:
            return torch.empty(shape, dtype=dtype)
        values = torch.empty(length, dtype=torch.uint8)
        with file.open("rb", buffering=0) as raw, naming(file):
            _read_fully(raw.fileno(), memoryview(values.numpy()), offset, file)
        return values.view(dtype).view(shape)

    def _shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._pickled[name].shape) if name in self._pickled else self._entry(name)[4]

    def _dtype(self, name: str) -> torch.dtype:
        return self._pickled[name].dtype if name in self._pickled else self._entry(name)[3]

    def _has(self, name: str) -> bool:
        return name in self._entries or name in self._pickled

    def _is_packed(self, name: str) -> bool:
        return self._quantized is not None and not self._has(name) and self._has(name + BLOCKS)

    def _unpacked_type(self) -> torch.dtype:
        name = self.config.get("dtype") or self.config.get("torch_dtype")
        return {"float32": torch.float32, "float16": torch.float16}.get(str(name), torch.bfloat16)

    def fingerprint(self) -> dict[str, Any]:
        """Return what tells this model from another without reading it whole: configuration, and per weight file its size
        and a hash of its header and of 16 pieces of 64 KiB over its length."""
        return {
            "config": hashlib.blake2b((self.path / "config.json").read_bytes(), digest_size=16).hexdigest(),
            "files": {file.name: [file.stat().st_size, sampled_hash(file)] for file in self.files},
        }

    def num_bytes(self) -> int:
        """Return the bytes of the weight files."""
        return sum(file.stat().st_size for file in self.files)

    def _entry(self, name: str) -> tuple[Path, int, int, torch.dtype, tuple[int, ...]]:
        try:
            return self._entries[name]
        except KeyError:
            raise CheckpointError(
                f"{self.path}: no tensor {name}. It holds {len(self._entries) + len(self._pickled)} others. "
                "The folder is incomplete or of another architecture."
            ) from None

    def _add(self, name: str, value: Any, file: Path) -> None:
        if self._named is not None and self._named.get(name) != file.name:
            return  # an older tensor in a file that the index names for others
        if self._has(name):
            raise CheckpointError(
                f"{self.path}: {name} is in two files, one of them {file.name}, and no index says which is meant. "
                "Remove the files that are left over."
            )
        if isinstance(value, torch.Tensor):
            self._pickled[name] = value
        else:
            self._entries[name] = value

    def _check_index(self) -> None:
        missing = sorted(name for name in self._named or () if not self._has(name))
        if missing:
            raise CheckpointError(
                f"{self.path}: {len(missing)} tensors of the index are in no file, the first is {missing[0]}. "
                "The folder is incomplete. Fetch it again."
            )


@dataclass(frozen=True)
class OutputGroup:
    """Tensors that are produced together and lie in the same shard."""

    tensors: tuple[tuple[str, tuple[int, ...], torch.dtype], ...]
    """Name, shape, type of each."""
    build: Callable[[], Sequence[torch.Tensor]]
    """Returns their values in that order; called once, in a worker thread."""

    @property
    def num_bytes(self) -> int:
        """Bytes of the values."""
        return sum(math.prod(shape) * dtype.itemsize for _, shape, dtype in self.tensors)


def write_safetensors(
    directory: Path,
    groups: Sequence[OutputGroup],
    *,
    max_shard_bytes: int,
    num_workers: int = 2,
    progress: Callable[[int], None] = lambda _: None,
) -> dict[str, str]:
    """Write `model.safetensors`, or shards of at most about `max_shard_bytes` with an index; return file name -> hash.

    Memory: one group per worker at a time.
    """
    shards = shards_of(groups, max_shard_bytes)
    count = len(shards)
    names = [name for name, _ in shards]

    def write_shard(number: int) -> str:
        return _write_shard(directory / names[number], shards[number][1], progress)

    with ThreadPoolExecutor(num_workers) as pool:
        hashes = dict(zip(names, pool.map(write_shard, range(count)), strict=True))
    if count > 1:
        total = sum(group.num_bytes for group in groups)
        weight_map = {tensor[0]: name for name, shard in shards for group in shard for tensor in group.tensors}
        write_json(
            directory / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
        )
    return hashes


def shards_of(groups: Sequence[OutputGroup], max_shard_bytes: int) -> list[tuple[str, list[OutputGroup]]]:
    """Return (file name, groups) of each shard of at most about `max_shard_bytes`; a larger group has one of its own."""
    shards: list[list[OutputGroup]] = [[]]
    size = 0
    for group in groups:
        if shards[-1] and size + group.num_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(group)
        size += group.num_bytes
    count = len(shards)
    if count == 1:
        return [("model.safetensors", shards[0])]
    return [(f"model-{number:05d}-of-{count:05d}.safetensors", shard) for number, shard in enumerate(shards, 1)]


def _read_config(path: Path) -> dict[str, Any]:
    config: Any = read_json(path, CheckpointError)
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: holds no JSON object. A Hugging Face model configuration is needed.")
    return config


def _read_record(path: Path) -> dict[str, Any]:
    record: Any = read_json(path, CheckpointError) if path.is_file() else {}
    return record if isinstance(record, dict) else {}


def _read_header(file: Path) -> dict[str, tuple[Path, int, int, torch.dtype, tuple[int, ...]]]:
    size = file.stat().st_size
    with file.open("rb") as raw, naming(file):
        length = int.from_bytes(raw.read(8), "little")
        if size < 8 or length > size - 8:
            raise CheckpointError(f"{file}: {size} bytes, its header alone needs {length + 8}. It is truncated.")
        if length > _MOST_HEADER_BYTES:
            raise CheckpointError(
                f"{file}: a header of {length} bytes. {_MOST_HEADER_BYTES} are the most. It is damaged."
            )
        try:
            header = json.loads(raw.read(length), object_pairs_hook=_once)
        except (ValueError, RecursionError) as problem:
            raise CheckpointError(f"{file}: the header is no JSON ({problem}). The file is damaged.") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{file}: the header is no JSON object. The file is damaged.")
    start = 8 + length
    entries: dict[str, tuple[Path, int, int, torch.dtype, tuple[int, ...]]] = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        _check_entry(entry, f"{file}: {name}")
        low, high = entry["data_offsets"]
        dtype = DTYPES.get(entry["dtype"])
        shape = tuple(entry["shape"])
        if dtype is None:
            raise CheckpointError(f"{file}: {name} has type {entry['dtype']}. {', '.join(DTYPES)} can be read.")
        if high - low != math.prod(shape) * dtype.itemsize:
            raise CheckpointError(
                f"{file}: {name} {list(shape)} {entry['dtype']} has {high - low} bytes. It is damaged."
            )
        if start + high > size:
            raise CheckpointError(f"{file}: {name} ends at byte {start + high} of {size}. The file is truncated.")
        entries[name] = (file, start + low, high - low, dtype, shape)
    places = sorted((low, length, name) for name, (_, low, length, _, _) in entries.items() if length)
    for (low, length, name), (following, _, other) in itertools.pairwise(places):
        if low + length > following:
            raise CheckpointError(f"{file}: {name} and {other} overlap. The file is damaged.")
    return entries


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name is stated twice")
    return found


def _check_entry(entry: Any, where: str) -> None:
    """Raise CheckpointError when a tensor's entry is not `{dtype: text, shape: sizes, data_offsets: [low, high]}`."""

    def are_places(values: Any) -> bool:
        return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 63 for value in values)

    if (
        not isinstance(entry, dict)
        or not isinstance(entry.get("dtype"), str)
        or not are_places(entry.get("shape"))
        or not are_places(entry.get("data_offsets"))
        or len(entry["data_offsets"]) != 2
        or entry["data_offsets"][0] > entry["data_offsets"][1]
    ):
        raise CheckpointError(f"{where}: its entry is {str(entry)[:120]}. The file is damaged.")


def _read_pickled(file: Path) -> dict[str, torch.Tensor]:
    content = load_safely(file, os.fspath(file), mmap=True, only_tensors=True)
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in content.items()
    ):
        raise CheckpointError(f"{file}: holds no dictionary of tensors by name. Weights are needed. Fetch it again.")
    return content


def _read_fully(descriptor: int, view: memoryview, offset: int, file: Path) -> None:
    done = 0
    while done < len(view):
        count = os.preadv(descriptor, [view[done : done + (1 << 30)]], offset + done)
        if count == 0:
            raise CheckpointError(f"{file}: ends at byte {offset + done}. The file is truncated.")
        done += count


def sampled_hash(file: Path) -> str:
    """Return a hash of 17 pieces of 64 KiB over a file's length, which tells files apart without reading them whole."""
    size = file.stat().st_size
    digest = hashlib.blake2b(digest_size=16)
    with file.open("rb") as raw, naming(file):
        for number in range(_SAMPLES + 1):
            raw.seek(size * number // _SAMPLES - (_SAMPLE_BYTES if number == _SAMPLES and size > _SAMPLE_BYTES else 0))
            digest.update(raw.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def _write_shard(path: Path, groups: Sequence[OutputGroup], progress: Callable[[int], None]) -> str:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for group in groups:
        for name, shape, dtype in group.tensors:
            length = math.prod(shape) * dtype.itemsize
            header[name] = {
                "dtype": NAME_OF_DTYPE[dtype],
                "shape": list(shape),
                "data_offsets": [offset, offset + length],
            }
            offset += length
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with naming(path), path.open("wb") as raw:
        file = HashingWriter(raw)
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for group in groups:
            for (name, shape, dtype), values in zip(group.tensors, group.build(), strict=True):
                if tuple(values.shape) != shape or values.dtype != dtype:
                    raise CheckpointError(
                        f"{name}: {list(values.shape)} {values.dtype} instead of {list(shape)} {dtype}."
                    )
                file.write(values.contiguous().reshape(-1).view(torch.uint8).numpy())
            progress(group.num_bytes)
        raw.flush()
        os.fsync(raw.fileno())
    return file.hexdigest()
