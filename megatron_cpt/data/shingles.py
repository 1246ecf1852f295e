"""Word n-grams of a text as 64-bit hashes, the same on every machine and in every run.

A word is a run of letters and digits, in lower case; each Han character and kana is a word of its own, since those
scripts write no spaces. A text shorter than n words has one shingle, all of it.
"""

import re
import zlib

import numpy as np

_IDEOGRAPH = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(f"[{_IDEOGRAPH}]|[^\\W{_IDEOGRAPH}]+")
_MULTIPLIER = 0x9E3779B97F4A7C15


def words_of(text: str) -> list[str]:
    """Return the words of a text in order."""
    return _WORD.findall(text.lower())


def shingle_hashes(text: str, ngram: int) -> np.ndarray:
    """Return a hash per n-gram of words in order, uint64; empty for a text without words."""
    words = words_of(text)
    if not words:
        return np.empty(0, dtype=np.uint64)
    ids = np.array([zlib.crc32(word.encode()) for word in words], dtype=np.uint64)
    size = min(ngram, len(ids))
    hashes = np.full(len(ids) - size + 1, size, dtype=np.uint64)
    for offset in range(size):
        hashes = _mix((hashes + ids[offset : len(ids) - size + 1 + offset]) * np.uint64(_MULTIPLIER))
    return hashes


def _mix(values: np.ndarray) -> np.ndarray:
    """Return uint64 values with every input bit spread over every output bit (the finalizer of splitmix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
