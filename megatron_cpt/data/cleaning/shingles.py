"""Word n-grams of a text as 64-bit hashes, the same on every machine and in every run.

A text is taken in Unicode's compatibility form (NFKC: composed accents, no ligatures or full-width letters), in lower case,
without soft hyphens, zero-width characters and variation selectors, and without the points that Arabic and Hebrew can be
written with or without (vowels, cantillation, tatweel). A word is a run of letters, marks, digits and underscores. Scripts
that write no spaces go by characters: each Han character and kana is a word of its own, and so is each letter of Thai, Lao,
Khmer, Burmese, Tai Tham, Tai Le, New Tai Lue and Tai Viet with the marks on it. A text shorter than n words has one shingle, all of it.
"""

import functools
import itertools
import re
import unicodedata
from collections.abc import Sequence

import numpy as np

_IDEOGRAPH = "\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_SPACELESS = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u1950-\u19df\u1a20-\u1aaf\ua9e0-\ua9ff\uaa60-\uaadf"
"""Blocks of scripts without spaces whose letters carry marks."""
_DROPPED = re.compile(
    "[\u00ad\u200b-\u200d\u2060\ufeff\u180b-\u180d\ufe00-\ufe0f"  # invisible
    "\u0591-\u05bd\u05bf\u05c1\u05c2\u05c4\u05c5\u05c7"  # Hebrew cantillation and vowels
    "\u0610-\u061a\u0640\u064b-\u0652\u0656-\u065e\u0670\u06d6-\u06dc\u06df-\u06e4\u06e7\u06e8\u06ea-\u06ed\u08d3-\u08ff]"  # Arabic
)
"""Arabic hamza and madda are letters' own parts, and stay."""
_MULTIPLIER = 0x9E3779B97F4A7C15
_SEPARATOR, _LETTER, _WHOLE_WORD, _BASE, _BASE_MARK = range(5)
_MAX_WORD = 1 << 12
_PART = 1 << 20
_GROUP = 1 << 17
"""Characters that are hashed at a time: the arrays stay in the processor's cache."""
_CUT = re.compile("[ \\n\\t\u4e00-\u9fff]")
"""A text can be cut before these: no word continues across them, and none combines with the previous character."""
_PASSAGE_FACTOR = 3
"""Characters with their marks that a word of a script without spaces has, about."""


def words_at(text: str, start: int, number: int) -> list[str]:
    """Return `number` words of a text from the word `start` on, without a list of all of them."""
    found = itertools.islice(_word_pattern().finditer(normal_form(text)), start, start + number)
    return [match[0] for match in found]


def words_of(text: str) -> list[str]:
    """Return the words of a text in order."""
    return _word_pattern().findall(normal_form(text))


def passage_words(words: Sequence[str], number: int) -> int:
    """Return how many `words` hold as much text as `number` written words: more where letters are words (Thai, Khmer)."""
    letters = sum(_kinds()[ord(word[0])] >= _BASE for word in words)
    return number * _PASSAGE_FACTOR if 2 * letters > len(words) else number


def normal_form(text: str) -> str:
    """Return a text as its words are compared."""
    if text.isascii():
        return text.lower()
    bare = _DROPPED.sub("", text)
    composed = unicodedata.normalize("NFKC", bare)
    if composed is not bare:  # a presentation form may have brought a point
        composed = _DROPPED.sub("", composed)
    return composed.lower()


def shingle_hashes(text: str, ngram: int, exactly: bool = False) -> np.ndarray:
    """Return a hash per n-gram of words in order, uint64; empty for a text without words.

    A shorter text has one shingle, or none where an n-gram must have `exactly` n words.
    """
    ids = _word_hashes(text)
    if not len(ids) or (exactly and len(ids) < ngram):
        return np.empty(0, dtype=np.uint64)
    return _windows(ids, min(ngram, len(ids)))


