"""Everything in a model folder but weights: tokenizer, chat templates, generation settings, remote code, licence, model card.

A converted checkpoint keeps a copy (`<checkpoint>/huggingface/`), and the checkpoints of a stage that began with it share one
(`<checkpoints>/huggingface/`), so that an export years later needs no base folder.
"""

import contextlib
import fnmatch
import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_cpt.checkpoint.huggingface.folder import SIDE_FILES
from megatron_cpt.checkpoint.huggingface.options import CONVERSION
from megatron_cpt.config.checks.vocabulary import vocabulary_problem
from megatron_cpt.config.settings.schema import ModelConfig
from megatron_cpt.data.tokenizer.interface import load_tokenizer
from megatron_cpt.errors import CheckpointError, DataError
from megatron_cpt.files import file_hash, text_hash, write_json

logger = logging.getLogger(__name__)

CARD, BASE_CARD = "README.md", "BASE_MODEL_CARD.md"
GENERATION = "generation_config.json"
_WEIGHTS = (
    "*.safetensors *.bin *.pt *.pth *.ckpt *.gguf *.ggml *.onnx *.onnx_data *.msgpack *.h5 *.npz *.index.json *.tflite "
    "*.mlmodel *.ot *.zip *.tar *.gz"
).split()
_NOT_KEPT = (*_WEIGHTS, "config.json", CONVERSION, "merge_info.json", "mergekit_config.yml", ".*")
_FOLDERS = ("additional_chat_templates",)
_TOKENIZER = (*SIDE_FILES, "*.model", "*.tiktoken", "*token*.json", "vocab.*", "*.vocab")
_LARGEST_BYTES = 256 << 20
"""A larger file is no tokenizer and no text."""


def companions(folder: Path) -> list[Path]:
    """Return the files that belong to a model in addition to its weights and config.json, relative to `folder`."""
    found = [file for file in sorted(folder.iterdir()) if file.is_file() and not _matches(file.name, _NOT_KEPT)]
    found += [file for name in _FOLDERS for file in sorted((folder / name).glob("*")) if file.is_file()]
    small = [file for file in found if file.stat().st_size <= _LARGEST_BYTES]
    return [file.relative_to(folder) for file in small]


def keep_companions(source: Path, target: Path) -> list[str]:
    """Copy the companions of `source` that are not in `target` yet; return the names of all that are copied."""
    copied = []
    for name in companions(source):
        if not (target / name).exists():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, target / name)
            copied.append(name.as_posix())
    return copied


def is_trained_with(kept: Path | None, manifest: Mapping[str, Any]) -> bool:
    """Return whether the tokenizer that a checkpoint kept of its base is the one that its model was trained with since."""
    trained = (manifest.get("tokenizer") or {}).get("hash")
    if kept is None or trained is None or not has_tokenizer(kept):
        return True
    try:
        found = load_tokenizer(kept, needs_eod=False).identity.get("hash")
    except DataError:
        return True  # of a kind that is copied and not read here
    if found != trained:
        logger.warning(
            "trained with tokenizer %s, not with that of its base, which is left out. Name it with --tokenizer.",
            manifest["tokenizer"].get("name"),
        )
    return bool(found == trained)


def has_tokenizer(folder: Path) -> bool:
    """Return whether a folder holds a tokenizer: a vocabulary, not only its settings."""
    return any(
        _matches(file.name, ("tokenizer.json", "*.model", "*.tiktoken", "vocab.json", "vocab.txt"))
        for file in folder.iterdir()
    )


def tokenizer_hash(tokenizer: Path | None) -> str | None:
    """Return a hash of a tokenizer's files, so that another one makes another export."""
    if tokenizer is None:
        return None
    files = sorted(tokenizer.glob("*token*")) if tokenizer.is_dir() else [tokenizer]
    return text_hash("".join(f"{file.name} {file_hash(file)}\n" for file in files if file.is_file()))


