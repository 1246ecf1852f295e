"""Exports of a run's checkpoints to `<run>/checkpoints_hf/iter_%07d`."""

import logging
from pathlib import Path

from megatron_cpt.checkpoint.convert.choices import ExportChoices
from megatron_cpt.checkpoint.convert.hf_mcore import mcore_to_hf
from megatron_cpt.checkpoint.torch_dist import mcore
from megatron_cpt.config.loading.paths import data_path
from megatron_cpt.config.settings.schema import RunConfig
from megatron_cpt.errors import CheckpointError
from megatron_cpt.run.directory import run_dir

logger = logging.getLogger(__name__)


def export_latest(config: RunConfig, *, dtype: str | None = None, verify: bool = False, num_workers: int = 2) -> Path:
    """Convert a run's newest good checkpoint; return the Hugging Face folder."""
    checkpoint = mcore.find_checkpoint(run_dir(config).checkpoints)
    return export_checkpoint(config, checkpoint, dtype=dtype, verify=verify, num_workers=num_workers)


def export_all(
    config: RunConfig,
    *,
    every: int = 1,
    dtype: str | None = None,
    verify: bool = False,
    num_workers: int = 2,
) -> list[Path]:
    """Convert every kept iteration that is a multiple of `every` and not converted yet; return the folders of all of them.

    A damaged checkpoint is passed over with a warning, and named in the error at the end.
    """
    run = run_dir(config)
    iterations = [i for i in mcore.list_checkpoints(run.checkpoints) if isinstance(i, int) and i % every == 0]
    if not iterations:
        raise CheckpointError(f"{run.checkpoints}: no complete checkpoint at a multiple of {every}. Train first.")
    exported, damaged = [], []
    for iteration in iterations:
        try:
            checkpoint = mcore.checkpoint_dir(run.checkpoints, iteration)
            exported.append(export_checkpoint(config, checkpoint, dtype=dtype, verify=verify, num_workers=num_workers))
        except CheckpointError as problem:
            logger.warning("not converted: %s", problem)
            damaged.append(str(problem))
    if damaged:
        raise CheckpointError(
            f"{run.checkpoints}: {len(exported)} of {len(iterations)} converted. {'; '.join(damaged)}"
        )
    return exported


def tokenizer_path(config: RunConfig) -> Path | None:
    """Return the run's tokenizer, None when it has none."""
    return Path(data_path(config.paths, config.data.tokenizer)) if config.data.tokenizer else None


def export_checkpoint(
    config: RunConfig, checkpoint: Path, *, dtype: str | None = None, verify: bool = False, num_workers: int = 2
) -> Path:
    """Convert one checkpoint of a run to `<run>/checkpoints_hf/<its name>`; return that folder."""
    return mcore_to_hf(
        checkpoint,
        run_dir(config).checkpoints_hf / checkpoint.name,
        options=ExportChoices(tokenizer=tokenizer_path(config), dtype=dtype),
        verify=verify,
        num_workers=num_workers,
    )
