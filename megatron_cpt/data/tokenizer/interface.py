"""Tokenizers: Hugging Face folders, `tokenizer.json` files and SentencePiece models behind one small interface.

A folder is read as transformers' AutoTokenizer reads it. If its `tokenizer.json` or `tokenizer.model` is complete, that
file is read here, with the `tokenizers` or the SentencePiece library alone, and `check_reading` compares the result
with transformers'. If other files add tokens, or the vocabulary is in `vocab.json` and `merges.txt` or `tekken.json`,
transformers makes the definition and it is read here. A file that is named itself is read alone.

These are the reference tokenizers: an accelerated engine (`data/tokenizer/encoders.py`) has to give the same ids.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from megatron_cpt.data.tokenizer.folder import (
    CONFIG,
    JSON,
    MODEL,
    VOCABULARIES,
    folder_hash,
    is_tiktoken,
    named_tokens,
    save_remedy,
    settings_of,
    tiktoken_refusal,
)
from megatron_cpt.data.tokenizer.threads import one_thread
from megatron_cpt.data.tokenizer.transformers_reading import transformers_reading
from megatron_cpt.errors import DataError
from megatron_cpt.files import file_hash

logger = logging.getLogger(__name__)

SpecialTokens = Literal["text", "token"]
"""How control tokens that a text spells are read: as any other text, or as the tokens that they name."""

_USUAL_EOD = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<|eos|>", "<eos>", "[EOS]", "<|end▁of▁sentence|>", "<EOD>")


class Tokenizer(Protocol):
    """Interface of a tokenizer; `identity` (name, kind, hash, vocab_size, eod_id) is stored with token files."""

    path: Path
    vocab_size: int
    eod_id: int
    identity: dict[str, Any]
    special_tokens: SpecialTokens

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Return the ids of each text, without special tokens around it."""
        ...

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Return the text of `ids`, special tokens included."""
        ...

    def prefix_ids(self) -> list[int]:
        """Return the ids that the tokenizer puts before a text where special tokens are asked for: BOS, or none."""
        ...

    def control_tokens(self) -> dict[str, int]:
        """Return the tokens that mean something to a model and nothing to a reader, with their ids."""
        ...


class HuggingFaceTokenizer:
    """A tokenizer of the `tokenizers` library, from the bytes of a `tokenizer.json`."""

    def __init__(
        self,
        path: Path,
        json_path: Path | None,
        definition: bytes,
        backend: Any,
        eod_token: str | None,
        *,
        needs_eod: bool = True,
    ):
        """Keep a loaded `backend`; without `json_path` several files of the folder `path` gave its definition."""
        self.path = path
        self.json_path = json_path
        self.definition = definition
        where = path if json_path is None else json_path
        self.backend = backend
        self.backend.no_truncation()
        self.backend.no_padding()
        self.special_tokens: SpecialTokens = "token"
        vocabulary = self.backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(len(vocabulary), max(vocabulary.values(), default=-1) + 1)
        try:
            self.eod_id = _eod_id(where, vocabulary, eod_token)
        except DataError:
            if needs_eod:
                raise
            self.eod_id = -1
        own_hash = folder_hash(path) if json_path is None else file_hash(json_path)
        self.identity = _identity(path, "huggingface", where, own_hash, self.vocab_size, self.eod_id)
        # the post-processor is replaced where conversations are encoded
        plain, whole = (self.backend.encode("a", add_special_tokens=added).ids for added in (False, True))
        starts = (start for start in range(len(whole)) if whole[start : start + len(plain)] == plain)
        self._prefix = list(whole[: next(starts, 0)])

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Return the ids of each text, without special tokens around it."""
        return [encoding.ids for encoding in self.backend.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Return the text of `ids`, special tokens included."""
        return self.backend.decode([int(id) for id in ids], skip_special_tokens=False)

    def prefix_ids(self) -> list[int]:
        """Return the ids that the post-processor puts before a text."""
        return self._prefix

    def control_tokens(self) -> dict[str, int]:
        """Return the added tokens that are marked special, with their ids."""
        added = self.backend.get_added_tokens_decoder()
        return {token.content: id for id, token in sorted(added.items()) if token.special}


class SentencePieceTokenizer:
    """A SentencePiece model, such as Llama 2's `tokenizer.model`; control symbols in a text are text to it."""

    special_tokens: SpecialTokens = "text"

    def __init__(self, path: Path, model_path: Path, eod_token: str | None, *, needs_eod: bool = True):
        import sentencepiece  # heavy: a compiled library, not needed for other verbs

        try:
            self.backend = sentencepiece.SentencePieceProcessor(model_file=str(model_path))
        except (OSError, RuntimeError) as problem:
            if is_tiktoken(model_path):
                raise tiktoken_refusal(model_path) from None
            raise DataError(f"{model_path}: not a SentencePiece model ({problem}).") from None
        self.path = path
        self.model_path = model_path
        self.vocab_size = self.backend.get_piece_size()
        if eod_token is None:
            self.eod_id = self.backend.eos_id()
        else:
            known = {self.backend.id_to_piece(id): id for id in range(self.vocab_size)}
            self.eod_id = known.get(eod_token, -1)
        if self.eod_id < 0 and needs_eod:
            raise _no_eod(model_path, eod_token)
        own_hash = file_hash(model_path)
        self.identity = _identity(path, "sentencepiece", model_path, own_hash, self.vocab_size, self.eod_id)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Return the ids of each text, without special tokens around it."""
        return self.backend.encode(texts, out_type=int, num_threads=1)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Return the text of `ids`; control tokens have none."""
        return self.backend.decode([int(id) for id in ids])

    def prefix_ids(self) -> list[int]:
        """Return nothing: a model has no post-processor (a folder's is known to transformers)."""
        return []

    def control_tokens(self) -> dict[str, int]:
        """Return the control and unknown pieces, with their ids."""
        backend = self.backend
        ids = (id for id in range(self.vocab_size) if backend.is_control(id) or backend.is_unknown(id))
        return {backend.id_to_piece(id): id for id in ids}


def load_tokenizer(
    path: Path, eod_token: str | None = None, special_tokens: SpecialTokens | None = None, *, needs_eod: bool = True
) -> Tokenizer:
    """Return the tokenizer of a Hugging Face folder, a `tokenizer.json` or a SentencePiece `.model` file.

    The end-of-document token is `eod_token`, or the `eos_token` of the tokenizer's folder. `special_tokens` sets the
    treatment of control tokens in a text; None: the tokenizer's default. Without `needs_eod` an end-of-document token
    that cannot be told is -1.

    Raises: DataError when there is none, it is damaged, or its end-of-document token cannot be told.
    """
    path = Path(path)
    tokenizer: Tokenizer
    if path.is_dir():
        tokenizer = _read_folder(path, eod_token, needs_eod=needs_eod)
    elif not path.is_file():
        raise DataError(f"{path}: no such tokenizer. Name a Hugging Face folder, a tokenizer.json or a .model file.")
    elif path.suffix == ".tiktoken":
        raise tiktoken_refusal(path)
    elif path.name != JSON and path.name in VOCABULARIES and path.suffix != ".model":
        raise DataError(f"{path}: is a part of a tokenizer. The others are needed too. Name the folder {path.parent}.")
    elif path.suffix == ".json":
        definition, backend = _definition(path)
        tokenizer = HuggingFaceTokenizer(path, path, definition, backend, eod_token, needs_eod=needs_eod)
    else:
        tokenizer = SentencePieceTokenizer(path, path, eod_token, needs_eod=needs_eod)
    if special_tokens:
        read_special_tokens(tokenizer, special_tokens)
    return tokenizer


def read_special_tokens(tokenizer: Tokenizer, how: SpecialTokens) -> None:
    """Set a tokenizer's treatment of control tokens in a text to `how`.

    Raises: DataError when it cannot.
    """
    if isinstance(tokenizer, HuggingFaceTokenizer):
        tokenizer.special_tokens = how
        tokenizer.backend.encode_special_tokens = how == "text"
    elif how == "token":
        raise DataError(
            f"{tokenizer.path}: is a SentencePiece model, which reads control symbols in a text as text. Use --special-tokens "
            "text, or a folder with the model's tokenizer.json."
        )


def check_reading(tokenizer: Tokenizer) -> list[int]:
    """Compare a folder's tokenizer with transformers'; return the ids that transformers puts before a text (BOS, or none).

    A file that was named itself is compared with nothing.

    Raises: DataError when length, added tokens or the ids of a probe text differ.
    """
    if not tokenizer.path.is_dir():
        return tokenizer.prefix_ids()
    folder = tokenizer.path
    try:
        reading = transformers_reading(folder)
    except DataError as problem:
        logger.warning("%s The tokenizer is read without comparing it.", problem)
        return tokenizer.prefix_ids()
    if "error" in reading:
        raise _unreadable(folder, reading["error"])
    if difference := _difference(tokenizer, reading):
        file: Path = getattr(tokenizer, "json_path", getattr(tokenizer, "model_path", None)) or folder
        raise DataError(
            f"{folder}: {file.name} alone is read otherwise than by transformers ({reading['class']}): {difference}. Training "
            f"and evaluation must read alike. {save_remedy(folder)} Or name {file} itself, to mean this file alone."
        )
    return list(reading["prefix"])


def bos_id(tokenizer: Tokenizer) -> int:
    """Return the id of the token that begins a text.

    Raises: DataError when the tokenizer names none.
    """
    folder = tokenizer.path if tokenizer.path.is_dir() else tokenizer.path.parent
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        token = settings_of(folder / name).get("bos_token")
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str) and (found := token_id(tokenizer, token)) is not None:
            return found
    if isinstance(tokenizer, SentencePieceTokenizer) and tokenizer.backend.bos_id() >= 0:
        return int(tokenizer.backend.bos_id())
    raise DataError(f"{tokenizer.path}: names no bos_token. --bos on needs one. Set it in tokenizer_config.json.")


