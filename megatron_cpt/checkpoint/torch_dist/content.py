"""What a file's content is known by: xxh3-128 (`xxh3:` and 32 hexadecimal digits), fast enough to cost nothing beside a disk.

Older manifests hold BLAKE2b-128 (32 digits alone) and stay valid. Neither xxh3 nor a manifest guards against somebody who
means harm: `sha256_lines` gives what can be published or signed.
"""

import hashlib
from pathlib import Path
from typing import Any

import xxhash

from megatron_cpt.files import file_hash, naming

_PREFIX = "xxh3:"
_CHUNK_BYTES = 1 << 22


class ContentDigest:
    """A running hash of content; `known_by` makes it of the kind that an expected one is of."""

    def __init__(self, known_by: str = _PREFIX):
        self._is_fast = known_by.startswith(_PREFIX)
        self._digest: Any = xxhash.xxh3_128() if self._is_fast else hashlib.blake2b(digest_size=16)

    def update(self, data: Any) -> None:
        """Add bytes."""
        self._digest.update(data)

    def hexdigest(self) -> str:
        """Return the hash of all bytes, with the prefix of its kind."""
        return f"{_PREFIX if self._is_fast else ''}{self._digest.hexdigest()}"


def content_hash(path: Path) -> str:
    """Return the hash of a file's content."""
    digest = ContentDigest()
    with path.open("rb") as file, naming(path):
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def has_content(path: Path, expected: str) -> bool:
    """Return whether a file has the content with the hash `expected`, of either kind."""
    return (content_hash(path) if expected.startswith(_PREFIX) else file_hash(path)) == expected


def sha256_lines(directory: Path, names: list[str]) -> str:
    """Return a line `<SHA-256>  <path>` for each file, as `sha256sum --check` reads it."""
    lines = []
    for name in names:
        with (directory / name).open("rb") as file, naming(directory / name):
            lines.append(f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {directory / name}\n")
    return "".join(lines)
