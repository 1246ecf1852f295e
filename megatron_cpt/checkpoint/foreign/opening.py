"""Checkpoints that others left behind, opened alike: weights, and the optimizer's state where it can be mapped.

    iter_0001000/mp_rank_TT[_PPP]/model_optim_rng.pt     Megatron's torch format               (torch_format.py)
    <universal>/zero/<parameter>/fp32.pt                 DeepSpeed universal                   (deepspeed.py)
    iter_0001000/.metadata                               torch_dist by Megatron-LM             (sources.py)

All pickles are read through an allow-list (safe.py). State that cannot be mapped with certainty is not used and is
reported.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from megatron_cpt.checkpoint.foreign.deepspeed import DeepSpeedUniversalWeights, universal_step
from megatron_cpt.checkpoint.foreign.torch_format import MOMENTS, TorchFormat, Unmappable
from megatron_cpt.checkpoint.huggingface.write_config import hf_config_from_model
from megatron_cpt.checkpoint.mapping.units import FAMILIES, Unit, family_of, units
from megatron_cpt.checkpoint.torch_dist import mcore
from megatron_cpt.checkpoint.torch_dist.dcp import METADATA, DcpReader
from megatron_cpt.checkpoint.torch_dist.megatron_arguments import find_step, read_common
from megatron_cpt.checkpoint.torch_dist.weights import MegatronWeights, TorchDistWeights
from megatron_cpt.config.settings.schema import ModelConfig
from megatron_cpt.errors import CheckpointError

_NOT_RESHARDABLE = re.compile(r"dp_reshardable|dp_zero_gather_scatter|fully_sharded_bucket_space")


@dataclass(frozen=True)
class ForeignCheckpoint:
    """An opened checkpoint of another program."""

    format: str
    """torch, deepspeed or torch_dist."""
    directory: Path
    weights: MegatronWeights
    moments: dict[str, MegatronWeights] | None
    """Kind (param, exp_avg, exp_avg_sq) -> tensors in fp32; None: none that can be used."""
    step: int | None
    """Updates that made the moments."""
    missing: str = ""
    """Why there are no moments."""

    @property
    def files(self) -> list[Path]:
        """Return the files that hold tensors."""
        pattern = "*.distcp" if self.format == "torch_dist" else "*.pt"
        return sorted(self.directory.rglob(pattern))


def foreign_format(path: Path) -> tuple[str, Path] | None:
    """Return the format of a foreign checkpoint and its folder (that which Megatron's tracker file names), else None."""
    if path.is_dir() and mcore.iteration_of(path) is None and (path / mcore.TRACKER).exists():
        tracked = mcore.read_tracker(path)
        path = mcore.checkpoint_dir(path, tracked) if tracked is not None else path
    if any(path.glob("mp_rank_*/model_optim_rng.pt")):
        return "torch", path
    if any(path.glob("zero/*/fp32.pt")) or any(path.glob("*/fp32.pt")):
        return "deepspeed", path
    return ("torch_dist", path) if (path / METADATA).exists() else None


def open_foreign(source: Path, model: ModelConfig) -> ForeignCheckpoint:
    """Return the foreign checkpoint `source` of `model`.

    Raises: CheckpointError when it is none, is damaged, or a pickle in it holds more than weights and arguments.
    """
    found = foreign_format(source)
    if found is None:
        raise CheckpointError(
            f"{source}: neither mp_rank_*/model_optim_rng.pt, nor zero/<parameter>/fp32.pt, nor {METADATA}. A folder of "
            "Megatron's torch or torch_dist format or a DeepSpeed universal checkpoint is needed."
        )
    kind, directory = found
    if kind == "torch":
        return _open_torch_format(directory)
    if kind == "deepspeed":
        return _open_deepspeed(directory, model)
    return _open_torch_dist(directory)


def is_loadable(directory: Path, model: ModelConfig) -> bool:
    """Return whether training loads a `torch_dist` folder directly: a key per layer, named as Transformer Engine
    does."""
    present = set(DcpReader(directory).tensor_keys())
    return all(unit.key in present for unit in model_units(model))


def _open_torch_format(directory: Path) -> ForeignCheckpoint:
    opened = TorchFormat(directory)
    try:
        moments, step = opened.optimizer()
    except Unmappable as problem:
        return ForeignCheckpoint("torch", directory, opened.weights, None, None, str(problem))
    return ForeignCheckpoint("torch", directory, opened.weights, dict(moments), step)


def _open_deepspeed(directory: Path, model: ModelConfig) -> ForeignCheckpoint:
    weights = DeepSpeedUniversalWeights(directory, model)
    missing = ""
    try:
        moments: dict[str, MegatronWeights] = {
            kind: DeepSpeedUniversalWeights(directory, model, "fp32" if kind == "param" else kind) for kind in MOMENTS
        }
        step = universal_step(directory)
        if step is None:
            missing = "neither zero/<parameter>/step.pt nor zero/optimizer_state.pt states the number of updates"
    except CheckpointError as problem:
        missing, step = str(problem), None
    if missing:
        return ForeignCheckpoint("deepspeed", directory, weights, None, None, missing)
    return ForeignCheckpoint("deepspeed", directory, weights, moments, step)


def _open_torch_dist(directory: Path) -> ForeignCheckpoint:
    reader = DcpReader(directory)
    weights = TorchDistWeights(directory, reader=reader)
    common = read_common(directory)
    kind = str((common.get("content_metadata") or {}).get("distrib_optim_sharding_type", ""))
    kind = kind or str((common.get("optimizer") or {}).get("param_state_sharding_type", ""))
    moments = {name: TorchDistWeights(directory, name, reader) for name in MOMENTS}
    step = find_step(common.get("optimizer"))
    missing = ""
    if _NOT_RESHARDABLE.search(kind):
        missing = f"its optimizer state is {kind}: buffers of one data-parallel layout, without parameter names"
    elif not len(moments["exp_avg"]) or not len(moments["exp_avg_sq"]):
        missing = "it holds no optimizer.state.exp_avg"
    elif step is None:
        missing = "its common state has no number of updates"
    if missing:
        return ForeignCheckpoint("torch_dist", directory, weights, None, None, missing)
    if not len(moments["param"]):  # training in fp32 without the distributed optimizer: the weights are the main ones
        moments["param"] = weights
    return ForeignCheckpoint("torch_dist", directory, weights, dict(moments), step)


def model_units(model: ModelConfig) -> list[Unit]:
    """Return the Megatron tensors of a model, also of one that no Hugging Face architecture expresses."""
    try:
        return units(model, family_of(hf_config_from_model(model, None)["architectures"][0]))
    except CheckpointError:
        return units(model, FAMILIES["Qwen3MoeForCausalLM"])