def shingles_of_texts(texts: Sequence[str], ngram: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the `shingle_hashes` of many texts, one after the other, and their bounds, int64 [texts + 1].

    Texts are hashed many at a time, since a call on each costs more than the work on a short one.
    """
    found, numbers = [np.empty(0, dtype=np.uint64)], [np.zeros(1, dtype=np.int64)]
    for group in _groups(texts):
        if len(group) == 1:
            hashes = shingle_hashes(group[0], ngram)
            number = np.array([len(hashes)])
        else:
            hashes, number = _shingles_of_group(group, ngram)
        found.append(hashes)
        numbers.append(number)
    return np.concatenate(found), np.cumsum(np.concatenate(numbers))


def _groups(texts: Sequence[str]) -> list[list[str]]:
    """Return the texts in groups of up to about `_GROUP` characters; a longer text is one of its own."""
    groups: list[list[str]] = []
    room = 0
    for text in texts:
        if len(text) >= room:
            groups.append([])
            room = _GROUP
        groups[-1].append(text)
        room -= len(text)
    return groups


def _shingles_of_group(texts: Sequence[str], ngram: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the shingles of texts that are hashed as one, separated by newlines, and how many each has."""
    forms = [normal_form(text) for text in texts]
    lengths = np.fromiter(map(len, forms), dtype=np.int64, count=len(forms))
    ids, places = _hashes_and_places("\n".join(forms))
    bounds = np.searchsorted(places, np.cumsum(lengths + 1))
    words = np.diff(bounds, prepend=0)
    starts = bounds - words
    numbers = np.where(words >= ngram, words - ngram + 1, words > 0)
    ends = np.cumsum(numbers)
    found = np.empty(int(ends[-1]), dtype=np.uint64)
    for size in np.unique(words[(words > 0) & (words < ngram)]).tolist():
        short = np.flatnonzero(words == size)
        found[ends[short] - 1] = _hash_rows([ids[starts[short] + offset] for offset in range(size)])
    if len(ids) >= ngram:
        long = words >= ngram
        # one n-gram a word; those that run over the end of their text are left out
        within = np.arange(int(numbers[long].sum())) - np.repeat(
            np.cumsum(numbers[long]) - numbers[long], numbers[long]
        )
        chosen = _windows(ids, ngram)[np.repeat(starts[long], numbers[long]) + within]
        found[np.repeat(ends[long] - numbers[long], numbers[long]) + within] = chosen
    return found, numbers


def _windows(ids: np.ndarray, size: int) -> np.ndarray:
    """Return a hash per run of `size` word hashes."""
    number = len(ids) - size + 1
    found = np.empty(number, dtype=np.uint64)
    for start in range(0, number, _PART):
        end = min(start + _PART, number)
        found[start:end] = _hash_rows([ids[start + offset : end + offset] for offset in range(size)])
    return found


def _hash_rows(columns: Sequence[np.ndarray]) -> np.ndarray:
    """Return a hash per row of word hashes, which are given column by column."""
    hashes = np.full(len(columns[0]), len(columns), dtype=np.uint64)
    for column in columns:
        hashes = (hashes + column) * np.uint64(_MULTIPLIER)
        hashes ^= hashes >> np.uint64(29)
    return _mix(hashes)


def _word_hashes(text: str) -> np.ndarray:
    """Return a hash per word in order, uint64. A long text is taken in parts, since the work needs forty times its size."""
    if len(text) <= _PART:
        return _hashes_and_places(normal_form(text))[0]
    hashes, start = [], 0
    while start < len(text):
        cut = _CUT.search(text, start + _PART, start + 2 * _PART)
        end = min(cut.start() if cut else start + 2 * _PART, len(text))
        hashes.append(_hashes_and_places(normal_form(text[start:end]))[0])
        start = end
    return np.concatenate(hashes)


def _hashes_and_places(form: str) -> tuple[np.ndarray, np.ndarray]:
    """Return a hash per word of a normal form in order, uint64, a polynomial over its characters; and where each begins."""
    if form.isascii():
        codes = np.frombuffer(form.encode(), dtype=np.uint8)
    else:
        codes = np.frombuffer(form.encode("utf-32-le", "surrogatepass"), dtype="<u4")
    kinds = _kinds()[codes]
    places = np.flatnonzero(kinds)
    if not len(places):
        return np.empty(0, dtype=np.uint64), places
    begins = np.flatnonzero(_is_begin(kinds)[places])
    lengths = np.diff(begins, append=len(places))
    within = (np.arange(len(places)) - np.repeat(begins, lengths)) % _MAX_WORD
    sums = np.add.reduceat(codes[places].astype(np.uint64) * _powers()[within], begins)
    return _mix(sums + lengths.astype(np.uint64)), places[begins]


def _is_begin(kinds: np.ndarray) -> np.ndarray:
    """Return whether a word begins at each character."""
    is_letter = kinds == _LETTER
    is_begin = is_letter.copy()
    is_begin[1:] &= ~is_letter[:-1]
    if (highest := kinds.max(initial=0)) > _LETTER:
        is_begin |= (kinds == _WHOLE_WORD) | (kinds == _BASE)
    if highest == _BASE_MARK:
        is_mark = kinds == _BASE_MARK
        is_begin[:1] |= is_mark[:1]
        is_begin[1:] |= is_mark[1:] & (kinds[:-1] < _BASE)
    return is_begin


@functools.cache
def _word_pattern() -> re.Pattern[str]:
    """Return what a word is: an ideograph, a letter of a script without spaces with its marks, or a run of letters and marks."""
    kinds = _kinds()
    letters, bases, marks = (_character_class(np.flatnonzero(kinds == kind)) for kind in (_LETTER, _BASE, _BASE_MARK))
    return re.compile(f"[{_IDEOGRAPH}]|[{bases}][{marks}]*|[{marks}]+|[{letters}]+")


def _character_class(codes: np.ndarray) -> str:
    """Return the inside of a regular expression's class of ascending code points."""
    runs = np.split(codes, np.flatnonzero(np.diff(codes) > 1) + 1)
    return "".join(f"\\U{int(run[0]):08x}-\\U{int(run[-1]):08x}" for run in runs)


@functools.cache
def _kinds() -> np.ndarray:
    """Return what each code point is: a separator, a letter or mark, a word by itself, a letter that begins one, its mark."""
    characters = [chr(code) for code in range(0x40000)]  # after them come no letters
    is_mark = np.array([unicodedata.category(character)[0] == "M" for character in characters])
    is_letter = np.array([character.isalnum() for character in characters])
    kinds = np.zeros(0x110000, dtype=np.uint8)
    kinds[: len(characters)] = np.where(is_letter | is_mark, _LETTER, _SEPARATOR)
    kinds[ord("_")] = _LETTER
    for first, last in re.findall("(.)-(.)", _IDEOGRAPH):
        kinds[ord(first) : ord(last) + 1] = _WHOLE_WORD
    for first, last in re.findall("(.)-(.)", _SPACELESS):
        block = slice(ord(first), ord(last) + 1)
        kinds[block] = np.where(is_mark[block], _BASE_MARK, np.where(is_letter[block], _BASE, _SEPARATOR))
    return kinds


@functools.cache
def _powers() -> np.ndarray:
    return np.cumprod(np.full(_MAX_WORD, _MULTIPLIER, dtype=np.uint64), dtype=np.uint64)


def _mix(values: np.ndarray) -> np.ndarray:
    """Return uint64 values with every input bit spread over every output bit (the finalizer of splitmix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
