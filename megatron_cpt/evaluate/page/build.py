"""Write `report.html`: one file with its data, style and scripts inside, readable over file:// without a network.

uPlot (MIT, `assets/uPlot.LICENSE`) draws the curves; the rest is a jinja2 template. Nothing here needs torch or matplotlib, so
that a training run can rewrite its page at each evaluation.
"""

import bisect
import importlib.resources
import json
import logging
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from megatron_cpt.evaluate.page import gather
from megatron_cpt.evaluate.page.curves import TRAIN_FIELDS, points_per_stage, train_curves, validation_curves
from megatron_cpt.evaluate.page.measured import measured
from megatron_cpt.evaluate.report.stages import Stage, read_stages, setting, short_layouts
from megatron_cpt.files import write_text
from megatron_cpt.log import format_count, format_seconds
from megatron_cpt.run.directory import RunDir

logger = logging.getLogger(__name__)

# Okabe and Ito's palette without its black and yellow, its blue lighter: readable on white and on near black.
COLOURS = ("#1F83C6", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#B2456E", "#7A7A7A")
MOST_SAVES_MARKED = 60


def write_page(
    run_paths: Sequence[Path],
    page: Path,
    *,
    evaluation_path: Path | None = None,
    sample_paths: Sequence[Path] = (),
    title: str | None = None,
) -> Path:
    """Write the page of one or several run directories to the file `page`; return its path.

    Evaluations and samples below a run's `report` folder are shown without being named.

    Raises: DataError when a run's metrics are damaged, or an evaluation or a file of samples is none.
    """
    stages = read_stages(run_paths, TRAIN_FIELDS, may_be_empty=True)
    most = points_per_stage(len(stages))
    runs = [
        _run(stage, page.parent, COLOURS[index % len(COLOURS)], shown_above=evaluation_path)
        for index, stage in enumerate(stages)
    ]
    data = {"runs": [_curves(stage, run, most) for stage, run in zip(stages, runs, strict=True)]}
    write_text(
        page,
        _template().render(
            title=title or _title(stages),
            written=time.strftime("%Y-%m-%d %H:%M:%S"),
            runs=runs,
            evaluation=measured(evaluation_path) if evaluation_path else None,
            samples=gather.sample_sets(sample_paths),
            corpora=list(dict.fromkeys(corpus for run in data["runs"] for corpus in run["validation"])),
            # `<` could end the script element
            data=json.dumps(data, separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c"),
            style=_asset("uPlot.min.css") + _asset("page.css"),
            script=_asset("uPlot.iife.min.js") + _asset("page.js"),
        ),
    )
    return page


class LivePage:
    """Rewrites a running stage's page, at most a hundredth of the time, and never stops the run over it.

    On ranks that do not write it does nothing.
    """

    def __init__(self, run: RunDir, *, is_writer: bool):
        self._run = run
        self._is_writer = is_writer
        self._next = 0.0

    def rewrite(self, *, is_last: bool = False) -> None:
        """Write the page; unless it is the last one not when that took long a short while ago."""
        started = time.monotonic()
        if not self._is_writer or (started < self._next and not is_last):
            return
        page = self._run.report / "report.html"
        try:
            write_page([self._run.path], page)
        # whatever is wrong with a page, a run that trains is worth more than it
        except Exception as problem:
            logger.warning("%s: not written (%s: %s)", page, type(problem).__name__, problem)
        now = time.monotonic()
        self._next = now + 100 * (now - started)


def _run(stage: Stage, page_dir: Path, colour: str, shown_above: Path | None) -> dict[str, Any]:
    run = RunDir(stage.path)
    last = stage.train[-1] if stage.train else {}
    speeds = [record["tokens_per_second"] for record in stage.train[-50:] if record.get("tokens_per_second")]
    jobs = gather.job_rows(run, page_dir)
    evaluations = [path for name in ("forgetting", "perplexity") for path in sorted(run.report.glob(f"**/{name}.json"))]
    evaluations = [path for path in evaluations[:1] if shown_above is None or path.resolve() != shown_above.resolve()]
    return {
        "name": stage.name,
        "colour": colour,
        "path": str(stage.path),
        "state": _state(stage, jobs),
        "origin": stage.parent or Path(str(setting(stage.config, "init.from_path") or "random weights")).name,
        "tokens": format_count(stage.tokens),
        "iteration": last.get("iteration", 0),
        "loss": f"{statistics.fmean(record['loss'] for record in stage.train[-10:]):.4f}" if stage.train else "",
        "lr": f"{last['lr']:.3g}" if "lr" in last else "",
        "speed": f"{format_count(statistics.median(speeds))} tokens/s" if speeds else "",
        "left": format_seconds(last["eta_seconds"]) if last.get("eta_seconds") and not stage.end_reason else "",
        "layouts": list(dict.fromkeys(start.get("layout", "?") for start in stage.starts)),
        "not_finite": len(stage.not_finite),
        "marks": marks(stage),
        "jobs": jobs,
        "checkpoints": gather.checkpoint_rows(run, page_dir),
        "blend": gather.blend_rows(run, stage),
        "settings": gather.setting_rows(run),
        "environment": gather.environment_rows(run),
        "samples": gather.sample_sets(sorted(run.report.glob("**/samples*.json"))),
        "evaluations": [measured(path) for path in evaluations],
    }


def marks(stage: Stage) -> list[dict[str, Any]]:
    """Return what happened to a stage and where: restarts, changes of the layout, spikes, saves."""
    found = []
    for one in stage.interruptions:
        before, after = short_layouts(one.layout_before, one.layout_after)
        is_other = before != after
        text = f"{one.reason} at {format_count(one.stopped_tokens)}, resumed from {format_count(one.resumed_tokens)} tokens"
        found.append(
            {
                "kind": "layout" if is_other else "restart",
                "tokens": stage.offset_tokens + one.resumed_tokens,
                "text": f"{text}, {before} → {after}" if is_other else text,
            }
        )
    for record in stage.spikes:
        text = f"loss spike: {record.get('loss')} where {record.get('median')} is usual"
        found.append({"kind": "spike", "tokens": stage.offset_tokens + record.get("consumed_tokens", 0), "text": text})
    if stage.train and len(stage.saves) <= MOST_SAVES_MARKED:
        logged = [record["iteration"] for record in stage.train]
        for record in stage.saves:
            nearest = stage.train[min(bisect.bisect_left(logged, record["iteration"]), len(logged) - 1)]
            text = f"checkpoint {record['iteration']}, {record.get('seconds', '?')} s"
            place = stage.offset_tokens + nearest["consumed_tokens"]
            found.append({"kind": "save", "tokens": place, "text": text})
    return found


def _curves(stage: Stage, run: dict[str, Any], most: int) -> dict[str, Any]:
    tokens = [stage.offset_tokens + record["consumed_tokens"] for record in stage.train]
    begin = next((record["time"] for record in [*stage.starts, *stage.train] if record.get("time")), None)
    for mark in run["marks"]:  # the other axes of the page
        index = min(bisect.bisect_left(tokens, mark["tokens"]), len(tokens) - 1)
        nearest = stage.train[index] if tokens else {}
        mark["iteration"] = nearest.get("iteration")
        mark["hours"] = (nearest["time"] - begin) / 3600 if begin and nearest.get("time") else None
    return {
        "name": run["name"],
        "colour": run["colour"],
        "train": train_curves(stage, most) if stage.train else {},
        "validation": validation_curves(stage, most),
        "marks": run["marks"],
    }


def _state(stage: Stage, jobs: list[dict[str, Any]]) -> str:
    if stage.end_reason:
        return stage.end_reason
    if stage.train:
        return "running" if any(job["state"] == "running" for job in jobs) else "no end record"
    return jobs[-1]["state"] if jobs else "not started"


def _title(stages: Sequence[Stage]) -> str:
    task = next((setting(stage.config, "task") for stage in stages if setting(stage.config, "task")), None)
    if len(stages) == 1:
        return f"{task}: {stages[0].name}" if task else stages[0].name
    return str(task or "runs")


def _template() -> Any:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(_asset("report.html.j2"))


def _asset(name: str) -> str:
    folder = importlib.resources.files("megatron_cpt.evaluate.page") / "assets"
    return (folder / name).read_text(encoding="utf-8")
