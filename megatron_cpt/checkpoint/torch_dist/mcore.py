"""Megatron's checkpoint folder on disk: names, tracker file, manifest, verification, walking back. No megatron import.

    <root>/latest_checkpointed_iteration.txt     `100` or `release`, written last of all
    <root>/iter_0000100/                         torch_dist files: `__R_I.distcp`, `.metadata`, `metadata.json`, `common.pt`
    <root>/iter_0000100/manifest.json            ours: the list of files, with size and hash of each; written last in the folder

A checkpoint without a complete manifest does not exist for us: a killed save leaves none. The manifest carries a
checksum of itself, so that a flipped bit in it is found too.
"""

import json
import logging
import os
import re
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

from megatron_cpt.checkpoint.torch_dist.content import content_hash, has_content
from megatron_cpt.config.settings.schema import ModelConfig
from megatron_cpt.errors import CheckpointError, DamagedError, storage_error
from megatron_cpt.files import read_json, text_hash, write_json, write_text
from megatron_cpt.log import format_bytes

logger = logging.getLogger(__name__)

Iteration = int | Literal["release"]
VerifyMode = Literal["full", "size"]

TRACKER = "latest_checkpointed_iteration.txt"
MANIFEST = "manifest.json"
MANIFEST_FORMAT = 1
FOREIGN_ADVICE = (
    "If Megatron-LM wrote it: `megatron-cpt convert foreign-to-hf` and `foreign-to-mcore` read it, `checkpoint adopt` takes it as "
    "it is. If megatron-cpt did: the save did not finish. Use an earlier checkpoint."
)


def checkpoint_dir(root: Path, iteration: Iteration) -> Path:
    """Return `<root>/iter_0000100` or `<root>/release`."""
    return root / (iteration if isinstance(iteration, str) else f"iter_{iteration:07d}")


def iteration_of(directory: Path) -> Iteration | None:
    """Return the iteration that a folder's name states, None when it is no checkpoint's name."""
    if directory.name == "release":
        return "release"
    match = re.fullmatch(r"iter_(\d{7,})", directory.name)
    return int(match[1]) if match else None


def read_tracker(root: Path) -> Iteration | None:
    """Return the iteration in the tracker file, None when there is no such file.

    Raises: CheckpointError when the file holds anything else.
    """
    path = root / TRACKER
    try:
        text = path.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return None
    except UnicodeDecodeError:
        text = "(not text)"
    except OSError as problem:
        raise CheckpointError(str(storage_error(problem))) from None
    if text == "release":
        return "release"
    if not re.fullmatch(r"\d+", text):
        raise CheckpointError(
            f"{path}: holds {text[:40]!r}. An iteration or 'release' is needed. "
            f"Write the iteration of a checkpoint that `megatron-cpt checkpoint list {root}` shows into it."
        )
    return int(text)


def write_tracker(root: Path, iteration: Iteration) -> None:
    """Name `iteration` as the newest checkpoint of `root`. Call it when the manifest is on disk."""
    write_text(root / TRACKER, f"{iteration}\n")


def write_manifest(directory: Path, manifest: Mapping[str, Any], hashes: Mapping[str, str] | None = None) -> None:
    """Complete a checkpoint: list every file of `directory` with size and hash in `manifest.json`.

    `hashes` (file name -> hash, see `content.py`) saves reading again what was hashed while it was written; files not in it are
    read. Raises: CheckpointError when `hashes` names a file that is not there.
    """
    hashes = hashes or {}
    paths = {path.relative_to(directory).as_posix(): path for path in sorted(directory.rglob("*")) if path.is_file()}
    paths.pop(MANIFEST, None)
    missing = sorted(set(hashes) - set(paths))
    if missing:
        raise CheckpointError(f"{directory}: {', '.join(missing)} was written but is not there. Save it again.")
    files = {
        name: {"bytes": path.stat().st_size, "hash": hashes.get(name) or content_hash(path)}
        for name, path in paths.items()
    }
    whole = {"format": MANIFEST_FORMAT, **manifest, "files": files}
    write_json(directory / MANIFEST, {**whole, "checksum": _checksum(whole)})


