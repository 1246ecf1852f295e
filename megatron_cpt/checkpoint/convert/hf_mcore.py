"""Hugging Face folders to Megatron `torch_dist` checkpoints and back, tensor by tensor, on a CPU.

No model is built and no process group started: each step (`mapping.Unit`) reads the tensors that it needs, rearranges them
and writes the result, so that memory holds a few tensors per worker. An output is complete under its name or not there.
"""

import contextlib
import dataclasses
import functools
import json
import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_cpt.checkpoint.convert.choices import ExportChoices, ImportChoices
from megatron_cpt.checkpoint.convert.converted import is_made, release_manifest
from megatron_cpt.checkpoint.convert.verify import verify_against_hf
from megatron_cpt.checkpoint.huggingface.companion_files import (
    add_companions,
    check_tokenizer_fits,
    is_trained_with,
    tokenizer_hash,
    write_configs,
)
from megatron_cpt.checkpoint.huggingface.folder import HFFolder, OutputGroup, write_safetensors
from megatron_cpt.checkpoint.huggingface.model_card import training_record
from megatron_cpt.checkpoint.huggingface.options import CONVERSION, ImportOptions
from megatron_cpt.checkpoint.huggingface.quantized import quantization
from megatron_cpt.checkpoint.huggingface.read_config import (
    POSITION_FIELDS,
    TRAINING_FIELDS,
    differing_fields,
    family_of_config,
    model_config_from_hf,
)
from megatron_cpt.checkpoint.huggingface.vocabulary import ExtendedFolder
from megatron_cpt.checkpoint.huggingface.write_config import hf_config_from_model
from megatron_cpt.checkpoint.mapping.units import Unit, check_coverage, family_of, units
from megatron_cpt.checkpoint.torch_dist import mcore
from megatron_cpt.checkpoint.torch_dist.content import content_hash
from megatron_cpt.checkpoint.torch_dist.dcp_writer import Slice, write_dcp
from megatron_cpt.checkpoint.torch_dist.kept_files import KEPT, kept_companions
from megatron_cpt.checkpoint.torch_dist.megatron_arguments import write_megatron_metadata
from megatron_cpt.checkpoint.torch_dist.weights import MegatronWeights, TorchDistWeights
from megatron_cpt.config.settings.schema import ModelConfig
from megatron_cpt.errors import CheckpointError
from megatron_cpt.files import read_json_object, take_lock, text_hash, whole_dir, write_json
from megatron_cpt.log import Progress, format_bytes

logger = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NAMES_IN_CONFIG = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def hf_to_mcore(
    hf_dir: Path,
    output: Path,
    *,
    model: ModelConfig | None = None,
    options: ImportChoices | None = None,
    verify: bool = False,
    num_workers: int = 2,
) -> Path:
    """Convert the model in `hf_dir` to `<output>/release`; return that folder.

    `model`, when given, must describe the same weights; its vocabulary padding is used. `verify` reads everything back and
    compares it bit by bit.

    Raises: CheckpointError when a tensor or a key has no place, when sizes differ, or when there is something else already.
    """
    options = options or ImportChoices()
    extension = options.extension
    source = HFFolder(hf_dir) if extension is None else ExtendedFolder(hf_dir, extension)
    where = str(hf_dir / "config.json")
    quantization(source.config, where)  # of a kind that is not known
    remembered = source.options.joined(options.ignore_config, options.skip_tensors)
    described = model_config_from_hf(source.config, ignore=remembered.ignore_config, where=where)
    remembered = _with_mtp(source, described, remembered, drop=options.drop_mtp)
    model = _agreed_model(described, model, options.make_vocab_size_divisible_by, hf_dir)
    family = family_of_config(source.config, where)
    steps = units(model, family)
    names = source.names_to_claim(*family.repeated_output(model))
    skipped = check_coverage(steps, names, str(hf_dir), remembered.skip_tensors)
    _check_shapes(source, steps)
    target = mcore.checkpoint_dir(output, "release")
    identity = {"kind": "huggingface", **source.fingerprint(), "dtype": options.dtype, "skipped": skipped}
    if is_made(target, identity, model):
        if mcore.read_tracker(output) is None:  # killed between the folder and the tracker
            mcore.write_tracker(output, "release")
        logger.info("%s: converted already from the same weights", target)
        return target
    mcore.check_holds_no_run(output)
    mcore.check_free_space(output, int(source.num_bytes() * 1.01) + (1 << 20))
    remove_partial(target)
    with whole_dir(target) as directory, claimed(directory):
        progress = progress_of(f"{hf_dir.name} to Megatron", source.num_bytes())
        cast = DTYPES[options.dtype] if options.dtype else None
        hashes = write_dcp(
            directory,
            [_slice(step, source, model, cast, allow_nonfinite=options.allow_nonfinite) for step in steps],
            num_workers=num_workers,
            progress=progress,
        )
        write_megatron_metadata(directory, model)
        kept = directory / KEPT
        kept.mkdir()
        new_tokenizer = extension.tokenizer if extension is not None else None
        add_companions(kept, tokenizer=new_tokenizer, kept=hf_dir, uses_kept_tokenizer=True)
        # Inside the partial folder: a conversion that fails the comparison never gets its final name.
        if verify:
            weights = TorchDistWeights(directory)
            tensors = verify_against_hf(source, weights, steps, model, cast, num_workers)
            write_json(directory / CONVERSION, {"direction": "hf_to_mcore", "bit_exact": True, "tensors": tensors})
        mcore.write_manifest(
            directory,
            release_manifest(dataclasses.asdict(model), identity, hf=source.config, **remembered.record()),
            hashes,
        )
    # After the renaming: the tracker never names a folder that is incomplete.
    mcore.write_tracker(output, "release")
    logger.info("%s: %s in %d steps", target, format_bytes(source.num_bytes()), len(steps))
    return target


