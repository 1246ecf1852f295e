"""Engines that turn texts into ids: the reference tokenizer, or an accelerated one that a referee has found equal.

An accelerated engine (gigatoken, fastokens) is never trusted by name. It must give the reference's ids on a fixed
adversarial set when it is loaded, and on a sample of every piece while it works; a refusal or a difference falls back
to the next engine, with a warning. Long documents are encoded in parts, cut at points where encoding both sides
separately returns the same ids as encoding them together (checked at each cut), so that memory stays bounded.
"""

import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import orjson

from megatron_cpt.data.tokenizer.interface import HuggingFaceTokenizer, SentencePieceTokenizer, Tokenizer
from megatron_cpt.data.tokenizer.probe_texts import adversarial_texts

ENGINES = ("fastokens", "gigatoken", "reference")
"""In the order in which `auto` tries them. The first two are about equally fast (benchmarks/tokenizing.py); fastokens was
never seen to differ from the reference, gigatoken was (added tokens that strip spaces), and reads SentencePiece BPE."""

Encoded = tuple[np.ndarray, np.ndarray]
"""Ids of all texts one after the other, and the number of ids of each text."""
EncodeFlat = Callable[[list[str]], Encoded]

LONG_DOCUMENT_CHARACTERS = 1 << 20
_SHORT_TEXT_CHARACTERS = 1000
_FEW_CHARACTERS = 1 << 20
"""Below the first mean length, and above the second sum, gigatoken's batch call pays for itself: it imports awkward, a
quarter of a second, whose pyarrow starts a thread (and workers cannot be forked from a process with threads)."""
_REMEMBERED_CHARACTERS = 1 << 26
"""After this many, gigatoken is reloaded, because its word cache grows without limit (1.3 bytes a character were
measured)."""
_REFERENCE_BATCH_CHARACTERS = 1 << 19
_CUT_CONTEXT_CHARACTERS = 512
_SAMPLE_CHARACTERS = 4096
_SAMPLE_MARGIN_TOKENS = 64
_CUT = re.compile(r"(?<=\w)(?=[ \n]\w)|(?<=[。、！？\n])(?=\w)|(?<=\w)(?=\W)")


class EngineRefusal(Exception):
    """An accelerated engine cannot be used for a tokenizer; the message contains the reason."""


