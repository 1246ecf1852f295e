"""Foreign checkpoints to ours or to Hugging Face: tensor by tensor, with the optimizer's state where it can be mapped.

`foreign_to_mcore` writes a `torch_dist` checkpoint that training loads under any layout: a key per layer with Transformer
Engine's names, and `optimizer.state.{param,exp_avg,exp_avg_sq}.<key>` in fp32 (megatron-core's `fully_reshardable` form).
"""

import dataclasses
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import torch
import xxhash

from megatron_cpt.checkpoint.convert.choices import ExportChoices
from megatron_cpt.checkpoint.convert.converted import is_made, release_manifest
from megatron_cpt.checkpoint.convert.hf_mcore import (
    DTYPES,
    claimed,
    mcore_to_hf,
    progress_of,
    remove_partial,
)
from megatron_cpt.checkpoint.convert.verify import tensor_bytes
from megatron_cpt.checkpoint.foreign.opening import ForeignCheckpoint, model_units, open_foreign
from megatron_cpt.checkpoint.huggingface.folder import sampled_hash
from megatron_cpt.checkpoint.huggingface.options import CONVERSION
from megatron_cpt.checkpoint.mapping.transforms import pad_vocab
from megatron_cpt.checkpoint.mapping.units import Unit
from megatron_cpt.checkpoint.torch_dist import mcore
from megatron_cpt.checkpoint.torch_dist.content import content_hash
from megatron_cpt.checkpoint.torch_dist.dcp import DcpReader
from megatron_cpt.checkpoint.torch_dist.dcp_writer import Slice, write_dcp
from megatron_cpt.checkpoint.torch_dist.megatron_arguments import write_megatron_metadata
from megatron_cpt.checkpoint.torch_dist.weights import MegatronWeights
from megatron_cpt.config.settings.schema import ModelConfig
from megatron_cpt.errors import CheckpointError
from megatron_cpt.files import whole_dir, write_json
from megatron_cpt.log import format_bytes

logger = logging.getLogger(__name__)

Optimizer = Literal["if-there", "needed", "none"]


def foreign_to_mcore(
    source: Path,
    output: Path,
    model: ModelConfig,
    *,
    optimizer: Optimizer = "if-there",
    dtype: str | None = None,
    verify: bool = False,
    num_workers: int = 2,
) -> Path:
    """Convert a checkpoint of Megatron-LM or DeepSpeed, of `model`, to `<output>/release`; return that folder.

    `dtype` is the weights' type (None: unchanged); main parameters and moments stay in fp32. `optimizer`: treatment of
    the optimizer's state.

    Raises: CheckpointError when a weight has no place or is missing, optimizer state is needed and cannot be mapped, a
    pickle holds more than weights and arguments, or there is something else at the output already.
    """
    foreign = open_foreign(source, model)
    if foreign.moments is None and optimizer == "needed":
        raise CheckpointError(
            f"{foreign.directory}: no optimizer state to continue with: {foreign.missing}. Use its weights only "
            "(init.load=weights, or convert without --optimizer needed)."
        )
    if foreign.moments is None and optimizer == "if-there":
        logger.warning("%s: weights only: %s", foreign.directory, foreign.missing)
    moments = foreign.moments if optimizer != "none" else None
    steps = model_units(model)
    left = foreign.weights.unclaimed(steps)
    if left:
        raise CheckpointError(
            f"{foreign.directory}: {len(left)} weights have no place in the model, the first are {', '.join(left[:3])}. "
            "Every weight must be converted. The params file must describe this model."
        )
    identity = _identity(foreign, dtype, has_optimizer=moments is not None)
    target = mcore.checkpoint_dir(output, "release")
    if is_made(target, identity, model):
        if mcore.read_tracker(output) is None:  # killed between the folder and the tracker
            mcore.write_tracker(output, "release")
        logger.info("%s: converted already from the same checkpoint", target)
        return target
    mcore.check_holds_no_run(output)
    slices = _slices(steps, foreign.weights, moments, model, DTYPES[dtype] if dtype else None)
    total = sum(part.num_bytes for part in slices)
    mcore.check_free_space(output, int(total * 1.01) + (1 << 20))
    remove_partial(target)
    with whole_dir(target) as directory, claimed(directory):
        progress = progress_of(f"{source.name} to Megatron", total)
        hashes = write_dcp(directory, slices, num_workers=num_workers, progress=progress)
        write_megatron_metadata(directory, model, step=foreign.step if moments else None)
        if verify:
            record = {"direction": "foreign_to_mcore", "bit_exact": True, "tensors": _verified(directory, slices)}
            write_json(directory / CONVERSION, record)
        carried = {} if moments is None else {"content": "full", "optimizer_step": foreign.step}
        manifest = release_manifest(dataclasses.asdict(model), identity, **carried)
        mcore.write_manifest(directory, manifest, hashes)
    mcore.write_tracker(output, "release")
    content = f"weights and optimizer after {foreign.step} updates" if moments else "weights"
    logger.info("%s: %s of %s", target, format_bytes(total), content)
    return target


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
    """Convert the weights of a checkpoint of Megatron-LM or DeepSpeed, of `model`, to the folder `output`; return it.

    Raises: CheckpointError when a weight has no place, is missing, or a pickle holds more than weights and arguments.
    """
    foreign = open_foreign(source, model)
    files = {
        path.relative_to(foreign.directory).as_posix(): {"bytes": path.stat().st_size, "hash": content_hash(path)}
        for path in foreign.files
    }
    return mcore_to_hf(
        source,
        output,
        options=ExportChoices(tokenizer=tokenizer, dtype=dtype),
        verify=verify,
        num_workers=num_workers,
        weights=foreign.weights,
        manifest={"model": dataclasses.asdict(model), "hf": None, "tokenizer": None, "files": files},
    )


