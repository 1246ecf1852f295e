"""Ranks compare, when they have met, what each of them was told: settings, code, versions, and the data that it sees.

One rank with another learning rate trains on in silence, one with another length waits for ever. So the differing key is
named, with the rank and its host, before anything is computed.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import platform
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import megatron_cpt
from megatron_cpt.config.settings.schema import RunConfig
from megatron_cpt.data.lists.entry import DataEntry
from megatron_cpt.data.shards.indexed import bin_path, idx_path, manifest_path
from megatron_cpt.errors import ConfigError, CptError, DataError, storage_error
from megatron_cpt.files import text_hash

_PACKAGES = ("torch", "megatron-core", "numpy", "transformer-engine", "flash-attn")
_MOST = 6
"""Differences that are told; the others are counted."""


def check_ranks_agree(config: RunConfig) -> None:
    """Raise ConfigError on every rank when ranks were given other settings, other code or other versions. Collective."""
    check_same({**_flat(dataclasses.asdict(config)), **_code()}, ConfigError, "Give every rank the same.")


def check_data_agree(entries: Sequence[DataEntry]) -> None:
    """Raise DataError on every rank when a rank does not see the same shards. Collective."""
    seen = {entry.prefix: _seen(Path(entry.prefix)) for entry in entries}
    check_same(seen, DataError, "Every rank must see the same data. Mount or copy it alike on every node.")


def check_same(values: Mapping[str, Any], error: type[CptError], needed: str) -> None:
    """Raise `error` on every rank, naming rank, host and key, when `values` is not the same on all. Collective."""
    ranks = torch.distributed.get_world_size()
    if ranks == 1:
        return
    own = (text_hash(json.dumps(values, sort_keys=True, default=str)), socket.gethostname())
    told: list[Any] = [None] * ranks
    torch.distributed.all_gather_object(told, own)
    digests = [digest for digest, _ in told]
    usual = max(digests, key=lambda digest: (digests.count(digest), -digests.index(digest)))
    odd = [rank for rank, digest in enumerate(digests) if digest != usual]
    if not odd:
        return
    rank, reference = odd[0], digests.index(usual)
    both: list[Any] = [None, None]
    for place, source in enumerate((rank, reference)):
        box: list[Any] = [dict(values)]
        torch.distributed.broadcast_object_list(box, src=source)
        both[place] = box[0]
    raise error(_differences(rank, reference, [host for _, host in told], both, len(odd)) + f" {needed}")


def _differences(
    rank: int, reference: int, hosts: Sequence[str], both: Sequence[Mapping[str, Any]], num_odd: int
) -> str:
    odd, usual = both
    keys = sorted(key for key in odd.keys() | usual.keys() if odd.get(key) != usual.get(key))
    named = [f"{key} is {odd.get(key)!r} instead of {usual.get(key)!r}" for key in keys[:_MOST]]
    more = f" and {len(keys) - _MOST} more" if len(keys) > _MOST else ""
    others = f" ({num_odd} ranks differ)" if num_odd > 1 else ""
    return f"rank {rank} on {hosts[rank]} differs from rank {reference} on {hosts[reference]}{others}: {'; '.join(named)}{more}."


def _flat(value: Any, key: str = "") -> dict[str, Any]:
    if isinstance(value, dict) and value:
        return {
            name: part
            for inner, item in value.items()
            for name, part in _flat(item, f"{key}.{inner}" if key else str(inner)).items()
        }
    return {key: value}


def _code() -> dict[str, str]:
    """Return the versions that compute, and a hash of this package's files."""
    digest = hashlib.blake2b(digest_size=16)
    root = Path(megatron_cpt.__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    versions = {"Python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "none"
    return {
        **{f"version of {name}": version for name, version in versions.items()},
        "code of megatron_cpt": digest.hexdigest(),
    }


def _seen(prefix: Path) -> str:
    try:
        sizes = [path(prefix).stat().st_size for path in (bin_path, idx_path)]
        manifest = manifest_path(prefix)
        digest = text_hash(manifest.read_text(encoding="utf-8", errors="replace"))[:8] if manifest.exists() else "none"
        return f"{sizes[0]} + {sizes[1]} bytes, manifest {digest}"
    except OSError as problem:
        return str(storage_error(problem))
