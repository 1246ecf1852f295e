"""What a Hugging Face folder holds beside weights: tokenizer, chat template, configurations, remote code."""

import contextlib
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_cpt.checkpoint.huggingface.folder import SIDE_FILES, copy_side_files
from megatron_cpt.data.tokenizer.interface import load_tokenizer
from megatron_cpt.errors import CheckpointError, DataError
from megatron_cpt.files import file_hash, text_hash, write_json

logger = logging.getLogger(__name__)

_BESIDE_TOKENIZER = (*SIDE_FILES, "generation_config.json", "*.model", "configuration_*.py", "modeling_*.py")


def tokenizer_hash(tokenizer: Path | None) -> str | None:
    """Return a hash of a tokenizer's files, so that another one makes another export."""
    if tokenizer is None:
        return None
    files = sorted(tokenizer.glob("*token*")) if tokenizer.is_dir() else [tokenizer]
    return text_hash("".join(f"{file.name} {file_hash(file)}\n" for file in files if file.is_file()))


def copy_tokenizer(tokenizer: Path | None, directory: Path, eod_id: int | None) -> list[str]:
    """Copy a tokenizer (folder, `tokenizer.json`, SentencePiece model) into `directory`; return the names of its files.

    Where it has no `tokenizer_config.json`, one is written that names the end-of-document token: `eod_id`, the one that the
    model was trained with, or the tokenizer's own.

    Raises: CheckpointError when there is none.
    """
    if tokenizer is None:
        return []
    if tokenizer.is_dir():
        copied = copy_side_files(tokenizer, directory, _BESIDE_TOKENIZER)
    elif tokenizer.is_file():
        copied = ["tokenizer.json" if tokenizer.suffix == ".json" else "tokenizer.model"]
        shutil.copyfile(tokenizer, directory / copied[0])
    else:
        raise CheckpointError(
            f"{tokenizer}: no such tokenizer. Name its folder, tokenizer.json or SentencePiece model."
        )
    if "tokenizer_config.json" not in copied:
        is_fast = "tokenizer.json" in copied
        config = {"tokenizer_class": "PreTrainedTokenizerFast" if is_fast else "LlamaTokenizer"}
        if is_fast:
            config |= _end_token(tokenizer, eod_id)
        write_json(directory / "tokenizer_config.json", config)
        copied.append("tokenizer_config.json")
    return copied


def write_configs(directory: Path, config: dict[str, Any], copied: Sequence[str]) -> None:
    """Write `config.json`, without remote code that is not there, and `generation_config.json` where none was copied."""
    entries = config.get("auto_map", {}).values()
    missing = {str(entry).split(".")[0] + ".py" for entry in entries if isinstance(entry, str)} - set(copied)
    if missing:
        logger.warning(
            "config.json: auto_map dropped, %s is not beside the tokenizer; transformers knows the architecture itself",
            ", ".join(sorted(missing)),
        )
        config = {key: value for key, value in config.items() if key != "auto_map"}
    write_json(directory / "config.json", config)
    if "generation_config.json" not in copied:
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        ids = {key: config[key] for key in names if config.get(key) is not None}
        write_json(directory / "generation_config.json", {"_from_model_config": True, **ids})


def _end_token(tokenizer: Path, eod_id: int | None) -> dict[str, str]:
    from tokenizers import Tokenizer  # a compiled library, needed here only

    file = tokenizer / "tokenizer.json" if tokenizer.is_dir() else tokenizer
    if eod_id is None:
        with contextlib.suppress(DataError):
            eod_id = load_tokenizer(tokenizer).eod_id
    token = None if eod_id is None else Tokenizer.from_file(str(file)).id_to_token(eod_id)
    return {} if token is None else {"eos_token": token}