def read_manifest(directory: Path) -> dict[str, Any]:
    """Return a checkpoint's manifest.

    Raises: CheckpointError when there is none, when it is damaged or of a format that this version does not know.
    """
    path = directory / MANIFEST
    if not _is_there(path):
        found = "no such folder" if not directory.is_dir() else "no manifest.json, the save did not finish"
        if is_of_megatron_lm(directory):
            raise CheckpointError(f"{directory}: no manifest.json. {FOREIGN_ADVICE}")
        raise CheckpointError(f"{directory}: {found}. A complete checkpoint is needed.")
    manifest = read_json(path, DamagedError)
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise DamagedError(f"{path}: is not a manifest. The checkpoint is damaged. Use another one.")
    checksum = manifest.pop("checksum", None)
    if checksum != _checksum(manifest):
        raise DamagedError(f"{path}: its checksum does not fit its content. The file is damaged. Use another one.")
    if manifest.get("format") != MANIFEST_FORMAT:
        raise CheckpointError(
            f"{path}: format {manifest.get('format')}. This version reads format {MANIFEST_FORMAT}. Update megatron-cpt."
        )
    return manifest


def manifest_model(manifest: Mapping[str, Any], where: Path) -> ModelConfig:
    """Return the model that a manifest describes. Raises: CheckpointError when it describes none."""
    try:
        return ModelConfig(**manifest["model"])
    except (KeyError, TypeError) as problem:
        raise CheckpointError(
            f"{where}: the manifest's model is not usable ({problem}). Use another checkpoint."
        ) from None


def verify_checkpoint(directory: Path, mode: VerifyMode = "full") -> dict[str, Any]:
    """Return the manifest after checking that every file is there with its size and, in mode full, its hash.

    Raises: CheckpointError with the checkpoint and all of its problems; unreadable files count as damage.
    """
    manifest = read_manifest(directory)
    damage = [
        f"{name} {found}"
        for name, expected in manifest["files"].items()
        if (found := _damage(directory / name, expected, mode))
    ]
    if damage:
        raise DamagedError(f"{directory}: {'; '.join(damage)}. The checkpoint is damaged. Use another one.")
    return manifest


def _damage(path: Path, expected: Mapping[str, Any], mode: VerifyMode) -> str | None:
    try:
        if not path.is_file():
            return "is missing" if not os.path.lexists(path) else "is no file"
        if (size := path.stat().st_size) != expected["bytes"]:
            return f"has {size} bytes instead of {expected['bytes']}"
        if mode == "full" and not has_content(path, expected["hash"]):
            return "has another hash than when it was written"
    except OSError as problem:
        return f"cannot be read ({problem.strerror})"
    return None


def list_checkpoints(root: Path) -> list[Iteration]:
    """Return the iterations of the complete checkpoints in `root`, `release` first, then ascending.

    Complete means a readable manifest; the files are not looked at.
    """
    found: list[Iteration] = []
    for iteration in iterations_on_disk(root):
        try:
            read_manifest(checkpoint_dir(root, iteration))
        except CheckpointError:
            continue
        found.append(iteration)
    return found


def iterations_on_disk(root: Path) -> list[Iteration]:
    """Return the iterations that have a folder in `root`, complete or not, `release` first, then ascending."""
    if not root.is_dir():
        return []
    with os.scandir(root) as entries:
        found = [iteration_of(Path(entry.path)) for entry in entries if not entry.is_file(follow_symlinks=False)]
    return sorted((iteration for iteration in found if iteration is not None), key=_order)


def is_of_megatron_lm(directory: Path) -> bool:
    """Return whether a folder without manifest holds a checkpoint of Megatron-LM, or a save of ours that did not finish."""
    return _is_there(directory / ".metadata") or any(directory.glob("mp_rank_*/model_optim_rng.pt"))


