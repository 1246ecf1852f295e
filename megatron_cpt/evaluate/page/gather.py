"""Content of a run directory other than its curves: jobs, checkpoints, exports, soups, blend, samples, settings,
environment."""

import os
import re
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import quote

from megatron_cpt.errors import DataError
from megatron_cpt.evaluate.report.stages import Stage
from megatron_cpt.files import read_json
from megatron_cpt.log import format_bytes, format_count, format_seconds
from megatron_cpt.run.directory import RunDir
from megatron_cpt.run.ledger import read_jobs

_SETTING = re.compile(r"  (?P<key>\w+): (?P<value>.*?)  # (?P<origin>.*)")


def job_rows(run: RunDir, page_dir: Path) -> list[dict[str, Any]]:
    """Return the run's jobs as the ledger knows them, oldest first; the scheduler is not asked."""
    rows = []
    for job, record in read_jobs(run.jobs).items():
        if "/" in job:  # a task of an array
            continue
        begin, last = record.get("submitted"), record.get("time")
        state = str(record.get("state", "unknown"))
        log_dir = Path(str(record["log_dir"])) if record.get("log_dir") else None
        rows.append(
            {
                "job": job,
                "stage": str(record.get("name") or record.get("stage", "?")),
                "state": state,
                "submitted": _clock(begin),
                "took": format_seconds(last - begin)
                if begin and last and state not in ("submitted", "running")
                else "",
                "restarts": record.get("restarts") or 0,
                "exit_code": record.get("exit_code"),
                "reason": str(record.get("reason") or ""),
                "logs": _links(sorted(log_dir.iterdir()), page_dir) if log_dir and log_dir.is_dir() else [],
            }
        )
    return rows


def checkpoint_rows(run: RunDir, page_dir: Path) -> list[dict[str, Any]]:
    """Return kept checkpoints, Hugging Face exports and soups with their sizes."""
    rows = []
    for folder in sorted(run.checkpoints.glob("iter_*")):
        manifest = _json(folder / "manifest.json")
        if manifest is None:
            continue
        size = sum(entry.get("bytes", 0) for entry in (manifest.get("files") or {}).values())
        tokens = format_count(manifest.get("consumed_tokens") or 0)
        rows.append(
            _folder_row("checkpoint", folder, page_dir, size, f"{tokens} tokens, {manifest.get('content', '')}")
        )
    for folder in sorted(run.checkpoints_hf.glob("iter_*")):
        if (folder / "config.json").is_file():
            rows.append(_folder_row("Hugging Face", folder, page_dir, _bytes_in(folder), ""))
    for info_path in sorted((run.path / "soup").glob("**/merge_info.json")):
        info = _json(info_path) or {}
        inputs = ", ".join(_model_name(str(part.get("path"))) for part in info.get("inputs", []))
        folder = info_path.parent
        rows.append(_folder_row("soup", folder, page_dir, _bytes_in(folder), f"{info.get('method', '')} of {inputs}"))
    return rows


def blend_rows(run: RunDir, stage: Stage) -> list[dict[str, Any]]:
    """Return the planned and the drawn amounts of each corpus at the newest checkpoint."""
    manifests = [_json(path) for path in sorted(run.checkpoints.glob("iter_*/manifest.json"))]
    newest = max(
        (manifest for manifest in manifests if manifest), key=lambda found: found.get("iteration") or 0, default={}
    )
    drawn: dict[str, int] = newest.get("tokens_per_corpus") or {}
    planned_total, drawn_total = sum(stage.blend.values()), sum(drawn.values())
    rows = []
    for corpus in [*stage.blend, *(name for name in drawn if name not in stage.blend)]:
        planned, given = stage.blend.get(corpus, 0), drawn.get(corpus)
        rows.append(
            {
                "corpus": corpus,
                "planned": planned,
                "planned_share": planned / planned_total if planned_total else 0.0,
                "drawn": given,
                "drawn_share": given / drawn_total if given is not None and drawn_total else None,
                "at_tokens": newest.get("consumed_tokens"),
            }
        )
    return rows


def sample_sets(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """Return the generated texts that `evaluate generate --output` wrote, each with prompts and a text per model.

    Raises: DataError when a file is something else.
    """
    sets = []
    for path in paths:
        content = read_json(path, DataError)
        try:
            models = list(content["texts"])
            prompts = [
                {"prompt": prompt, "texts": [content["texts"][model][index] for model in models]}
                for index, prompt in enumerate(content["prompts"])
            ]
        except (KeyError, TypeError, IndexError):
            raise DataError(f"{path}: not written by `evaluate generate --output`. Write it again.") from None
        sets.append({"models": models, "prompts": prompts})
    return sets


def setting_rows(run: RunDir) -> list[dict[str, str]]:
    """Return every setting of the run with its value and its origin."""
    if not run.config_path.is_file():
        return []
    section, rows = "", []
    for line in run.config_path.read_text(encoding="utf-8").splitlines():
        if line.endswith(":") and not line.startswith(" "):
            section = line[:-1]
        elif found := _SETTING.fullmatch(line):
            rows.append({"key": f"{section}.{found['key']}", "value": found["value"], "origin": found["origin"]})
    return rows


def environment_rows(run: RunDir) -> list[tuple[str, str]]:
    """Return the code revision and the machine record of the last start."""
    rows = []
    if run.revision_path.is_file():
        rows.append(("revision", run.revision_path.read_text(encoding="utf-8").strip()))
    found = _json(run.environment_path) or {}
    return rows + [(str(name), str(value)) for name, value in found.items()]


def link_to(path: Path, page_dir: Path) -> str:
    """Return a link from the page to a file or folder, relative, so that a moved run keeps its links."""
    return quote(os.path.relpath(path.absolute(), page_dir.absolute()))


def _folder_row(kind: str, folder: Path, page_dir: Path, size: int, note: str) -> dict[str, Any]:
    return {
        "kind": kind,
        "name": folder.name,
        "link": link_to(folder, page_dir),
        "size": format_bytes(size),
        "note": note,
    }


def _links(paths: Iterable[Path], page_dir: Path) -> list[dict[str, str]]:
    return [{"name": path.name, "link": link_to(path, page_dir)} for path in paths if path.is_file()]


def _model_name(path: str) -> str:
    return Path(path).name or path


def _bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _clock(seconds: float | None) -> str:
    return "" if seconds is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _json(path: Path) -> dict[str, Any] | None:
    """Return a file's JSON mapping; None where it is missing, being removed, or none: a page never stops a run."""
    try:
        value = read_json(path, DataError)
    except (DataError, OSError):
        return None
    return value if isinstance(value, dict) else None