def _slices(
    steps: Sequence[Unit],
    weights: MegatronWeights,
    moments: dict[str, MegatronWeights] | None,
    model: ModelConfig,
    cast: torch.dtype | None,
) -> list[Slice]:
    slices = []
    for step in steps:
        is_bias = step.key.endswith("expert_bias")  # a buffer: the optimizer does not know it
        dtype = weights.dtype(step) if cast is None or is_bias else cast
        slices.append(_slice(step, step.key, weights, model, dtype))
        for kind, values in ({} if is_bias or moments is None else moments).items():
            slices.append(_slice(step, f"optimizer.state.{kind}.{step.key}", values, model, torch.float32))
    return slices


def _slice(step: Unit, key: str, values: MegatronWeights, model: ModelConfig, dtype: torch.dtype) -> Slice:
    rows, shape = step.rows(model), values.shape(step)
    if not step.fits(shape, model):
        raise CheckpointError(
            f"{key}: {list(shape)} in the checkpoint, {list(step.shape)} by the params file. Use the model's own."
        )

    def build() -> torch.Tensor:
        whole = values.read(step, rows)
        return (pad_vocab(whole, step.shape[0]) if rows is not None else whole).to(dtype)

    experts = () if step.expert is None else (1,)
    return Slice(key, (*experts, *step.shape), dtype, step.offsets, step.global_shape, build)


def _verified(directory: Path, slices: Sequence[Slice]) -> dict[str, str]:
    """Return tensor -> xxh3-128 of its bytes after reading everything back; one expert of a tensor is `<key>[e]`."""
    reader = DcpReader(directory)

    def compare(part: Slice) -> tuple[str, str]:
        wanted = tensor_bytes(part.build())
        if not torch.equal(wanted, tensor_bytes(reader.read(part.key, part.offsets, part.shape))):
            raise CheckpointError(f"{part.key}: differs from its source. The conversion is wrong. Report it.")
        name = part.key if part.shape == part.global_shape else f"{part.key}[{part.offsets[0]}]"
        return name, xxhash.xxh3_128_hexdigest(wanted.numpy())

    with ThreadPoolExecutor(2) as pool:
        return dict(pool.map(compare, slices))


def _identity(foreign: ForeignCheckpoint, dtype: str | None, *, has_optimizer: bool) -> dict[str, Any]:
    files = {
        path.relative_to(foreign.directory).as_posix(): [path.stat().st_size, sampled_hash(path)]
        for path in foreign.files
    }
    return {"kind": foreign.format, "files": files, "dtype": dtype, "optimizer": has_optimizer}
