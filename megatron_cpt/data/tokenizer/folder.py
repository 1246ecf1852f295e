"""The files of a tokenizer's folder: the one with the vocabulary, and the additions of the others.

transformers reads a folder as a whole: tokens in `tokenizer_config.json` (`added_tokens_decoder`, named special tokens,
extra special tokens), or without that in `special_tokens_map.json` and `added_tokens.json`, join the vocabulary of
`tokenizer.json` or `tokenizer.model`. If they add nothing, the vocabulary's file is the whole tokenizer, and its hash
is the tokenizer's. Everything else is read by transformers itself (`data/tokenizer/transformers_reading.py`), and
hashed with the files read.

Source: transformers 5.23, tokenization_utils_base.py, `_from_pretrained`; tokenization_utils_tokenizers.py, `__init__`.
"""

import json
from pathlib import Path
from typing import Any

from megatron_cpt.errors import DataError
from megatron_cpt.files import file_hash, text_hash

CONFIG, SPECIAL_MAP, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
JSON, MODEL = "tokenizer.json", "tokenizer.model"
VOCABULARIES = (JSON, MODEL, "tekken.json", "vocab.json", "merges.txt", "vocab.txt", "spiece.model")
"""Files that transformers reads a vocabulary from, as far as we know; `*.tiktoken` needs code of its own."""

_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_EXTRA = ("extra_special_tokens", "additional_special_tokens")
_HARMLESS = {
    *("chat_template", "model_max_length", "max_length", "padding_side", "truncation_side", "name_or_path"),
    *("clean_up_tokenization_spaces", "model_input_names", "processor_class", "tokenizer_file", "padding"),
    *("special_tokens_map_file", "use_default_system_prompt", "response_schema", "spaces_between_special_tokens"),
    *("auto_map", "device_map", "return_token_type_ids", "pad_to_multiple_of", "stride", "truncation_strategy"),
    *("is_local", "local_files_only", "added_tokens_file", "add_bos_token", "add_eos_token"),
}
"""Keys of `tokenizer_config.json` that change no id of a text."""


def settings_of(path: Path) -> dict[str, Any]:
    """Return a JSON object's file as a dict, empty where there is none.

    Raises: DataError when it is no JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as problem:
        raise DataError(f"{path}: not valid JSON ({problem}). Restore the file.") from None
    if not isinstance(value, dict):
        raise DataError(f"{path}: holds a JSON {type(value).__name__}. An object is needed. Restore the file.")
    return value


def named_tokens(folder: Path) -> list[str]:
    """Return every token in a folder's files other than the vocabulary, in the order in which transformers adds
    them."""
    config = settings_of(folder / CONFIG)
    decoder = config.get("added_tokens_decoder")
    found = [_content(token) for token in decoder.values()] if isinstance(decoder, dict) else []
    sources = [config]
    if decoder is None:  # transformers leaves both files aside where the configuration has the decoder
        sources.append(settings_of(folder / SPECIAL_MAP))
        found += settings_of(folder / ADDED)
    for settings in sources:
        found += [_content(settings.get(key)) for key in _NAMED]
        for key in _EXTRA:
            extra = settings.get(key) or []
            found += [_content(token) for token in (extra.values() if isinstance(extra, dict) else extra)]
    return [token for token in dict.fromkeys(found) if token]


def folder_hash(folder: Path) -> str:
    """Return the hash of all that decides a folder's ids: vocabulary files, added tokens and settings, not the chat template."""
    names = (
        (JSON,) if (folder / JSON).is_file() else VOCABULARIES
    )  # transformers takes the first where there are several
    files = {name: file_hash(folder / name) for name in names if (folder / name).is_file()}
    config = {key: value for key, value in settings_of(folder / CONFIG).items() if key not in _HARMLESS}
    beside = {name: settings_of(folder / name) for name in (SPECIAL_MAP, ADDED)}
    return text_hash(json.dumps({"files": files, "config": config, **beside}, sort_keys=True))


def is_tiktoken(path: Path) -> bool:
    """Return whether a file is a tiktoken vocabulary: lines of a base64 token and its rank."""
    try:
        with path.open("rb") as file:
            token, _, rank = file.readline(4096).strip().partition(b" ")
    except OSError:
        return False
    return (
        bool(token)
        and rank.isdigit()
        and not token.strip(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/=")
    )


def tiktoken_refusal(path: Path) -> DataError:
    """Return the reason why a tiktoken file cannot be read, and the readable alternative."""
    return DataError(
        f"{path}: is a tiktoken vocabulary, which names neither its special tokens nor how texts are split. Take tokenizer.json "
        "and tokenizer_config.json from the model's Hugging Face release, or make it with tiktoken installed: python -c \"from "
        f"transformers.convert_slow_tokenizer import TikTokenConverter as C; C('{path}', extra_special_tokens=[NAMES BY ID])"
        ".converted().save('tokenizer.json')\" (pattern=... for a model that splits texts otherwise than Llama 3)."
    )


def save_remedy(folder: Path) -> str:
    """Return the one line that makes a folder with a tokenizer.json of one that transformers can read."""
    return (
        "Take tokenizer.json and tokenizer_config.json from the model's Hugging Face release, or save them: python -c "
        f"\"from transformers import AutoTokenizer as A; A.from_pretrained('{folder}').save_pretrained('NEW_FOLDER')\" "
        "(with trust_remote_code=True for a folder whose code you have read)."
    )


def _content(token: Any) -> str:
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else ""
