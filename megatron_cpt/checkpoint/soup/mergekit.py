"""mergekit for every method but the plain mean: its configuration written, its program run, its exit code checked.

mergekit drops tensors that only some models have without a word, and stops at others; the models are compared first here,
and the outcome is written into `merge_info.json`. Relative paths make it look for a model on the hub, so all are absolute.
"""

import copy
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from megatron_cpt.checkpoint.huggingface.folder import HFFolder
from megatron_cpt.checkpoint.huggingface.write_config import portable_config
from megatron_cpt.checkpoint.soup.mean import (
    MERGE_INFO,
    check_mergeable,
    compare_models,
    is_merged,
    merge_info,
    normalised_weights,
    summary,
)
from megatron_cpt.errors import CheckpointError
from megatron_cpt.files import whole_dir, write_json

logger = logging.getLogger(__name__)

WEIGHTLESS = frozenset("slerp model_stock nearswap ram ramplus_tl sce arcee_fusion karcher passthrough".split())
"""Methods of mergekit 0.1.5 that take no weight per model; all others need one."""
WITHOUT_BASE = frozenset(("linear", "karcher", "passthrough"))
"""Methods that know no base model: a base is one more model there."""
OF_TWO = frozenset(("slerp", "nearswap", "arcee_fusion"))
"""Methods of a base and one other model, which list the base among the models."""


def mergekit_config(
    models: Sequence[Path],
    *,
    method: str = "linear",
    weights: Sequence[float] | None = None,
    base: Path | None = None,
    parameters: dict[str, float | bool] | None = None,
    dtype: str = "bfloat16",
) -> dict[str, Any]:
    """Return a mergekit configuration with absolute paths, computing in float32.

    `base` is one more model where the method knows no base, and else its `base_model`.
    """
    joins = base is not None and method in WITHOUT_BASE
    included = [base, *models] if base is not None and joins else list(models)
    shares = normalised_weights(included, weights, has_base=joins)
    config: dict[str, Any] = {
        "merge_method": method,
        "models": [
            {"model": _with_absolute_path(os.fspath(path)), "parameters": {"weight": share}}
            for path, share in zip(included, shares, strict=True)
        ],
        "dtype": "float32",
        "out_dtype": dtype,
    }
    if method in WEIGHTLESS:
        if weights is not None:
            raise CheckpointError(f"--weights: {method} takes no weight per model. Leave --weights out.")
        for model in config["models"]:
            model.pop("parameters")
    if base is not None and not joins:
        config["base_model"] = _with_absolute_path(os.fspath(base))
        if method in OF_TWO:
            config["models"].insert(0, {"model": config["base_model"]})
    if parameters:
        config["parameters"] = parameters
    return config


def run_mergekit(config: dict[str, Any] | Path, output: Path, *, allow: Sequence[str] = ()) -> Path:
    """Run `mergekit-yaml` of this Python environment; return `output`, whole or not there at all.

    Raises: CheckpointError with mergekit's last lines when it fails, or when its output is no model.
    """
    settings = _absolute(_read(config) if isinstance(config, Path) else config)
    references = model_references(settings)
    folders = [HFFolder(path) for path in references]
    comparison = compare_models(folders)
    changes_tokenizer = bool(settings.get("tokenizer") or settings.get("tokenizer_source"))
    allow = [*allow, *(("mismatched", "tokenizer") if changes_tokenizer else ())]
    check_mergeable(folders, comparison, allow, but=("vocab_size",) if changes_tokenizer else ())
    # before the merge: a record that cannot be made costs nothing then
    record = merge_info(
        folders, list(references.values()), str(settings.get("merge_method")), comparison, engine="mergekit"
    ) | {"recipe": settings}
    if is_merged(output, record):
        return output
    with whole_dir(output) as directory, tempfile.TemporaryDirectory() as scratch:
        recipe = Path(scratch) / "merge.yaml"
        recipe.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
        command = [_mergekit(), os.fspath(recipe), os.fspath(directory.resolve()), "--quiet"]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, stdin=subprocess.DEVNULL)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if line.strip()]
            raise CheckpointError(
                f"mergekit-yaml: left with {done.returncode}: {' '.join(lines[-3:])[:600]}. Correct the merge configuration."
            )
        merged = HFFolder(directory)
        write_json(directory / "config.json", portable_config(merged.config))
        shutil.copyfile(recipe, directory / "mergekit_config.yml")
        write_json(directory / MERGE_INFO, record)
    logger.info("%s: %s, %s", output, settings["merge_method"], summary(comparison, len(folders)))
    return output