def mcore_to_hf(
    checkpoint: Path,
    output: Path,
    *,
    options: ExportChoices | None = None,
    verify: bool = False,
    num_workers: int = 2,
    weights: MegatronWeights | None = None,
    manifest: dict[str, Any] | None = None,
) -> Path:
    """Convert the checkpoint `iter_NNNNNNN` or `release` (or the newest good one of a folder of them) to a Hugging Face
    folder `output`; return `output`.

    The model and the source's `config.json` come from the manifest. All files except the weights come from those that the
    checkpoint kept of its base, and the tokenizer from `options` where it names one. `weights` and `manifest` replace the
    checkpoint's own (averages, other formats); `checkpoint` then only names them.

    Raises: CheckpointError when the checkpoint is damaged or incomplete, or `output` holds something else.
    """
    options = options or ExportChoices()
    tokenizer = options.tokenizer
    if weights is None:
        checkpoint = mcore.find_checkpoint(checkpoint)
    manifest = mcore.read_manifest(checkpoint) if manifest is None else manifest
    model = mcore.manifest_model(manifest, checkpoint)
    weights = weights or TorchDistWeights(checkpoint)
    kept = kept_companions(checkpoint)
    check_tokenizer_fits(tokenizer or kept, model, is_own=tokenizer is None)
    uses_kept_tokenizer = tokenizer is None and is_trained_with(kept, manifest)
    imported = ImportOptions.of(manifest)
    recorded = {
        "dtype": options.dtype,
        "max_shard_bytes": options.max_shard_bytes,
        "tokenizer": tokenizer_hash(tokenizer or kept),
    }
    # The manifest's hashes stand for the weights: a repeated command reads none of them.
    identity = {"kind": "megatron", "files": text_hash(json.dumps(manifest.get("files"), sort_keys=True)), **recorded}
    if _is_exported(output, identity):
        logger.info("%s: converted already from the same weights", output)
        return output
    token_ids = {
        "eos_token_id": (manifest.get("tokenizer") or {}).get("eod_id"),
        "bos_token_id": None,
        "pad_token_id": None,
    }
    config = hf_config_from_model(model, manifest.get("hf"), token_ids=token_ids, ignore=imported.ignore_config)
    steps = units(model, family_of(config["architectures"][0]))
    left = weights.unclaimed(steps)
    if left:
        raise CheckpointError(
            f"{checkpoint}: {len(left)} weights have no place in {config['architectures'][0]}, the first are "
            f"{', '.join(left[:3])}. Every weight must be converted. The manifest belongs to another model."
        )
    cast = DTYPES[options.dtype] if options.dtype else None
    groups = [_group(step, weights, model, cast, allow_nonfinite=options.allow_nonfinite) for step in steps]
    # transformers 5 reads `dtype`, earlier versions `torch_dtype`.
    config["dtype"] = config["torch_dtype"] = NAMES_IN_CONFIG[groups[0].tensors[0][2]]
    total = sum(group.num_bytes for group in groups)
    mcore.check_free_space(output, int(total * 1.01) + (1 << 20))
    remove_partial(output)
    with whole_dir(output) as directory, claimed(directory):
        progress = progress_of(f"{checkpoint.name} to Hugging Face", total)
        hashes = write_safetensors(
            directory, groups, max_shard_bytes=options.max_shard_bytes, num_workers=num_workers, progress=progress
        )
        copied = add_companions(
            directory,
            tokenizer=tokenizer,
            kept=kept,
            uses_kept_tokenizer=uses_kept_tokenizer,
            eod_id=token_ids["eos_token_id"],
            is_trained=manifest.get("iteration", "release") != "release",
        )
        write_configs(directory, config, copied)
        for name, value in (options.extra_files or {}).items():
            write_json(directory / name, value)
        record: dict[str, Any] = {
            "direction": "mcore_to_hf",
            "source": identity,
            **imported.record(),
            **training_record(manifest),
        }
        if verify:
            folder = HFFolder(directory)
            record |= {
                "bit_exact": True,
                "tensors": verify_against_hf(folder, weights, steps, model, None, num_workers, stored_cast=cast),
            }
        # Weights were hashed while they were written; only copied files are read here.
        record["files"] = {
            file.relative_to(directory).as_posix(): {
                "bytes": file.stat().st_size,
                "hash": hashes.get(file.name) or content_hash(file),
            }
            for file in sorted(directory.rglob("*"))
            if file.is_file()
        }
        write_json(directory / CONVERSION, record)
    logger.info("%s: %s in %d tensors", output, format_bytes(total), sum(len(group.tensors) for group in groups))
    return output


