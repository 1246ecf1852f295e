"""Word n-grams of a text as 64-bit hashes, the same on every machine and in every run.

A text is taken in Unicode's compatibility form (NFKC: composed accents, no ligatures or full-width letters), without soft
hyphens and zero-width characters, in lower case. A word is a run of letters, digits and underscores; each Han character and
kana is a word of its own, since those scripts write no spaces. A text shorter than n words has one shingle, all of it.
"""

import functools
import itertools
import re
import unicodedata

import numpy as np

_IDEOGRAPH = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_INVISIBLE = re.compile("[\u00ad\u200b-\u200d\u2060\ufeff]")
_WORD = re.compile(f"[{_IDEOGRAPH}]|[^\\W{_IDEOGRAPH}]+")
_MULTIPLIER = 0x9E3779B97F4A7C15
_SEPARATOR, _LETTER, _WHOLE_WORD = 0, 1, 2
_MAX_WORD = 1 << 12
_PART = 1 << 20
_CUT = re.compile("[ \\n\\t\u4e00-\u9fff]")
"""Before these a text can be cut: no word goes on over them, and no character joins the one before."""


def words_at(text: str, start: int, number: int) -> list[str]:
    """Return `number` words of a text from the word `start` on, without a list of all of them."""
    found = itertools.islice(_WORD.finditer(normal_form(text)), start, start + number)
    return [match[0] for match in found]


def words_of(text: str) -> list[str]:
    """Return the words of a text in order."""
    return _WORD.findall(normal_form(text))


def normal_form(text: str) -> str:
    """Return a text as its words are compared."""
    if text.isascii():
        return text.lower()
    return unicodedata.normalize("NFKC", _INVISIBLE.sub("", text)).lower()


def shingle_hashes(text: str, ngram: int, exactly: bool = False) -> np.ndarray:
    """Return a hash per n-gram of words in order, uint64; empty for a text without words.

    A shorter text has one shingle, or none where an n-gram must have `exactly` n words.
    """
    ids = _word_hashes(text)
    if not len(ids) or (exactly and len(ids) < ngram):
        return np.empty(0, dtype=np.uint64)
    size = min(ngram, len(ids))
    number = len(ids) - size + 1
    found = np.empty(number, dtype=np.uint64)
    for start in range(0, number, _PART):
        end = min(start + _PART, number)
        hashes = np.full(end - start, size, dtype=np.uint64)
        for offset in range(size):
            hashes = (hashes + ids[start + offset : end + offset]) * np.uint64(_MULTIPLIER)
            hashes ^= hashes >> np.uint64(29)
        found[start:end] = _mix(hashes)
    return found


def _word_hashes(text: str) -> np.ndarray:
    """Return a hash per word in order, uint64. A long text is taken in parts, since the work needs forty times its size."""
    if len(text) <= _PART:
        return _word_hashes_of_part(text)
    hashes, start = [], 0
    while start < len(text):
        cut = _CUT.search(text, start + _PART, start + 2 * _PART)
        end = min(cut.start() if cut else start + 2 * _PART, len(text))
        hashes.append(_word_hashes_of_part(text[start:end]))
        start = end
    return np.concatenate(hashes)


def _word_hashes_of_part(text: str) -> np.ndarray:
    """Return a hash per word in order, uint64: a polynomial over its characters."""
    codes = np.frombuffer(normal_form(text).encode("utf-32-le", "surrogatepass"), dtype="<u4")
    kinds = _kinds()[codes]
    is_begin = kinds == _WHOLE_WORD
    is_letter = kinds == _LETTER
    is_begin[:1] |= is_letter[:1]
    is_begin[1:] |= is_letter[1:] & ~is_letter[:-1]
    places = np.flatnonzero(kinds)
    if not len(places):
        return np.empty(0, dtype=np.uint64)
    begins = np.flatnonzero(is_begin[places])
    lengths = np.diff(begins, append=len(places))
    within = (np.arange(len(places)) - np.repeat(begins, lengths)) % _MAX_WORD
    sums = np.add.reduceat(codes[places].astype(np.uint64) * _powers()[within], begins)
    return _mix(sums + lengths.astype(np.uint64))


@functools.cache
def _kinds() -> np.ndarray:
    """Return what each code point is: a separator, a letter, or a word by itself."""
    kinds = np.array([_LETTER if chr(code).isalnum() else _SEPARATOR for code in range(0x110000)], dtype=np.uint8)
    kinds[ord("_")] = _LETTER
    for first, last in re.findall("(.)-(.)", _IDEOGRAPH):
        kinds[ord(first) : ord(last) + 1] = _WHOLE_WORD
    return kinds


@functools.cache
def _powers() -> np.ndarray:
    return np.cumprod(np.full(_MAX_WORD, _MULTIPLIER, dtype=np.uint64), dtype=np.uint64)


def _mix(values: np.ndarray) -> np.ndarray:
    """Return uint64 values with every input bit spread over every output bit (the finalizer of splitmix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