class Engine:
    """Encodes batches with one engine and holds it against the reference."""

    def __init__(self, name: str, tokenizer: Tokenizer):
        self.name = name
        self.tokenizer = tokenizer
        self._reference = _reference_encoder(tokenizer)
        self._encode = _ENCODERS[name](tokenizer)

    def encode(self, texts: list[str]) -> Encoded:
        """Return the ids of all texts one after the other, and the number of ids of each."""
        if all(len(text) <= LONG_DOCUMENT_CHARACTERS for text in texts):
            return self._encode(texts) if texts else (np.empty(0, np.uint32), np.empty(0, np.int64))
        ids, lengths = [], []
        for is_long, group in itertools.groupby(texts, lambda text: len(text) > LONG_DOCUMENT_CHARACTERS):
            members = list(group)
            encoded = map(self._encode_long, members) if is_long else iter([self._encode(members)])
            for some_ids, some_lengths in encoded:
                ids.append(some_ids)
                lengths.append(some_lengths)
        return (ids[0] if len(ids) == 1 else np.concatenate(ids)), np.concatenate(lengths)

    def sample_difference(self, texts: Sequence[str], ids: np.ndarray, lengths: np.ndarray, seed: int) -> str | None:
        """Compare one text of an encoded batch with the reference; return what differs, or None.

        Of a long text its first 4,096 characters are compared, and the whole where those differ.
        """
        if self.name == "reference" or not texts:
            return None
        chosen = seed * 2654435761 % len(texts)
        start = int(lengths[:chosen].sum())
        found = ids[start : start + int(lengths[chosen])]
        text = texts[chosen]
        if len(text) > _SAMPLE_CHARACTERS:
            expected, _ = self._reference([text[:_SAMPLE_CHARACTERS]])
            kept = max(len(expected) - _SAMPLE_MARGIN_TOKENS, 0)
            if np.array_equal(expected[:kept], found[:kept]):
                return None
        expected, _ = self._reference([text])
        return None if np.array_equal(expected, found) else _difference(text, expected, found)

    def difference(self, texts: list[str], expected: Encoded) -> str | None:
        """Return what differs between the ids of texts and those expected, or None."""
        expected_ids, expected_lengths = expected
        ids, lengths = self._encode(texts)
        if np.array_equal(ids, expected_ids) and np.array_equal(lengths, expected_lengths):
            return None
        expected_ends, ends = np.cumsum(expected_lengths), np.cumsum(lengths)
        for i, text in enumerate(texts):
            expected_text = expected_ids[expected_ends[i] - expected_lengths[i] : expected_ends[i]]
            found = ids[ends[i] - lengths[i] : ends[i]]
            if not np.array_equal(expected_text, found):
                return _difference(text, expected_text, found)
        return "the number of ids differs"

    def _encode_long(self, text: str) -> Encoded:
        """Encode one text part by part, keeping the ids in their narrowest type, because they dominate memory."""
        dtype = np.dtype(np.uint16 if self.tokenizer.vocab_size <= 1 << 16 else np.uint32)
        ids, length = np.empty(len(text), dtype), 0  # pages that are not written to take no memory
        for part in self._parts(text):
            found, _ = self._encode([part])
            if length + len(found) > len(ids):
                ids = np.concatenate([ids[:length], np.empty(len(ids) // 4 + len(found), dtype)])
            ids[length : length + len(found)] = found
            length += len(found)
        return ids[:length], np.array([length])

    def _parts(self, text: str) -> Iterator[str]:
        """Yield a long text cut where it makes no difference; parts have at least half a `LONG_DOCUMENT_CHARACTERS`."""
        start, step = 0, LONG_DOCUMENT_CHARACTERS // 2
        look_at = step
        while len(text) - start > LONG_DOCUMENT_CHARACTERS and look_at < len(text) - step // 4:
            cut = self._cut_near(text, look_at, start)
            if cut is None:
                look_at += step // 4
                continue
            yield text[start : cut[0]]
            start = cut[1]
            look_at = start + step
        yield text[start:]

    def _cut_near(self, text: str, near: int, start: int) -> tuple[int, int] | None:
        """Return where the text can be cut after `near` (end, next start), if one of the next 16 candidates is harmless.

        SentencePiece puts a space before every text: there the part after a cut starts behind the space.
        """
        for _, match in zip(range(16), _CUT.finditer(text, near, near + 65536)):
            cut = match.start()
            left = text[max(cut - _CUT_CONTEXT_CHARACTERS, start) : cut]
            right = text[cut : cut + _CUT_CONTEXT_CHARACTERS]
            whole, _ = self._reference([left + right])
            for dropped in (0, 1) if right[0] == " " else (0,):
                halves, _ = self._reference([left, right[dropped:]])
                if np.array_equal(whole, halves):
                    return cut, cut + dropped
        return None


def load_engine(tokenizer: Tokenizer, name: str) -> Engine:
    """Return the engine `name` for a tokenizer.

    Raises: EngineRefusal when it is not installed or cannot read the tokenizer.
    """
    try:
        return Engine(name, tokenizer)
    except EngineRefusal:
        raise
    except Exception as problem:
        if name == "reference":
            raise
        raise EngineRefusal(f"{name} refuses the tokenizer ({type(problem).__name__}: {problem})") from None


def load_checked_engine(tokenizer: Tokenizer, name: str) -> Engine:
    """Return the engine `name` after it gave the reference's ids on the adversarial set.

    The reference works on the set while a thread loads the engine: both let go of the interpreter's lock.

    Raises: EngineRefusal if the engine cannot be used, or returns other ids.
    """
    if name == "reference":
        return load_engine(tokenizer, name)
    with ThreadPoolExecutor(1) as loader:
        loading = loader.submit(load_engine, tokenizer, name)
        texts = adversarial_texts(tokenizer)
        expected = _reference_encoder(tokenizer)(texts)
        engine = loading.result()
        # in the thread too: an engine's caches belong to a thread, and those of this one would be copied by every fork
        difference = loader.submit(engine.difference, texts, expected).result()
    if difference:
        raise EngineRefusal(f"{name} gives other ids: {difference}")
    return engine


def _reference_encoder(tokenizer: Tokenizer) -> EncodeFlat:
    def encode(texts: list[str]) -> Encoded:
        ids, lengths = [np.empty(0, np.uint32)], []
        for batch in _batches(texts, _REFERENCE_BATCH_CHARACTERS):
            for found in tokenizer.encode_batch(batch):
                ids.append(np.array(found, dtype=np.uint32))
                lengths.append(len(found))
        return np.concatenate(ids), np.array(lengths, dtype=np.int64)

    return encode


def _gigatoken_encoder(tokenizer: Tokenizer) -> EncodeFlat:
    try:
        import gigatoken  # optional, compiled
        from gigatoken._load.sentencepiece import sentencepiece_to_tokenizer_json
    except ImportError:
        raise EngineRefusal("gigatoken is not installed") from None
    if isinstance(tokenizer, SentencePieceTokenizer):
        converted = json.loads(sentencepiece_to_tokenizer_json(tokenizer.model_path.read_bytes()))
        # SentencePiece never finds control symbols (</s>) in a text; as special added tokens they would be found.
        converted["added_tokens"] = [token for token in converted["added_tokens"] if not token["special"]]
        definition: str | bytes = json.dumps(converted)
    elif isinstance(tokenizer, HuggingFaceTokenizer):
        definition = _definition(tokenizer)
    else:
        raise EngineRefusal(f"gigatoken does not read {type(tokenizer).__name__}")
    backend = gigatoken.Tokenizer.from_json(definition).backend
    remembered = 0

    def encode(texts: list[str]) -> Encoded:
        nonlocal backend, remembered
        characters = sum(map(len, texts))
        remembered += characters
        if remembered > _REMEMBERED_CHARACTERS:
            backend = gigatoken.Tokenizer.from_json(definition).backend
            remembered = characters
        if characters > _SHORT_TEXT_CHARACTERS * len(texts) or characters < _FEW_CHARACTERS:
            found = [backend.encode(text) for text in texts]
            return np.concatenate(found), np.array([len(ids) for ids in found], dtype=np.int64)
        layout = backend.encode_batch(texts, parallel=False).layout
        offsets = np.asarray(layout.offsets)
        ids = np.asarray(layout.content.data)
        return ids[offsets[0] : offsets[-1]], np.diff(offsets).astype(np.int64)

    return encode


def _fastokens_encoder(tokenizer: Tokenizer) -> EncodeFlat:
    try:
        from fastokens import _native  # optional, compiled; the package's own wrapper lacks encode_batch_flat
    except ImportError:
        raise EngineRefusal("fastokens is not installed") from None
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        raise EngineRefusal("fastokens reads Hugging Face tokenizers only")
    backend = _native.Tokenizer.from_json_str(_definition(tokenizer).decode())
    backend.no_truncation()
    backend.no_padding()

    def encode(texts: list[str]) -> Encoded:
        ids, offsets = backend.encode_batch_flat(texts)
        return np.frombuffer(ids, np.uint32), np.diff(np.frombuffer(offsets, np.uint64).astype(np.int64))

    return encode


def _definition(tokenizer: HuggingFaceTokenizer) -> bytes:
    """Return the `tokenizer.json` for an engine; control tokens are left out where they are text in a text."""
    if tokenizer.special_tokens == "token":
        return tokenizer.definition
    definition = orjson.loads(tokenizer.definition)
    added = definition.get("added_tokens") or []
    definition["added_tokens"] = [token for token in added if not token.get("special")]
    # what the post-processor puts around a text is not asked for, and names tokens that are gone
    definition["post_processor"] = None
    return orjson.dumps(definition)


_ENCODERS: dict[str, Callable[[Tokenizer], EncodeFlat]] = {
    "gigatoken": _gigatoken_encoder,
    "fastokens": _fastokens_encoder,
    "reference": _reference_encoder,
}


def _batches(texts: list[str], characters: int) -> list[list[str]]:
    batches: list[list[str]] = []
    size = characters
    for text in texts:
        if size + len(text) > characters:
            batches.append([])
            size = 0
        batches[-1].append(text)
        size += len(text)
    return batches


def _difference(text: str, expected: np.ndarray, found: np.ndarray) -> str:
    return f"{text[:60]!r} is {found[:12].tolist()}, by the reference {expected[:12].tolist()}"