def _agreed_model(described: ModelConfig, given: ModelConfig | None, divisible_by: int, where: Path) -> ModelConfig:
    if given is None:
        return dataclasses.replace(described, make_vocab_size_divisible_by=divisible_by)
    different = differing_fields(given, described, TRAINING_FIELDS | POSITION_FIELDS)
    if different:
        raise CheckpointError(
            f"{where / 'config.json'}: another model than the params file says (params != config.json): "
            f"{'; '.join(different)}. Use the params file of this model, or none."
        )
    for difference in differing_fields(given, described, TRAINING_FIELDS):
        logger.warning("positions differ on purpose? params != config.json: %s. The params file is used.", difference)
    return given


def _check_shapes(source: HFFolder, steps: Sequence[Unit]) -> None:
    for step in steps:
        for name, shape in zip(step.hf, step.hf_shapes, strict=True):
            if source.shape(name) != shape:
                raise CheckpointError(
                    f"{source.path}: {name} is {list(source.shape(name))}. config.json says {list(shape)}. "
                    "The folder's configuration belongs to another model."
                )


def _with_mtp(source: HFFolder, model: ModelConfig, options: ImportOptions, *, drop: bool) -> ImportOptions:
    """Return the options with the layers behind the last one left out, where that was asked for.

    Raises: CheckpointError if the folder has such layers and no option drops them.
    """
    behind = f"model.layers.{model.num_layers}."
    count = source.config.get("num_nextn_predict_layers")
    if not count or not any(name.startswith(behind) for name in source.names()):
        return options
    globs = [f"model.layers.{model.num_layers + number}.*" for number in range(int(count))]
    if not drop and not set(globs) <= set(options.skip_tensors):
        raise CheckpointError(
            f"{source.path}: {count} layers behind the last predict further tokens (num_nextn_predict_layers). They are not "
            "trained here and would no longer fit the model. Use --drop-mtp to leave them out; an export then says that there "
            "are none."
        )
    return options.joined((), globs)


