"""mergekit for every method but the plain mean: its configuration written, its program run, its exit code checked.

mergekit drops tensors that only some models have without a word, and stops at others; the models are compared first here,
and the outcome is written into `merge_info.json`. Relative paths make it look for a model on the hub, so all are absolute.
"""

import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from megatron_cpt.checkpoint.huggingface.folder import HFFolder
from megatron_cpt.checkpoint.soup.mean import (
    MERGE_INFO,
    check_mergeable,
    compare_models,
    merge_info,
    normalised_weights,
    summary,
)
from megatron_cpt.config.loading.sources import read_yaml
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
            {"model": os.fspath(path.resolve()), "parameters": {"weight": share}}
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
        config["base_model"] = os.fspath(base.resolve())
        if method in OF_TWO:
            config["models"].insert(0, {"model": config["base_model"]})
    if parameters:
        config["parameters"] = parameters
    return config


def run_mergekit(config: dict[str, Any] | Path, output: Path, *, allow: Sequence[str] = ()) -> Path:
    """Run `mergekit-yaml` of this Python environment; return `output`, whole or not there at all.

    Raises: CheckpointError with mergekit's last lines when it fails, or when its output is no model.
    """
    settings = read_yaml(config) if isinstance(config, Path) else config
    paths = [Path(name) for name in _model_names(settings)]
    folders = [HFFolder(path) for path in dict.fromkeys(paths)]
    comparison = compare_models(folders)
    check_mergeable(folders, comparison, allow)
    with whole_dir(output) as directory, tempfile.TemporaryDirectory() as scratch:
        recipe = Path(scratch) / "merge.yaml"
        recipe.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
        command = [_mergekit(), os.fspath(recipe), os.fspath(directory.resolve()), "--quiet"]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if line.strip()]
            raise CheckpointError(
                f"mergekit-yaml: left with {done.returncode}: {' '.join(lines[-3:])[:600]}. Mend the merge configuration."
            )
        HFFolder(directory)
        shutil.copyfile(recipe, directory / "mergekit_config.yml")
        shares = [float((entry.get("parameters") or {}).get("weight", 1)) for entry in settings.get("models") or []]
        write_json(
            directory / MERGE_INFO,
            merge_info(folders, shares, settings["merge_method"], comparison, engine="mergekit"),
        )
    logger.info("%s: %s, %s", output, settings["merge_method"], summary(comparison, len(folders)))
    return output


def _model_names(settings: dict[str, Any]) -> list[str]:
    """Return the models of a mergekit configuration, base first, whichever of its three forms it uses."""
    entries = [settings["base_model"]] if settings.get("base_model") else []
    entries += [entry["model"] for entry in settings.get("models") or []]
    for part in settings.get("slices") or []:
        entries += [source["model"] for source in part["sources"]]
    return [os.fspath(entry["model"]["path"]) if isinstance(entry, dict) else str(entry) for entry in entries]


def _mergekit() -> str:
    beside = Path(sys.executable).parent / "mergekit-yaml"
    found = os.fspath(beside) if beside.exists() else shutil.which("mergekit-yaml")
    if found is None:
        raise CheckpointError(
            "mergekit-yaml: not installed in this environment. Install mergekit, or use --method average."
        )
    return found
