"""Tokenizers: Hugging Face folders, `tokenizer.json` files and SentencePiece models behind one small interface.

Hugging Face tokenizers are read with the `tokenizers` library alone; transformers is not imported. These are the
reference tokenizers: an accelerated engine (`data/tokenizer/engines.py`) has to give the same ids.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from megatron_cpt.errors import DataError
from megatron_cpt.files import file_hash, read_json

_USUAL_EOD = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<|eos|>", "<eos>", "[EOS]", "<|end▁of▁sentence|>", "<EOD>")


class Tokenizer(Protocol):
    """What a tokenizer offers; `identity` (name, kind, hash, vocab_size, eod_id) is stored beside token files."""

    path: Path
    vocab_size: int
    eod_id: int
    identity: dict[str, Any]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Return the ids of each text, without special tokens around it."""
        ...

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Return the text of `ids`, special tokens included."""
        ...


class HuggingFaceTokenizer:
    """A tokenizer of the `tokenizers` library, from `tokenizer.json`."""

    def __init__(self, path: Path, json_path: Path, eod_token: str | None):
        from tokenizers import Tokenizer as Backend  # heavy: a compiled library, not needed for other verbs

        try:
            self.backend = Backend.from_file(str(json_path))
        except Exception as problem:  # the library raises plain Exception
            raise DataError(f"{json_path}: not a tokenizer ({problem}).") from None
        self.backend.no_truncation()
        self.backend.no_padding()
        self.path = path
        self.json_path = json_path
        vocabulary = self.backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(len(vocabulary), max(vocabulary.values(), default=-1) + 1)
        self.eod_id = _eod_id(json_path, vocabulary, eod_token)
        self.identity = _identity(path, "huggingface", json_path, self.vocab_size, self.eod_id)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Return the ids of each text, without special tokens around it."""
        return [encoding.ids for encoding in self.backend.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Return the text of `ids`, special tokens included."""
        return self.backend.decode([int(id) for id in ids], skip_special_tokens=False)


class SentencePieceTokenizer:
    """A SentencePiece model, such as Llama 2's `tokenizer.model`."""

    def __init__(self, path: Path, model_path: Path, eod_token: str | None):
        import sentencepiece  # heavy: a compiled library, not needed for other verbs

        try:
            self.backend = sentencepiece.SentencePieceProcessor(model_file=str(model_path))
        except (OSError, RuntimeError) as problem:
            raise DataError(f"{model_path}: not a SentencePiece model ({problem}).") from None
        self.path = path
        self.model_path = model_path
        self.vocab_size = self.backend.get_piece_size()
        if eod_token is None:
            self.eod_id = self.backend.eos_id()
        else:
            known = {self.backend.id_to_piece(id): id for id in range(self.vocab_size)}
            self.eod_id = known.get(eod_token, -1)
        if self.eod_id < 0:
            raise _no_eod(model_path, eod_token)
        self.identity = _identity(path, "sentencepiece", model_path, self.vocab_size, self.eod_id)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Return the ids of each text, without special tokens around it."""
        return self.backend.encode(texts, out_type=int, num_threads=1)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Return the text of `ids`; control tokens have none."""
        return self.backend.decode([int(id) for id in ids])


def load_tokenizer(path: Path, eod_token: str | None = None) -> Tokenizer:
    """Return the tokenizer of a Hugging Face folder, a `tokenizer.json` or a SentencePiece `.model` file.

    The end-of-document token is `eod_token`, or what the files beside the tokenizer call `eos_token`.

    Raises: DataError when there is none, it is damaged, or its end-of-document token cannot be told.
    """
    path = Path(path)
    if path.is_dir():
        json_path, model_path = path / "tokenizer.json", path / "tokenizer.model"
        if json_path.is_file():
            return HuggingFaceTokenizer(path, json_path, eod_token)
        if model_path.is_file():
            return SentencePieceTokenizer(path, model_path, eod_token)
        raise DataError(f"{path}: holds neither tokenizer.json nor tokenizer.model. Name a tokenizer's folder or file.")
    if not path.is_file():
        raise DataError(f"{path}: no such tokenizer. Name a Hugging Face folder, a tokenizer.json or a .model file.")
    if path.suffix == ".json":
        return HuggingFaceTokenizer(path, path, eod_token)
    return SentencePieceTokenizer(path, path, eod_token)


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


def _identity(path: Path, kind: str, file: Path, vocab_size: int, eod_id: int) -> dict[str, Any]:
    name = file.absolute().parent.name if file.name in ("tokenizer.json", "tokenizer.model") else path.name
    return {"name": name, "kind": kind, "hash": file_hash(file), "vocab_size": vocab_size, "eod_id": eod_id}


def _eod_id(json_path: Path, vocabulary: dict[str, int], eod_token: str | None) -> int:
    if eod_token is None:
        eod_token = _configured_eos(json_path.parent)
    if eod_token is None:
        configured_id = _configured_eos_id(json_path.parent)
        if configured_id is not None and configured_id in vocabulary.values():
            return configured_id
        usual = [token for token in _USUAL_EOD if token in vocabulary]
        if len(usual) != 1:
            raise _no_eod(json_path, None)
        eod_token = usual[0]
    if eod_token not in vocabulary:
        raise _no_eod(json_path, eod_token)
    return vocabulary[eod_token]


def _configured_eos(folder: Path) -> str | None:
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        eos = _settings(folder / name).get("eos_token")
        if isinstance(eos, dict):
            eos = eos.get("content")
        if isinstance(eos, str):
            return eos
    return None


def _configured_eos_id(folder: Path) -> int | None:
    for name in ("generation_config.json", "config.json"):
        eos = _settings(folder / name).get("eos_token_id")
        if isinstance(eos, list) and eos:
            eos = eos[0]
        if isinstance(eos, int):
            return eos
    return None


def _settings(path: Path) -> dict[str, Any]:
    value = read_json(path, DataError) if path.exists() else {}
    return value if isinstance(value, dict) else {}


def _no_eod(path: Path, eod_token: str | None) -> DataError:
    found = "no end-of-document token is known" if eod_token is None else f"has no token {eod_token!r}"
    return DataError(
        f"{path}: {found}. Documents are separated by one. "
        "Set eos_token in tokenizer_config.json, or name the token with --eod-token."
    )
