"""One way in for both kinds of models: Megatron checkpoints are converted to a temporary Hugging Face folder."""

import contextlib
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path

from megatron_cpt.checkpoint.convert.choices import ExportChoices
from megatron_cpt.checkpoint.convert.hf_mcore import mcore_to_hf
from megatron_cpt.checkpoint.torch_dist.mcore import MANIFEST, TRACKER, iteration_of, newest_good_checkpoint
from megatron_cpt.errors import CheckpointError

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def hf_folder(path: Path, tokenizer: Path | None = None) -> Iterator[Path]:
    """Yield `path` if it is a Hugging Face folder, else a temporary one made of the Megatron checkpoint in `path`.

    Raises: CheckpointError when `path` is neither.
    """
    if is_mcore_checkpoint(path):
        if iteration_of(path) is None:
            path = newest_good_checkpoint(path, "size") or path
        with tempfile.TemporaryDirectory(prefix="megatron-cpt-") as folder:
            logger.info("%s: a Megatron checkpoint, converted for the evaluation", path)
            yield mcore_to_hf(path, Path(folder) / "hf", options=ExportChoices(tokenizer=tokenizer))
    elif (path / "config.json").is_file():
        yield path
    else:
        raise CheckpointError(
            f"{path}: neither config.json nor {TRACKER} in it. A Hugging Face folder or a Megatron checkpoint is "
            "needed. Check the path."
        )


def is_mcore_checkpoint(path: Path) -> bool:
    """Return whether `path` is a Megatron checkpoint or a folder of them with its tracker file."""
    return any((path / name).exists() for name in (TRACKER, MANIFEST, ".metadata"))


def newest_export(path: Path) -> Path:
    """Return the newest `iter_*` in a folder of Hugging Face exports (`<run>/checkpoints_hf`); any other path as it is."""
    if is_mcore_checkpoint(path) or (path / "config.json").is_file():
        return path
    exports = [file.parent for file in path.glob("iter_*/config.json") if iteration_of(file.parent) is not None]
    return max(exports, key=lambda folder: int(folder.name.removeprefix("iter_")), default=path)