def add_companions(
    directory: Path,
    *,
    tokenizer: Path | None,
    kept: Path | None,
    uses_kept_tokenizer: bool,
    eod_id: int | None = None,
    is_trained: bool = False,
) -> list[str]:
    """Copy `tokenizer` (folder, `tokenizer.json`, SentencePiece model) and the files that the checkpoint `kept` into an
    export; return the names of all files. A `tokenizer` replaces the kept one, which is copied only if
    `uses_kept_tokenizer`; the card of the base is renamed if the model `is_trained` since.

    Raises: CheckpointError when there is no such tokenizer.
    """
    copied = copy_tokenizer(tokenizer, directory, eod_id)
    if kept is not None:
        for name in companions(kept):
            is_tokenizer = _matches(name.name, _TOKENIZER) or name.parent.name
            if is_tokenizer and (tokenizer is not None or not uses_kept_tokenizer):
                continue
            target = directory / (BASE_CARD if is_trained and name.as_posix() == CARD else name)
            if not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(kept / name, target)
                copied.append(target.relative_to(directory).as_posix())
    if not has_tokenizer(directory):
        logger.warning(
            "%s: WITHOUT A TOKENIZER. Neither --tokenizer nor the checkpoint has one. Nobody can use the model without it.",
            directory.name.removeprefix(".").split(".")[0],
        )
    return copied


def check_tokenizer_fits(tokenizer: Path | None, model: ModelConfig, *, is_own: bool) -> None:
    """Raise CheckpointError when a tokenizer has ids that the model has no rows for; warn when it came with the base
    (`is_own`), which was taken in with it."""
    if tokenizer is None or not tokenizer.exists() or (tokenizer.is_dir() and not has_tokenizer(tokenizer)):
        return
    try:
        num_ids = load_tokenizer(tokenizer, needs_eod=False).vocab_size
    except DataError as unread:
        logger.warning("its ids are not held against the model's rows: %s", unread)
        return
    problem = vocabulary_problem(str(tokenizer), num_ids, model, "Export with the tokenizer of the training.")
    if problem and is_own:
        logger.warning("%s", problem)
    elif problem:
        raise CheckpointError(problem)


def copy_tokenizer(tokenizer: Path | None, directory: Path, eod_id: int | None) -> list[str]:
    """Copy a tokenizer (folder, `tokenizer.json`, SentencePiece model) into `directory`; return the names of its files.

    If it has no `tokenizer_config.json`, one is written with the end-of-document token: `eod_id`, the one that the
    model was trained with, or the tokenizer's own.

    Raises: CheckpointError when there is none.
    """
    if tokenizer is None:
        return []
    if tokenizer.is_dir():
        beside = (*_TOKENIZER, GENERATION, "*.py", "LICENSE*", "NOTICE*")
        copied = []
        for name in companions(tokenizer):
            if _matches(name.name, beside) or name.parent.name in _FOLDERS:
                (directory / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(tokenizer / name, directory / name)
                copied.append(name.as_posix())
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
    auto_map = config.get("auto_map")
    entries = auto_map.values() if isinstance(auto_map, dict) else ()
    missing = {str(entry).split(".")[0] + ".py" for entry in entries if isinstance(entry, str)} - set(copied)
    if missing:
        logger.warning(
            "config.json: auto_map dropped, %s is not in the tokenizer's folder; transformers knows the architecture itself",
            ", ".join(sorted(missing)),
        )
        config = {key: value for key, value in config.items() if key != "auto_map"}
    write_json(directory / "config.json", config)
    if GENERATION not in copied:
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        ids = {key: config[key] for key in names if config.get(key) is not None}
        write_json(directory / GENERATION, {"_from_model_config": True, **ids})


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _end_token(tokenizer: Path, eod_id: int | None) -> dict[str, str]:
    from tokenizers import Tokenizer  # a compiled library, needed here only

    file = tokenizer / "tokenizer.json" if tokenizer.is_dir() else tokenizer
    if eod_id is None:
        with contextlib.suppress(DataError):
            eod_id = load_tokenizer(tokenizer).eod_id
    token = None
    if eod_id is not None:
        try:
            token = Tokenizer.from_file(str(file)).id_to_token(eod_id)
        except Exception as problem:  # tokenizers raises a plain Exception for a file that it cannot read
            raise CheckpointError(
                f"{file}: is no tokenizer.json ({' '.join(str(problem).split())[:120]}). Name a tokenizer that loads."
            ) from None
    return {} if token is None else {"eos_token": token}