def _slice(
    step: Unit, source: HFFolder, model: ModelConfig, cast: torch.dtype | None, *, allow_nonfinite: bool
) -> Slice:
    dtypes = {source.dtype(name) for name in step.hf}
    if not all(dtype.is_floating_point for dtype in dtypes) or (len(dtypes) > 1 and cast is None):
        found = ", ".join(f"{name} {str(source.dtype(name)).removeprefix('torch.')}" for name in step.hf)
        raise CheckpointError(
            f"{source.path}: {step.key} is made of {found}. One floating-point type is needed. Name one with --dtype."
        )
    dtype = _cast_type(step, next(iter(dtypes)), cast)

    def build() -> torch.Tensor:
        tensors = [source.read(name) for name in step.hf]
        if len(dtypes) > 1:
            tensors = [tensor.to(dtype) for tensor in tensors]
        values = step.to_mcore(tensors, model).to(dtype)
        if not allow_nonfinite:
            check_finite(values, ", ".join(step.hf), str(source.path))
        return values

    # megatron-core stores all experts of a layer as one tensor with an axis in front; a step writes one row of it.
    experts = () if step.expert is None else (1,)
    return Slice(step.key, (*experts, *step.shape), dtype, step.offsets, step.global_shape, build)


def _group(
    step: Unit, weights: MegatronWeights, model: ModelConfig, cast: torch.dtype | None, *, allow_nonfinite: bool
) -> OutputGroup:
    dtype = _cast_type(step, weights.dtype(step), cast)
    shape = weights.shape(step)
    if not step.fits(shape, model):
        raise CheckpointError(
            f"{step.key}: {list(shape)} on disk, {list(step.shape)} by the manifest's model. Use its own."
        )

    def build() -> Sequence[torch.Tensor]:
        values = weights.read(step, step.rows(model)).to(dtype)
        if not allow_nonfinite:
            check_finite(values, step.key, "the checkpoint")
        return step.to_hf(values, model)

    tensors = tuple((name, shape, dtype) for name, shape in zip(step.hf, step.hf_shapes, strict=True))
    return OutputGroup(tensors, build)


def check_finite(values: torch.Tensor, name: str, where: str) -> None:
    """Raise CheckpointError naming a tensor that holds NaN or infinity."""
    # aminmax passes NaN on, so one pass without a mask of the tensor's size is enough.
    if values.numel() == 0 or all(torch.isfinite(bound) for bound in torch.aminmax(values)):
        return
    nans, others = int(values.isnan().sum()), int((~values.isfinite()).sum())
    raise CheckpointError(
        f"{where}: {name} has {nans} NaN and {others - nans} infinite values as {str(values.dtype).removeprefix('torch.')}. "
        "A model with them computes NaN. Use a wider --dtype (fp16 ends at 65,504), or --allow-nonfinite to keep them."
    )


def _cast_type(step: Unit, stored: torch.dtype, cast: torch.dtype | None) -> torch.dtype:
    # megatron-core keeps expert_bias in fp32 at every precision, to avoid routing errors (router.py, 0.19).
    return stored if cast is None or step.key.endswith("expert_bias") else cast


def _is_exported(output: Path, identity: dict[str, Any]) -> bool:
    if not output.exists():
        return False
    record = read_json_object(output / CONVERSION, CheckpointError) if (output / CONVERSION).exists() else {}
    files = record.get("files", {})
    if record.get("source") == identity and all(
        (output / name).is_file() and (output / name).stat().st_size == entry["bytes"] for name, entry in files.items()
    ):
        return True
    raise CheckpointError(
        f"{output}: exists already and is damaged, or was made from other weights or with other options. An output is never "
        "overwritten. Remove it or choose another folder."
    )


def remove_partial(target: Path) -> None:
    """Remove what killed conversions to the same name left behind.

    Raises: CheckpointError when a conversion to that name is at work.
    """
    for leftover in target.parent.glob(f".{target.name}.*.partial"):
        try:
            with claimed(leftover):
                logger.warning("%s: left by an interrupted conversion, removed", leftover)
                shutil.rmtree(leftover)
        except BlockingIOError:
            raise CheckpointError(
                f"{target}: another process converts to it ({leftover.name}). One at a time may. Wait for it."
            ) from None


@contextlib.contextmanager
def claimed(directory: Path) -> Iterator[None]:
    """Hold a lock on a partial folder that ends with this process, however it ends.

    Raises: BlockingIOError when another process holds it.
    """
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        if not take_lock(descriptor, directory):
            raise BlockingIOError
        yield
    finally:
        os.close(descriptor)


def progress_of(label: str, total: int) -> Callable[[int], None]:
    """Return a function that counts bytes and logs progress; workers can call it concurrently."""
    meter, lock = Progress(label, total / 1e6, "MB"), threading.Lock()

    @functools.wraps(meter.add)
    def add(num_bytes: int) -> None:
        with lock:
            meter.add(num_bytes / 1e6)

    return add
