"""Copies of checkpoints to another disk: every byte is hashed during the copy, and an interrupted copy resumes."""

import logging
import os
from pathlib import Path
from typing import IO, Any

from megatron_cpt.checkpoint.torch_dist import mcore
from megatron_cpt.checkpoint.torch_dist.content import ContentDigest, has_content
from megatron_cpt.checkpoint.torch_dist.kept_files import share_companions
from megatron_cpt.errors import CheckpointError
from megatron_cpt.files import naming, sync_dir
from megatron_cpt.log import Progress, format_bytes

logger = logging.getLogger(__name__)

_CHUNK_BYTES = 1 << 22


def copy_checkpoint(source: Path, target_root: Path) -> Path:
    """Copy the checkpoint `source` to `<target_root>/<its name>`; return the copy, verified against the manifest.

    Files go to `.<name>.copying` first; a second call takes over those that are whole. An existing good copy is kept.

    Raises: CheckpointError when the source is damaged, or something else is there already.
    """
    manifest = mcore.verify_checkpoint(source, "size")
    target = target_root / source.name
    if target.exists():
        if mcore.verify_checkpoint(target, "full")["files"] == manifest["files"]:
            logger.info("%s: a good copy is there already", target)
            return target
        raise CheckpointError(
            f"{target}: holds another checkpoint. A checkpoint is never overwritten. Choose another folder."
        )
    partial = target_root / f".{source.name}.copying"
    partial.mkdir(parents=True, exist_ok=True)
    total = sum(entry["bytes"] for entry in manifest["files"].values())
    mcore.check_free_space(target_root, total - mcore.checkpoint_bytes(partial))
    progress = Progress(f"copy {source.name}", total / 1e6, "MB")
    for name, entry in manifest["files"].items():
        _copy_file(source / name, partial / name, entry, progress)
    _copy_bytes(source / mcore.MANIFEST, partial / mcore.MANIFEST)
    mcore.read_manifest(partial)
    os.rename(partial, target)
    share_companions(source, target_root)
    sync_dir(target_root)
    _advance_tracker(target_root, target)
    logger.info("%s: %s copied and verified", target, format_bytes(total))
    return target


def _copy_file(source: Path, target: Path, entry: dict[str, Any], progress: Progress) -> None:
    if target.is_file() and target.stat().st_size == entry["bytes"] and has_content(target, entry["hash"]):
        progress.add(entry["bytes"] / 1e6)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    found = _copy_bytes(source, target, entry["hash"], progress)
    if found != entry["hash"]:
        target.unlink()
        raise CheckpointError(
            f"{source}: has another hash than in its manifest. The checkpoint is damaged. Use another one."
        )


def _copy_bytes(source: Path, target: Path, known_by: str = "", progress: Progress | None = None) -> str:
    """Copy a file; return its hash, of the kind of `known_by`."""
    digest = ContentDigest(known_by)
    with naming(target), source.open("rb") as reader, target.open("wb") as writer:
        while chunk := _read(reader, source):
            digest.update(chunk)
            writer.write(chunk)
            if progress is not None:
                progress.add(len(chunk) / 1e6)
        writer.flush()
        os.fsync(writer.fileno())
    return digest.hexdigest()


def _read(reader: IO[bytes], source: Path) -> bytes:
    with naming(source):
        return reader.read(_CHUNK_BYTES)


def _advance_tracker(root: Path, copied: Path) -> None:
    """Point the tracker of `root` at its newest checkpoint."""
    iteration, tracked = mcore.iteration_of(copied), mcore.read_tracker(root)
    if iteration is None:
        return
    if tracked is None or tracked == "release" or (isinstance(iteration, int) and iteration > tracked):
        mcore.write_tracker(root, iteration)
