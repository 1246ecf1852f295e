"""Results that are kept: a model is measured on a text set again only where one of them, or the way to measure, changed.

A results file records under `inputs` what each of its results was made of: the files of the model and of the text set
(name, size, time of modification; for a Megatron checkpoint its manifest, which holds the hashes), the tokenizer, and the
options of the measurement.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_cpt.checkpoint.torch_dist.mcore import MANIFEST, iteration_of, newest_good_checkpoint
from megatron_cpt.data.reading.documents import list_sources
from megatron_cpt.errors import CptError
from megatron_cpt.evaluate.models.folders import is_mcore_checkpoint
from megatron_cpt.evaluate.models.forgetting import results_from_json
from megatron_cpt.evaluate.models.perplexity import Perplexity
from megatron_cpt.files import file_hash, read_json, text_hash

Inputs = dict[str, dict[str, Any]]
"""`models`, `texts` and `options`: name -> identity."""


def measured_inputs(
    models: Mapping[str, Path], texts: Mapping[str, Sequence[Path]], tokenizer: Path | None, options: Mapping[str, Any]
) -> Inputs:
    """Return what results on these models and text sets are made of.

    Raises: DataError when a text set has no file.
    """
    return {
        "models": {name: _model_identity(path) for name, path in models.items()},
        "texts": {
            name: text_hash(json.dumps([source.identity() for source in list_sources(paths)]))
            for name, paths in texts.items()
        },
        "options": {**options, "tokenizer": None if tokenizer is None else _folder_identity(tokenizer)},
    }


def kept_results(path: Path | None, inputs: Inputs) -> dict[tuple[str, str], Perplexity]:
    """Return (model, text set) -> its result in the results file `path`, where it was made of the same inputs."""
    try:
        stored = read_json(path) if path is not None and path.is_file() else {}
        before = stored.get("inputs") or {}
        results = results_from_json(stored) if before else []
    except (CptError, AttributeError):  # damaged, or of another kind: it is measured and written again
        return {}
    if before.get("options") != inputs["options"]:
        return {}
    return {
        (result.model, result.text): result
        for result in results
        if before["models"].get(result.model) == inputs["models"].get(result.model)
        and before["texts"].get(result.text) == inputs["texts"].get(result.text)
    }


def _model_identity(path: Path) -> str:
    if not is_mcore_checkpoint(path):
        return _folder_identity(path)
    directory = path if iteration_of(path) is not None else newest_good_checkpoint(path, "size") or path
    manifest = directory / MANIFEST
    return file_hash(manifest) if manifest.is_file() else _folder_identity(directory)


def _folder_identity(path: Path) -> str:
    """Return a hash of the names, sizes and times of a folder's files, or of a file."""
    files = sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else [path]
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.exists()]
    return text_hash(json.dumps(stats))
