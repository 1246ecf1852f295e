"""Which files of a model folder hold its weights: those that the index names, or else those of one plain set.

Folders collect leftovers: shards of an earlier save, variants (`model.fp16-00001-of-00002.safetensors`), the same weights in
another format. Only what transformers would load is read; a folder that leaves it open is refused.
"""

import re
from pathlib import Path
from typing import Any

from megatron_cpt.errors import CheckpointError
from megatron_cpt.files import read_json

_STEMS = (("model", "safetensors"), ("pytorch_model", "bin"))
_SHARD = r"-\d+-of-\d+"
_VARIANT = re.compile(rf"(?:model|pytorch_model)\.(?!safetensors$|bin$)[\w-]+?(?:{_SHARD})?\.(?:safetensors|bin)")


def weight_files(folder: Path) -> tuple[list[Path], dict[str, str] | None]:
    """Return the files with weights, and tensor -> file name if there is an index.

    Raises: CheckpointError when there are none, when a file of the index is not there, or two sets contradict each other.
    """
    for stem, suffix in _STEMS:
        single, index = folder / f"{stem}.{suffix}", folder / f"{stem}.{suffix}.index.json"
        if index.is_file():
            named = _weight_map(index)
            if single.is_file() and single.name not in named.values():
                raise CheckpointError(
                    f"{folder}: {single.name} and {index.name}, which does not name it. One of them is left over. "
                    "Remove the one that is not meant."
                )
            return _indexed_files(folder, index, named), named
        if single.is_file():
            return [single], None
        shards = _plain_files(folder, rf"{stem}{_SHARD}\.{suffix}")
        if shards:
            return shards, None
    others = _plain_files(folder, r"(?!consolidated).*\.safetensors") or _plain_files(folder, r"pytorch_model.*\.bin")
    if others:
        return others, None
    raise CheckpointError(
        f"{folder}: no *.safetensors and no pytorch_model*.bin. A Hugging Face model folder is needed."
    )


def _plain_files(folder: Path, pattern: str) -> list[Path]:
    return sorted(
        file
        for file in folder.iterdir()
        if file.is_file()
        and not file.name.startswith(".")
        and re.fullmatch(pattern, file.name)
        and not _VARIANT.fullmatch(file.name)
    )


def _weight_map(index: Path) -> dict[str, str]:
    content: Any = read_json(index, CheckpointError)
    named = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(named, dict) or not named or not all(isinstance(name, str) for name in named.values()):
        raise CheckpointError(
            f"{index}: no weight_map of tensors to files. An index is needed. Fetch the folder again."
        )
    outside = next((name for name in named.values() if Path(name).name != name), None)
    if outside is not None:
        raise CheckpointError(
            f"{index}: names {outside!r}. A file of its own folder is needed. Fetch the folder again."
        )
    return named


def _indexed_files(folder: Path, index: Path, named: dict[str, str]) -> list[Path]:
    files = [folder / name for name in sorted(set(named.values()))]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        lost = sorted(name for name, file in named.items() if file in missing)
        raise CheckpointError(
            f"{folder}: {len(lost)} tensors of {index.name} are in no file, the first is {lost[0]} ({missing[0]} is missing). "
            "The folder is incomplete. Fetch it again."
        )
    return files
