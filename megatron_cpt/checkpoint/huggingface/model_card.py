"""The model card of a trained model, from the records of its export: base, data, tokens, schedule, evaluation, licence.

`training_record` is written into `conversion.json` when a checkpoint of a run is exported; `model_card` turns it into
the README.md that a push sends where the folder has none. `without_local_paths` removes this machine's folders from the
card.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from megatron_cpt.checkpoint.huggingface.companion_files import BASE_CARD
from megatron_cpt.checkpoint.huggingface.options import CONVERSION
from megatron_cpt.errors import CheckpointError
from megatron_cpt.files import read_json
from megatron_cpt.log import format_count

_LOCAL = re.compile(r"(?:[A-Za-z]:)?[/\\](?:[^/\\\s]+[/\\])+[^/\\\s]*|~[/\\]\S*|\.{1,2}[/\\]\S*")
"""A path of a file system: at least one folder and a name behind a slash, or a start at home or here."""
_TEXTS = (".json", ".yml", ".yaml")
_LARGEST_TEXT_BYTES = 64 << 20


def training_record(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return the card's data about a run's checkpoint, empty for a checkpoint that no training wrote."""
    config = manifest.get("config")
    if not config:
        return {}
    training, optimizer, schedule = (config.get(section) or {} for section in ("training", "optimizer", "schedule"))
    return {
        "training": {
            "task": config.get("task"),
            "params": config.get("params"),
            "variant": config.get("variant"),
            "iteration": manifest.get("iteration"),
            "tokens": manifest.get("consumed_tokens"),
            "tokens_per_corpus": manifest.get("tokens_per_corpus") or {},
            "seq_length": training.get("seq_length"),
            "global_batch_size": training.get("global_batch_size"),
            "precision": training.get("precision"),
            "lr": optimizer.get("lr"),
            "min_lr": optimizer.get("min_lr"),
            "schedule": {key: value for key, value in schedule.items() if value},
            "base": (manifest.get("hf") or {}).get("_name_or_path"),
        }
    }


def model_card(folder: Path, *, base: str | None = None, evaluation: Path | None = None) -> str:
    """Return a card for the model in `folder`. `base` names its base model; `evaluation` is a Markdown report to quote.

    Raises: CheckpointError when the report cannot be read.
    """
    record = read_json(folder / CONVERSION, CheckpointError) if (folder / CONVERSION).is_file() else {}
    facts = record.get("training") or {}
    front = _front_matter(folder / BASE_CARD)
    base = base or front.get("base_name") or _public_name(facts.get("base"))
    licence = front.get("license")
    head: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    head |= {"license": licence} if licence else {}
    head |= {"base_model": base} if base else {}
    head |= {"language": front["language"]} if front.get("language") else {}
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n\n# {folder.name}",
        f"A language model, continued from {base}." if base else "A language model. Its base model is not on record.",
        _data(facts.get("tokens_per_corpus") or {}),
        _training(facts),
        f"## Evaluation\n\n{_report(evaluation)}",
        f"## Licence\n\nThe base model's licence is {licence}."
        if licence
        else "## Licence\n\nThe base model's licence is not on record here. See the base model.",
    ]
    if any(folder.glob("LICENSE*")):
        parts[-1] += " Its text is in this repository (LICENSE)."
    return "\n\n".join(part for part in parts if part) + "\n"


def without_local_paths(folder: Path, names: list[str]) -> dict[str, bytes]:
    """Return name -> content of the files among `names` that hold paths of this machine, with the last part of each only."""
    changed = {}
    for name in names:
        file = folder / name
        if file.suffix not in _TEXTS or file.name.startswith("tokenizer.") or file.stat().st_size > _LARGEST_TEXT_BYTES:
            continue
        text = file.read_text(encoding="utf-8", errors="surrogateescape")
        try:
            content = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
        except (ValueError, yaml.YAMLError):
            continue  # not for us to judge: it goes as it is
        public = _public(content)
        if public != content:
            is_json = file.suffix == ".json"
            written = (
                json.dumps(public, indent=2, ensure_ascii=False) if is_json else yaml.safe_dump(public, sort_keys=False)
            )
            changed[name] = (written + "\n").encode("utf-8", errors="surrogateescape")
    return changed


def _public(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _public(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_public(part) for part in value]
    if isinstance(value, str) and _LOCAL.fullmatch(value):
        return re.split(r"[/\\]", value.rstrip("/\\"))[-1]
    return value


def _public_name(name: Any) -> str | None:
    return name if isinstance(name, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", name) else None


def _front_matter(card: Path) -> dict[str, Any]:
    """Return the settings at the head of the base model's card, empty where there are none."""
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    match = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    try:
        head = yaml.safe_load(match[1]) if match else {}
    except yaml.YAMLError:
        head = {}
    return head if isinstance(head, dict) else {}


def _data(tokens_per_corpus: Mapping[str, int]) -> str:
    if not tokens_per_corpus:
        return "## Data\n\nThe data are not on record."
    total = sum(tokens_per_corpus.values()) or 1
    rows = [
        f"| {_public(name)} | {count:,} | {100 * count / total:.1f} % |"
        for name, count in sorted(tokens_per_corpus.items())
    ]
    return "\n".join(["## Data", "", "| corpus | tokens | share |", "|---|---:|---:|", *rows])


def _training(facts: Mapping[str, Any]) -> str:
    if not facts:
        return ""
    schedule = ", ".join(f"{key} {value}" for key, value in (facts.get("schedule") or {}).items())
    lines = [
        f"- {format_count(facts.get('tokens') or 0)} tokens in {facts.get('iteration')} iterations of "
        f"{facts.get('global_batch_size')} sequences of {facts.get('seq_length')} tokens, {facts.get('precision')}",
        f"- learning rate {facts.get('lr')} to {facts.get('min_lr')}: {schedule or 'constant'}",
        "- trained with megatron-cpt",
    ]
    return "\n".join(["## Training", "", *lines])


def _report(evaluation: Path | None) -> str:
    if evaluation is None:
        return "No results were given."
    try:
        return evaluation.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as problem:
        raise CheckpointError(f"{evaluation}: cannot be read ({problem}). A Markdown report is needed.") from None