def model_references(settings: dict[str, Any]) -> dict[Path, Any]:
    """Return the folder of each model of a mergekit configuration, base first, and its weight as written: a number, a
    gradient, a list with filters, or None where the method's own settings hold.

    Raises: CheckpointError for a configuration that names no models.
    """
    found: dict[Path, Any] = {}
    for owner, key in _entries(settings):
        path = _local_path(owner[key])
        weight = (owner.get("parameters") or {}).get("weight") if key == "model" else None
        if found.get(path) is None:
            found[path] = weight
        elif weight is not None and weight != found[path]:
            found[path] = [found[path], weight]  # one model in several slices
    if not found:
        raise CheckpointError("mergekit configuration: names no models, slices or modules. Name at least one model.")
    return found


def _read(path: Path) -> dict[str, Any]:
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as problem:
        raise CheckpointError(
            f"{path}: cannot be read ({' '.join(str(problem).split())[:200]}). A mergekit configuration is needed."
        ) from None
    if not isinstance(settings, dict):
        raise CheckpointError(
            f"{path}: holds no mapping. A mergekit configuration (merge_method, models ...) is needed."
        )
    return settings


def _entries(settings: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield (mapping, key) of every place of a configuration that names a model."""
    if settings.get("base_model"):
        yield settings, "base_model"
    for entry in settings.get("models") or []:
        yield entry, "model"
    for part in settings.get("slices") or []:
        if part.get("base_model"):
            yield part, "base_model"
        for entry in part.get("sources") or []:
            yield entry, "model"
    for module in (settings.get("modules") or {}).values():
        yield from _entries(module)


def _absolute(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration with the folders as absolute paths; mergekit looks relative ones up on the hub at its end."""
    settings = copy.deepcopy(settings)
    try:
        for owner, key in _entries(settings):
            owner[key] = _with_absolute_path(owner[key])
        source = settings.get("tokenizer_source")
        if source not in (None, "union", "base"):
            settings["tokenizer_source"] = _with_absolute_path(source)
    except (AttributeError, KeyError, TypeError) as problem:
        raise CheckpointError(
            f"mergekit configuration: a model is not where mergekit has one ({type(problem).__name__}: {problem}). See its "
            "documentation for models, slices and modules."
        ) from None
    return settings


def _with_absolute_path(reference: Any) -> Any:
    if isinstance(reference, str):
        if Path(reference).is_dir() and any(letter in reference for letter in "+@"):
            return {"model": {"path": _resolved(reference)}}  # mergekit would read a LoRA or a revision into the name
        return "+".join(_resolved(part) for part in reference.split("+"))
    inner = {key: reference[key] for key in ("model", "lora", "path") if reference.get(key)}
    changed = {
        key: _resolved(value) if isinstance(value, str) else _with_absolute_path(value) for key, value in inner.items()
    }
    return {**reference, **changed}


def _resolved(name: str) -> str:
    path = Path(name)
    return os.fspath(path.resolve()) if path.exists() else name


def _local_path(reference: Any) -> Path:
    """Return the folder of a reference: a path, `path+lora`, `path@revision`, or mergekit's mappings of these."""
    while isinstance(reference, dict):
        reference = reference.get("model") or reference.get("path")
    name = str(reference)
    path = next((Path(part) for part in (name, name.split("+")[0], name.split("@")[0]) if Path(part).is_dir()), None)
    if path is None:
        raise CheckpointError(
            f"mergekit configuration: {name} is no folder here. Models are not fetched while merging. Fetch it first "
            "(megatron-cpt hub download) and name its folder."
        )
    return path


def _mergekit() -> str:
    beside = Path(sys.executable).parent / "mergekit-yaml"
    found = os.fspath(beside) if beside.exists() else shutil.which("mergekit-yaml")
    if found is None:
        raise CheckpointError(
            "mergekit-yaml: not installed in this environment. Install mergekit, or use --method average."
        )
    return found
