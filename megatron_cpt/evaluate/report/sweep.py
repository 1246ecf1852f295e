"""The comparison of a sweep's points: learning and forgetting of each, by the held-out losses measured during training.

`learned` is the mean change in bits per byte of the new corpora since before the point's first step, `forgot` that of
the old ones; below zero is better for both. A point is marked if no other one is better in both (the Pareto front); the
choice among the marked ones depends on the model's purpose.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.patheffects import withStroke

from megatron_cpt.errors import DataError
from megatron_cpt.evaluate.models.forgetting import markdown_table
from megatron_cpt.evaluate.report.drawing import PALETTE, STYLE, plt, save_chart
from megatron_cpt.evaluate.report.stages import read_stage
from megatron_cpt.evaluate.report.steps import STEP_FIELDS
from megatron_cpt.files import read_json_object, write_json, write_text


@dataclass(frozen=True, kw_only=True)
class SweepPoint:
    """One point with its metrics; changes are nan with fewer than two measurements."""

    label: str
    axes: dict[str, str]
    iteration: int
    train_iters: int
    loss: float
    """Mean training loss of the last twentieth."""
    changes: dict[str, float]
    """Corpus -> bits per byte now minus before the first step."""
    learned: float
    forgot: float
    learned_interval: tuple[float, float] | None = None
    """How far the 95 % interval goes below and above `learned`; None where `evaluate forgetting` did not measure the point."""
    forgot_interval: tuple[float, float] | None = None
    is_front: bool = False

    @property
    def is_finished(self) -> bool:
        """Whether the point came to its last iteration."""
        return self.iteration >= self.train_iters


def read_sweep(folder: Path) -> list[SweepPoint]:
    """Return the points of a sweep's folder in the order of the grid.

    Raises: DataError when the folder has no `sweep.json` or it is none.
    """
    content = read_json_object(folder / "sweep.json", DataError)
    try:
        points = [
            _read_point(folder / point["run"], point, content["old"], content["new"]) for point in content["points"]
        ]
    except (KeyError, TypeError) as problem:
        raise DataError(
            f"{folder / 'sweep.json'}: not written by `submit sweep` ({problem}). Submit it again."
        ) from None
    return [_marked(point, points) for point in points]


def write_sweep_report(folder: Path, output: Path) -> str:
    """Write `sweep.md`, `sweep.json` and `sweep.png` into `output`; return the table.

    Raises: DataError as `read_sweep`, and when no point has trained yet.
    """
    points = read_sweep(folder)
    if not any(point.iteration for point in points):
        raise DataError(f"{folder}: no point has trained yet. Nothing to compare. Wait for the jobs.")
    table = sweep_table(points)
    page = [
        f"# Sweep {folder.name}",
        "Change in bits per byte on held-out text since before the first step, measured during training (lower is better). "
        "`*`: no other point both learned more and forgot less.",
        table,
        _interval_note(points),
        "![Learned and forgotten](sweep.png)",
    ]
    plot_sweep(points, output / "sweep.png")
    write_json(output / "sweep.json", {"format": 1, "points": [_as_json(point) for point in points]})
    write_text(output / "sweep.md", "\n\n".join(page) + "\n")
    return table


def sweep_table(points: Sequence[SweepPoint]) -> str:
    """Return a Markdown table with a row per point."""
    axes = list(points[0].axes)
    corpora = list(dict.fromkeys(name for point in points for name in point.changes))
    heads = ["", *axes, *corpora, "learned", "forgot", "training loss", "state"]
    rows = []
    for point in points:
        state = "finished" if point.is_finished else f"{point.iteration} of {point.train_iters}"
        changes = [point.changes.get(name, math.nan) for name in corpora]
        rows.append(
            [
                "*" if point.is_front else "",
                *(point.axes[axis] for axis in axes),
                *(_signed(change) for change in (*changes, point.learned, point.forgot)),
                "" if math.isnan(point.loss) else f"{point.loss:.4f}",
                state,
            ]
        )
    return markdown_table(heads, rows, num_left=1 + len(axes))


def plot_sweep(points: Sequence[SweepPoint], path: Path) -> None:
    """Draw learned against forgotten, and, for a grid of two axes, each as a heat map over them."""
    known = [point for point in points if not math.isnan(point.learned + point.forgot)]
    axes = list(points[0].axes)
    is_grid = len(axes) == 2 and all(len({point.axes[axis] for point in points}) > 1 for axis in axes)
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(
            1, 3 if is_grid else 1, figsize=(12 if is_grid else 5.4, 3.8), squeeze=False, layout="constrained"
        )
        scatter = panels[0][0]
        for point in known:
            colour = PALETTE[1] if point.is_front else PALETTE[0]
            _draw_intervals(scatter, point, colour)
            scatter.plot(point.learned, point.forgot, marker="o" if point.is_finished else "x", color=colour, ls="")
            label = " / ".join(point.axes.values())
            place, edge = (point.learned, point.forgot), [withStroke(linewidth=2, foreground="white")]
            scatter.annotate(label, place, (5, 4), textcoords="offset points", fontsize=7.5, path_effects=edge)
        scatter.axhline(0, color="#888888", linewidth=0.8)
        scatter.margins(0.18)
        names = " / ".join(axis.rpartition(".")[2] for axis in axes)
        scatter.set_title(f"{names} (blue: none is better in both)")
        scatter.set_xlabel("change on new data, bits per byte (left: learned)")
        scatter.set_ylabel("change on old data (up: forgot)")
        figure.supxlabel(_interval_note(points).replace("`", ""), fontsize=7)
        for panel, name in zip(panels[0][1:], ("learned", "forgot"), strict=False):
            _heat_map(panel, points, axes, name)
        save_chart(figure, path)


def _draw_intervals(scatter: Axes, point: SweepPoint, colour: str) -> None:
    """Draw a point's intervals where there are some."""
    across, up = (
        None if interval is None else [[interval[0]], [interval[1]]]
        for interval in (point.learned_interval, point.forgot_interval)
    )
    if across or up:
        scatter.errorbar([point.learned], [point.forgot], xerr=across, yerr=up, color=colour, elinewidth=0.9, capsize=2)


