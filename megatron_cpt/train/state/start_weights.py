"""Sources of a stage's initial weights: a Hugging Face folder, a Megatron checkpoint, or another variant's run."""

import dataclasses
import logging
from pathlib import Path

from megatron_cpt.checkpoint.convert.choices import ImportChoices
from megatron_cpt.checkpoint.convert.hf_mcore import hf_to_mcore
from megatron_cpt.checkpoint.foreign.convert import foreign_to_mcore
from megatron_cpt.checkpoint.foreign.opening import foreign_format, is_loadable
from megatron_cpt.checkpoint.torch_dist.mcore import (
    MANIFEST,
    checkpoint_dir,
    find_checkpoint,
    read_manifest,
    verify_checkpoint,
)
from megatron_cpt.config.settings.schema import RunConfig
from megatron_cpt.errors import CheckpointError
from megatron_cpt.run.directory import RunDir, run_dir

logger = logging.getLogger(__name__)


def initial_checkpoint(config: RunConfig, run: RunDir) -> Path | None:
    """Return the verified checkpoint folder that `init.from_path` means, None when it is not set.

    A Hugging Face folder, or a checkpoint of Megatron-LM or DeepSpeed that training cannot read directly (torch format,
    universal, stacked layers, no manifest), is converted into `<run>/init` first (once), including its optimizer state
    if init.load is full. Raises: CheckpointError.
    """
    text = config.init.from_path
    if text is None:
        return None
    if text.startswith("variant:"):
        return _variant_checkpoint(config, text)
    path = Path(text)
    if (path / "config.json").exists():
        if config.init.load == "full":
            raise CheckpointError(f"{path}: a Hugging Face folder holds weights only. Use init.load=weights.")
        converted = hf_to_mcore(  # once: what was made of the same weights stays, what was made of others is refused
            path,
            run.path / "init",
            model=config.model,
            options=ImportChoices(
                make_vocab_size_divisible_by=config.model.make_vocab_size_divisible_by,
                ignore_config=config.init.ignore_config,
                skip_tensors=config.init.skip_tensors,
            ),
        )
        return find_checkpoint(converted, config.checkpoint.verify_on_load)
    foreign = foreign_format(path)
    if foreign is not None and _is_to_be_converted(*foreign, config):
        logger.info("%s: %s made elsewhere, converted into %s first", foreign[1], foreign[0], run.path / "init")
        foreign_to_mcore(
            foreign[1], run.path / "init", config.model, optimizer="needed" if config.init.load == "full" else "none"
        )
        return find_checkpoint(checkpoint_dir(run.path / "init", "release"), config.checkpoint.verify_on_load)
    return find_checkpoint(path, config.checkpoint.verify_on_load)


def _is_to_be_converted(kind: str, directory: Path, config: RunConfig) -> bool:
    if kind != "torch_dist":
        return True
    if not (directory / MANIFEST).exists():
        is_ours = any(directory.parent.glob(f"*/{MANIFEST}"))  # then it is damaged or unfinished, not foreign
        return not is_ours
    return read_manifest(directory).get("source") == {"kind": "adopted"} and not is_loadable(directory, config.model)


def _variant_checkpoint(config: RunConfig, text: str) -> Path:
    name, _, iteration = text.removeprefix("variant:").partition("@")
    if name == config.variant:
        raise CheckpointError(f"init.from_path: {text} names the run itself. Name another variant.")
    root = run_dir(dataclasses.replace(config, variant=name)).checkpoints
    if not root.exists():
        raise CheckpointError(
            f"{root}: no such folder. Variant {config.variant} starts from {name}. Train {name} first."
        )
    if not iteration:
        return find_checkpoint(root, config.checkpoint.verify_on_load)
    if not iteration.isdigit():
        raise CheckpointError(f"init.from_path: {text}: {iteration!r} is no iteration. Write variant:{name}@1000.")
    directory = checkpoint_dir(root, int(iteration))
    verify_checkpoint(directory, config.checkpoint.verify_on_load)
    return directory