def token_id(tokenizer: Tokenizer, token: str) -> int | None:
    """Return the id of a token by its name, None where the tokenizer has none of that name."""
    backend = tokenizer.backend  # type: ignore[attr-defined]
    if isinstance(tokenizer, SentencePieceTokenizer):
        found = backend.piece_to_id(token)
        return found if backend.id_to_piece(found) == token else None  # unknown pieces have the id of <unk>
    found = backend.token_to_id(token)
    return None if found is None else int(found)


def same_tokenizer(one: dict[str, Any] | None, other: dict[str, Any] | None) -> bool:
    """Return whether two identities mean the same ids; names and places do not matter."""
    if one is None or other is None:
        return False
    return all(one.get(key) == other.get(key) for key in ("hash", "vocab_size", "eod_id"))


def check_same_tokenizer(where: Path | str, found: dict[str, Any] | None, expected: dict[str, Any]) -> None:
    """Refuse token files (`where`) that another tokenizer made than the one in use.

    Raises: DataError naming both.
    """
    if not same_tokenizer(found, expected):
        raise DataError(
            f"{where}: was tokenized with {describe(found)}, not with {describe(expected)}. Ids of different tokenizers mean "
            "different texts. Give the tokenizer that made it."
        )


def describe(identity: dict[str, Any] | None) -> str:
    """Return a tokenizer's name and identity."""
    if not identity:
        return "an unknown tokenizer"
    return (
        f"{identity.get('name')} (hash {str(identity.get('hash'))[:8]}, {identity.get('vocab_size')} tokens, "
        f"end of document {identity.get('eod_id')})"
    )


