"""Foreign formats to Hugging Face folders; from there `hf_to_mcore` makes a checkpoint to train on."""

import dataclasses
from pathlib import Path

from megatron_cpt.checkpoint.convert import mcore_to_hf
from megatron_cpt.checkpoint.foreign import DeepSpeedUniversalWeights, TorchFormatWeights
from megatron_cpt.checkpoint.sources import MegatronWeights
from megatron_cpt.config.schema import ModelConfig
from megatron_cpt.files import file_hash


def foreign_to_hf(
    source: Path,
    output: Path,
    model: ModelConfig,
    *,
    tokenizer: Path | None = None,
    dtype: str | None = None,
    verify: bool = False,
    num_workers: int = 2,
) -> Path:
    """Convert a checkpoint in Megatron's torch format or a DeepSpeed universal one, of `model`, to `output`; return it.

    Raises: CheckpointError when a weight has no place, is missing, or a pickle holds more than weights and arguments.
    """
    is_torch_format = any(source.glob("mp_rank_*"))
    weights: MegatronWeights = (
        TorchFormatWeights(source) if is_torch_format else DeepSpeedUniversalWeights(source, model)
    )
    files = {
        path.relative_to(source).as_posix(): {"bytes": path.stat().st_size, "hash": file_hash(path)}
        for path in sorted(source.rglob("*.pt"))
    }
    return mcore_to_hf(
        source,
        output,
        tokenizer=tokenizer,
        dtype=dtype,
        verify=verify,
        num_workers=num_workers,
        weights=weights,
        manifest={"model": dataclasses.asdict(model), "hf": None, "tokenizer": None, "files": files},
    )
