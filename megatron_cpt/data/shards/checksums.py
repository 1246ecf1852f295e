"""Checksums of `.bin` files: sums over columns of tokens, which parts of a file have too, and a hash of a few blocks.

Token i of a file belongs to column i mod 64; a column's sum, in the unsigned type of a token, wraps around. So workers
sum what they write, in any order and at the speed of memory, and joined shards have the rolled sums of their parts. Any
one changed token changes a sum; damage by a disk or network fault is not detected with a probability of 1 in 65,536 or
less.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

COLUMNS = 64
_WIDE = 1 << 12
_CHUNK_TOKENS = 1 << 22
_BLOCKS, _BLOCK_BYTES = 8, 4096


def column_sums(tokens: np.ndarray) -> np.ndarray:
    """Return the sums of the columns of tokens, the first of which is in column 0."""
    values = np.ascontiguousarray(tokens).view(f"<u{tokens.dtype.itemsize}")
    whole = len(values) - len(values) % _WIDE
    sums = np.add.reduce(values[:whole].reshape(-1, _WIDE), axis=0, dtype=values.dtype)
    rest = np.zeros(_WIDE, dtype=values.dtype)
    rest[: len(values) - whole] = values[whole:]
    return np.add.reduce((sums + rest).reshape(-1, COLUMNS), axis=0, dtype=values.dtype)


def placed(sums: np.ndarray, first_token: int) -> np.ndarray:
    """Return the column sums of tokens that begin at another token than the first of a file."""
    return np.roll(sums, first_token % COLUMNS)


def file_sums(tokens: np.ndarray) -> np.ndarray:
    """Return the column sums of a memory-mapped file, a part at a time."""
    total = np.zeros(COLUMNS, dtype=f"<u{tokens.dtype.itemsize}")
    for start in range(0, len(tokens), _CHUNK_TOKENS):
        total += column_sums(tokens[start : start + _CHUNK_TOKENS])
    return total


def as_text(sums: np.ndarray) -> str:
    """Return column sums as hexadecimal digits."""
    return sums.tobytes().hex()


def from_text(text: str, dtype: np.dtype) -> np.ndarray:
    """Return the column sums that `as_text` wrote. Raises: ValueError when it is no such text."""
    sums = np.frombuffer(bytes.fromhex(text), dtype=f"<u{np.dtype(dtype).itemsize}")
    if len(sums) != COLUMNS:
        raise ValueError(f"{len(sums)} sums, not {COLUMNS}")
    return sums


def sampled_hash(path: Path) -> str:
    """Return the hash of a few blocks of a file, evenly spread, the first and the last among them."""
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb", buffering=0) as file:
        for place in _places(path.stat().st_size):
            file.seek(place)
            digest.update(file.read(_BLOCK_BYTES))
    return digest.hexdigest()


def _places(size: int) -> Iterator[int]:
    last = max(size - _BLOCK_BYTES, 0)
    yield from sorted({last * block // (_BLOCKS - 1) // 512 * 512 for block in range(_BLOCKS - 1)} | {last})