def _read_folder(folder: Path, eod_token: str | None, *, needs_eod: bool) -> Tokenizer:
    """Return the tokenizer of a folder: read from its only file, or combined by transformers."""
    json_path, model_path = folder / JSON, folder / MODEL
    named = set(named_tokens(folder))
    if json_path.is_file():
        definition, backend = _definition(json_path)
        if named <= {token.content for token in backend.get_added_tokens_decoder().values()}:
            return HuggingFaceTokenizer(folder, json_path, definition, backend, eod_token, needs_eod=needs_eod)
    elif model_path.is_file():
        # a plain piece that is named as a token would be found whole in a text by transformers
        if not is_tiktoken(model_path):
            model = SentencePieceTokenizer(folder, model_path, eod_token or _configured_eos(folder), needs_eod=False)
            if named <= model.control_tokens().keys():
                return SentencePieceTokenizer(
                    folder, model_path, eod_token or _configured_eos(folder), needs_eod=needs_eod
                )
    elif tiktoken := sorted(folder.glob("*.tiktoken")):
        raise tiktoken_refusal(tiktoken[0])
    elif not any((folder / name).is_file() for name in VOCABULARIES):
        raise DataError(
            f"{folder}: holds neither tokenizer.json nor tokenizer.model, nor another vocabulary that is known "
            f"({', '.join(VOCABULARIES[2:])}). Name a tokenizer's folder or file."
        )
    return _read_by_transformers(folder, eod_token, needs_eod=needs_eod)


def _definition(path: Path, definition: bytes | None = None) -> tuple[bytes, Any]:
    """Return the bytes of a `tokenizer.json`, which can be in memory, and the loaded tokenizer."""
    from tokenizers import Tokenizer as Backend  # heavy: a compiled library, not needed for other verbs

    try:
        definition = path.read_bytes() if definition is None else definition
        return definition, Backend.from_buffer(definition)
    except Exception as problem:  # the library raises plain Exception
        raise DataError(f"{path}: not a tokenizer ({problem}).") from None