def _interval_note(points: Sequence[SweepPoint]) -> str:
    """Return what a reader may conclude of the distance between two points."""
    measured = [point for point in points if point.learned_interval and point.forgot_interval]
    if not measured:
        return (
            "No intervals: losses during training are means over the held-out text. "
            "`evaluate forgetting` measures a point's documents."
        )
    some = "" if len(measured) == len(points) else f" of {len(measured)} of {len(points)} points"
    return f"Bars{some}: 95 % intervals over documents, from `evaluate forgetting` of the point's last export."


def _intervals(run: Path) -> dict[str, tuple[float, float]]:
    """Return corpus -> how far the interval of its change goes below and above it, from the run's forgetting.json."""
    path = run / "report" / "evaluation" / "forgetting.json"
    changes = read_json_object(path, DataError).get("changes", []) if path.is_file() else []
    return {
        change["text"]: (change["change"] - change["change_low"], change["change_high"] - change["change"])
        for change in changes
        if change["model"] == "cpt"
    }


def _mean_interval(intervals: dict[str, tuple[float, float]], corpora: Sequence[str]) -> tuple[float, float] | None:
    """Return the interval of the mean of changes on different texts, whose errors are independent; None if one is missing."""
    if not corpora or any(name not in intervals for name in corpora):
        return None
    below, above = (math.hypot(*(intervals[name][side] for name in corpora)) / len(corpora) for side in (0, 1))
    return max(below, 0.0), max(above, 0.0)


def _heat_map(panel: Axes, points: Sequence[SweepPoint], axes: Sequence[str], name: str) -> None:
    rows, columns = (list(dict.fromkeys(point.axes[axis] for point in points)) for axis in axes)
    values = [[math.nan] * len(columns) for _ in rows]
    for point in points:
        values[rows.index(point.axes[axes[0]])][columns.index(point.axes[axes[1]])] = getattr(point, name)
    # one scale for both maps, so that their colours can be compared
    known = [abs(value) for point in points for value in (point.learned, point.forgot) if not math.isnan(value)]
    largest = max(known, default=0.0) or 1.0
    panel.imshow(values, cmap="RdBu_r", vmin=-1.2 * largest, vmax=1.2 * largest, aspect="auto")
    for row, line in enumerate(values):
        for column, value in enumerate(line):
            shade = "white" if abs(value) > 0.65 * largest else "#222222"
            panel.text(column, row, _signed(value), ha="center", va="center", fontsize=8.5, color=shade)
    panel.set_xticks(range(len(columns)), columns)
    panel.set_yticks(range(len(rows)), rows)
    panel.set_xlabel(axes[1])
    panel.set_ylabel(axes[0])
    panel.set_title("Change on new data" if name == "learned" else "Change on old data")
    panel.grid(visible=False)


def _read_point(run: Path, point: dict, old: Sequence[str], new: Sequence[str]) -> SweepPoint:
    losses: list[float] = []
    iteration, changes, intervals = 0, {}, _intervals(run)
    if (run / "metrics.jsonl").is_file():
        stage = read_stage(run, STEP_FIELDS)
        losses = [record["loss"] for record in stage.train]
        iteration = stage.train[-1]["iteration"] if stage.train else 0
        for corpus in (*old, *new):
            records = [record for record in stage.validation if record["corpus"] == corpus]
            values = [record.get("bits_per_byte") or record["loss"] for record in records]
            if len(values) > 1:
                changes[corpus] = values[-1] - values[0]
    return SweepPoint(
        label=point["label"],
        axes={str(key): str(value) for key, value in point["axes"].items()},
        iteration=iteration,
        train_iters=point["train_iters"],
        loss=fmean(losses[-max(1, len(losses) // 20) :]) if losses else math.nan,
        changes=changes,
        learned=_mean(changes, new),
        forgot=_mean(changes, old),
        learned_interval=_mean_interval(intervals, [name for name in new if name in changes]),
        forgot_interval=_mean_interval(intervals, [name for name in old if name in changes]),
    )


def _marked(point: SweepPoint, points: Sequence[SweepPoint]) -> SweepPoint:
    """Return the point with its place on the front; a point that is not finished has none."""
    rivals = [other for other in points if other.is_finished and other is not point]
    is_beaten = any(
        other.learned <= point.learned
        and other.forgot <= point.forgot
        and (other.learned, other.forgot) != (point.learned, point.forgot)
        for other in rivals
    )
    is_known = point.is_finished and not math.isnan(point.learned + point.forgot)
    return replace(point, is_front=is_known and not is_beaten)


def _mean(changes: dict[str, float], corpora: Sequence[str]) -> float:
    values = [changes[name] for name in corpora if name in changes]
    return fmean(values) if values else math.nan


def _signed(value: float) -> str:
    return "" if math.isnan(value) else f"{value:+.4f}"


def _as_json(point: SweepPoint) -> dict:
    values = {
        key: None if isinstance(value, float) and math.isnan(value) else value for key, value in vars(point).items()
    }
    return {**values, "is_finished": point.is_finished}