def newest_good_checkpoint(root: Path, mode: VerifyMode = "full", unreadable: Collection[Path] = ()) -> Path | None:
    """Return the newest checkpoint of `root` that verifies, None when `root` has never had one.

    Starts at the iteration that the tracker names (a person rolls a run back by editing it) and walks back over
    damaged ones, warning about each. A folder without manifest is an unfinished save and is passed over, as are those
    that a rank found to be `unreadable`.

    Raises: CheckpointError when there were checkpoints and all of them are damaged.
    """
    tracked = _tracked_or_none(root)
    damaged = []
    for iteration in reversed(iterations_on_disk(root)):
        directory = checkpoint_dir(root, iteration)
        if tracked is not None and _order(iteration) > _order(tracked):
            logger.warning("%s: newer than the tracker's %s, not used. Edit %s to use it.", directory, tracked, TRACKER)
            continue
        if directory in unreadable:
            damaged.append(f"{directory}: cannot be read.")
            continue
        if not _is_there(directory / MANIFEST) and iteration != tracked:
            logger.warning("%s: unfinished save (no manifest.json), passed over.", directory)
            continue
        try:
            verify_checkpoint(directory, mode)
        except CheckpointError as problem:
            logger.warning("WALKING BACK: %s", problem)
            damaged.append(str(problem))
            continue
        if damaged:
            logger.warning("WALKED BACK to %s: %d newer checkpoint(s) are damaged.", directory, len(damaged))
        return directory
    if tracked is not None and not checkpoint_dir(root, tracked).exists():
        damaged.append(f"{checkpoint_dir(root, tracked)}: named by {TRACKER} but not there.")
    if damaged:
        is_foreign = any(FOREIGN_ADVICE in problem for problem in damaged)
        advice = "" if is_foreign else "Restore one from a copy, or remove the folder to start again."
        raise CheckpointError(
            f"{root}: no good checkpoint, {len(damaged)} damaged: {' '.join(damaged)} {advice}".rstrip()
        )
    return None


def find_checkpoint(path: Path, mode: VerifyMode = "size") -> Path:
    """Return the checkpoint folder that `path` means: itself, or the newest good one of a `checkpoints` folder.

    Raises: CheckpointError when there is none.
    """
    if _is_there(path / MANIFEST) or iteration_of(path) is not None:
        verify_checkpoint(path, mode)
        return path
    found = newest_good_checkpoint(path, mode) if path.is_dir() else None
    if found is None:
        raise CheckpointError(
            f"{path}: no checkpoint. A folder iter_NNNNNNN or release with manifest.json, or the folder above it, is needed."
        )
    return found


def check_free_space(directory: Path, needed_bytes: int) -> None:
    """Raise CheckpointError when the file system of `directory` (or its nearest existing parent) has less free."""
    existing = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        raise CheckpointError(
            f"{directory}: {format_bytes(free)} free. {format_bytes(needed_bytes)} are needed. "
            "Remove checkpoints (`megatron-cpt checkpoint prune`) or use another disk."
        )


def check_holds_no_run(root: Path) -> None:
    """Raise CheckpointError when a folder that is to get `release` holds a run: its tracker would lose its place."""
    tracked = read_tracker(root)
    if tracked not in (None, "release"):
        raise CheckpointError(
            f"{root}: holds a run at iteration {tracked}. Converted weights need a folder of their own. Choose another one."
        )


def checkpoint_bytes(directory: Path) -> int:
    """Return the bytes of all files in a checkpoint folder, complete or not."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def _is_there(path: Path) -> bool:
    """Return whether there is something; what cannot be looked at counts, so that it is damage and not an unfinished save."""
    try:
        return path.exists()
    except OSError:
        return True


def _checksum(manifest: Mapping[str, Any]) -> str:
    return text_hash(json.dumps(manifest, sort_keys=True, ensure_ascii=False))


def _order(iteration: Iteration) -> int:
    return -1 if isinstance(iteration, str) else iteration


def _tracked_or_none(root: Path) -> Iteration | None:
    try:
        return read_tracker(root)
    except CheckpointError as problem:
        logger.warning("%s The newest checkpoint is used instead.", problem)
        return None