def _read_by_transformers(folder: Path, eod_token: str | None, *, needs_eod: bool) -> HuggingFaceTokenizer:
    reading = transformers_reading(folder, needs_definition=True)
    if "error" in reading:
        if is_tiktoken(folder / MODEL):
            raise tiktoken_refusal(folder / MODEL)
        raise _unreadable(folder, reading["error"])
    if not reading["is_fast"]:
        raise _unreadable(folder, f"its class {reading['class']} is no fast tokenizer")
    definition, backend = _definition(folder, reading["definition"].encode())
    eod_token = eod_token or _configured_eos(folder) or reading["eos_token"]
    tokenizer = HuggingFaceTokenizer(folder, None, definition, backend, eod_token, needs_eod=needs_eod)
    logger.info("%s: read by transformers (%s), since several files make the tokenizer", folder, reading["class"])
    return tokenizer


def _unreadable(folder: Path, reason: str) -> DataError:
    remedy = save_remedy(folder)
    if not settings_of(folder / CONFIG).get("tokenizer_class"):
        remedy = f'Name its class in {CONFIG}, such as {{"tokenizer_class": "GPT2Tokenizer"}}. {remedy}'
    return DataError(f"{folder}: transformers cannot read the tokenizer ({reason}). {remedy}")


def _difference(tokenizer: Tokenizer, reading: dict[str, Any]) -> str | None:
    """Return how a tokenizer differs from transformers' reading, or None."""
    added = {int(id): content for id, (content, _) in reading["added"].items()}
    special = {content for content, is_special in reading["added"].values() if is_special}
    if isinstance(tokenizer, HuggingFaceTokenizer) and (other := special ^ tokenizer.control_tokens().keys()):
        return f"{min(other)!r} is {'a' if min(other) in special else 'no'} control token, here otherwise"
    for id, content in added.items():
        if (found := token_id(tokenizer, content)) != id:
            return f"token {content!r} is {id}, here {found}"
    largest = max([reading["length"] - 1, *added])
    if largest >= tokenizer.vocab_size:
        return f"it has ids up to {largest:,}, here {tokenizer.vocab_size - 1:,}"
    ids, texts = reading["ids"], reading["texts"]
    if isinstance(tokenizer, SentencePieceTokenizer):
        # a model reads control symbols as text, transformers as tokens: --special-tokens text is all that it can do
        kept = [i for i, text in enumerate(texts) if not any(content in text for content in added.values())]
        ids, texts = [ids[i] for i in kept], [texts[i] for i in kept]
    how = tokenizer.special_tokens
    if isinstance(tokenizer, HuggingFaceTokenizer):
        read_special_tokens(tokenizer, "token")
    with one_thread():
        found_ids = tokenizer.encode_batch(texts)
    read_special_tokens(tokenizer, how)
    for text, expected, mine in zip(texts, ids, found_ids, strict=True):
        if list(expected) != list(mine):
            pairs = enumerate(zip(expected, mine))
            at = next((at for at, (one, other) in pairs if one != other), min(len(expected), len(mine)))
            where = f" from id {at} on" if at else ""
            return f"{text[:40]!r}{where} is {list(expected)[at : at + 8]}, here {list(mine)[at : at + 8]}"
    return None


def _identity(path: Path, kind: str, file: Path, own_hash: str, vocab_size: int, eod_id: int) -> dict[str, Any]:
    is_usual = file.name in (JSON, MODEL)
    name = file.absolute().parent.name if is_usual else path.absolute().name
    return {"name": name, "kind": kind, "hash": own_hash, "vocab_size": vocab_size, "eod_id": eod_id}


def _eod_id(where: Path, vocabulary: dict[str, int], eod_token: str | None) -> int:
    folder = where if where.is_dir() else where.parent
    if eod_token is None:
        eod_token = _configured_eos(folder)
    if eod_token is None:
        configured_id = _configured_eos_id(folder)
        if configured_id is not None and configured_id in vocabulary.values():
            return configured_id
        usual = [token for token in _USUAL_EOD if token in vocabulary]
        if len(usual) != 1:
            raise _no_eod(where, None)
        eod_token = usual[0]
    if eod_token not in vocabulary:
        raise _no_eod(where, eod_token)
    return vocabulary[eod_token]


def _configured_eos(folder: Path) -> str | None:
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        eos = settings_of(folder / name).get("eos_token")
        if isinstance(eos, dict):
            eos = eos.get("content")
        if isinstance(eos, str):
            return eos
    return None


def _configured_eos_id(folder: Path) -> int | None:
    for name in ("generation_config.json", "config.json"):
        eos = settings_of(folder / name).get("eos_token_id")
        if isinstance(eos, list) and eos:
            eos = eos[0]
        if isinstance(eos, int):
            return eos
    return None


def _no_eod(path: Path, eod_token: str | None) -> DataError:
    found = "no end-of-document token is known" if eod_token is None else f"has no token {eod_token!r}"
    return DataError(
        f"{path}: {found}. Documents are separated by one. "
        "Set eos_token in tokenizer_config.json, or name the token with --eod-token."
    )
