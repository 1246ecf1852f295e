"""A one-page report of one or several stages: `report.md` with its charts, from run directories alone."""

import statistics
from collections.abc import Sequence
from pathlib import Path

from megatron_cpt.errors import DataError
from megatron_cpt.evaluate.models.forgetting import (
    compare_with_first,
    forgetting_table,
    markdown_table,
    results_from_json,
)
from megatron_cpt.evaluate.report.drawing import colours
from megatron_cpt.evaluate.report.plots import plot_blend, plot_forgetting, plot_training, plot_validation
from megatron_cpt.evaluate.report.stages import Stage, read_stages, setting
from megatron_cpt.evaluate.report.steps import STEP_FIELDS
from megatron_cpt.files import read_json, write_text
from megatron_cpt.log import format_count


def write_report(run_paths: Sequence[Path], output_dir: Path, evaluation_path: Path | None = None) -> Path:
    """Write charts and `report.md` into `output_dir`; return the page's path.

    Stages are shown in the order given; of several, those that have not trained yet are left out. `evaluation_path` is a
    file of `evaluate forgetting`.

    Raises: DataError when a run has no metrics or the evaluation is none.
    """
    stages = read_stages(run_paths, STEP_FIELDS, may_be_empty=len(run_paths) > 1)
    stages = [stage for stage in stages if stage.starts or stage.train]
    if not any(stage.train for stage in stages):
        raise DataError(f"{run_paths[0]}: metrics without a training step. Nothing to report yet. Train first.")
    results = [] if evaluation_path is None else results_from_json(read_json(evaluation_path, DataError))
    colour = colours([*(stage.name for stage in stages), *(result.model for result in results)])
    parts = [f"# {_title(stages)}", "## Stages", stage_table(stages), *_interruption_lines(stages)]

    plot_training(stages, colour, output_dir / "training.png")
    parts.append("![Training loss and learning rate over tokens](training.png)")
    if any(stage.blend for stage in stages):
        plot_blend(stages, output_dir / "blend.png")
        parts += ["## Blend", "![Tokens per corpus and stage](blend.png)"]
    if any(stage.validation for stage in stages):
        plot_validation(stages, colour, output_dir / "validation.png")
        parts += ["## Held-out text during training", "![Validation curves per corpus](validation.png)"]
    if results:
        changes = compare_with_first(results)
        plot_forgetting(changes, colour, output_dir / "forgetting.png")
        parts += [
            "## Learned and forgotten",
            f"Bits per byte on held-out text (lower is better), whole documents in windows of {results[0].context} "
            "tokens; intervals are 95 % bootstraps over documents, changes drawn in pairs.",
            forgetting_table(changes),
            "![Change in bits per byte](forgetting.png)",
        ]
    page = output_dir / "report.md"
    write_text(page, "\n\n".join(parts) + "\n")
    return page


def stage_table(stages: Sequence[Stage]) -> str:
    """Return a Markdown table with a row per stage: origin, length, loss, learning rate, speed, layouts."""
    heads = ["stage", "from", "tokens", "iterations", "loss", "peak lr", "last lr", "tokens/s", "layout", "end"]
    return markdown_table(heads, [_stage_row(stage) for stage in stages], num_left=2)


def _stage_row(stage: Stage) -> list[str]:
    layouts = list(dict.fromkeys(start.get("layout", "?") for start in stage.starts))
    origin = stage.parent or Path(str(setting(stage.config, "init.from_path") or "random weights")).name
    if not stage.train:
        return [stage.name, origin, "0", "0", "", "", "", "", ", then ".join(layouts), stage.end_reason or "running"]
    last = stage.train[-max(1, len(stage.train) // 25) :]
    speeds = [record["tokens_per_second"] for record in stage.train if record.get("tokens_per_second")]
    return [
        stage.name,
        origin,
        format_count(stage.tokens),
        str(stage.train[-1]["iteration"]),
        f"{statistics.fmean(record['loss'] for record in last):.3f}",
        f"{max(record['lr'] for record in stage.train):.2e}",
        f"{stage.train[-1]['lr']:.2e}",
        format_count(statistics.median(speeds)) if speeds else "",
        ", then ".join(layouts),
        stage.end_reason or "no end record",
    ]


def _interruption_lines(stages: Sequence[Stage]) -> list[str]:
    lines = [
        f"- `{stage.name}` was stopped ({found.reason}) after {found.stopped_tokens:,} tokens on {found.layout_before} and "
        f"continued from its checkpoint at {found.resumed_tokens:,} tokens on {found.layout_after}."
        for stage in stages
        for found in stage.interruptions
    ]
    lines += [
        f"- {len(stage.not_finite)} logged steps of `{stage.name}` had no finite loss and changed nothing."
        for stage in stages
        if stage.not_finite
    ]
    return ["\n".join(lines)] if lines else []


def _title(stages: Sequence[Stage]) -> str:
    task = setting(stages[0].config, "task")
    names = ", ".join(stage.name for stage in stages)
    return f"{task}: {names}" if task else names
