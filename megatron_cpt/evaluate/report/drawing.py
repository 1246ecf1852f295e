"""How charts of a report are drawn: colours, style, labels at lines, token axes, marks of interruptions."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, MaxNLocator

from megatron_cpt.evaluate.report.stages import Stage, short_layouts
from megatron_cpt.files import whole_file
from megatron_cpt.log import format_count

# Okabe and Ito's palette, distinguishable with colour-blindness; grey for the first, the reference.
PALETTE = ("#555555", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#882255")
CORPUS_PALETTE = ("#88A6C8", "#E3A869", "#8FBC8F", "#C69ABF", "#B8B0A0", "#D98880")
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.7,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "lines.linewidth": 1.6,
    "figure.dpi": 160,
    "savefig.dpi": 160,
}


@dataclass(frozen=True)
class Line:
    """A curve that carries its name."""

    x: Sequence[float]
    y: Sequence[float]
    name: str
    colour: str


def colours(names: Iterable[str]) -> dict[str, str]:
    """Return a colour per name, the same for the same order of first appearance."""
    distinct = dict.fromkeys(names)
    return {name: PALETTE[index % len(PALETTE)] for index, name in enumerate(distinct)}


def mark_interruptions(axis: Axes, stage: Stage, colour: str) -> None:
    """Mark where a stage was continued, and shade what was trained a second time."""
    for number, found in enumerate(stage.interruptions):
        resumed = stage.offset_tokens + found.resumed_tokens
        stopped = stage.offset_tokens + found.stopped_tokens
        axis.axvspan(resumed, stopped, color=colour, alpha=0.12, linewidth=0)
        axis.axvline(resumed, color=colour, linewidth=0.9, linestyle=(0, (4, 2)))
        before, after = short_layouts(found.layout_before, found.layout_after)
        change = f"\n{before} → {after}" if before != after else ""
        axis.annotate(
            f"{stage.name}: {found.reason} at {format_count(stopped)}, resumed from {format_count(resumed)}{change}",
            (resumed, 1 - 0.13 * number),
            xycoords=("data", "axes fraction"),
            xytext=(-5, -2),
            textcoords="offset points",
            ha="right",
            va="top",
            fontsize=8,
            color=colour,
        )


def label_lines(axis: Axes, lines: Sequence[Line]) -> None:
    """Write each line's name at its right end, moved up if names would overlap; next to its middle if other lines
    continue."""
    axis.figure.canvas.draw()
    height = axis.get_window_extent().height * 72 / axis.figure.dpi
    low, high = axis.get_ylim()
    rightmost = max((line.x[-1] for line in lines), default=0)
    highest = -height
    for line in sorted(lines, key=lambda line: line.y[-1]):
        is_last = line.x[-1] > 0.9 * rightmost
        at = len(line.x) - 1 if is_last else len(line.x) // 2
        shift = 8.0
        leader: dict[str, Any] | None = None
        if is_last:
            position = (line.y[at] - low) / (high - low) * height
            shift = max(highest + 13 - position, 0.0)
            highest = position + shift
            if shift > 8:  # the label is no longer beside its line
                leader = {"arrowstyle": "-", "color": line.colour, "linewidth": 0.8, "shrinkA": 0, "shrinkB": 0}
        axis.annotate(
            line.name,
            (line.x[at], line.y[at]),
            xytext=(14 if leader else 6 if is_last else 3, shift),
            arrowprops=leader,
            textcoords="offset points",
            color=line.colour,
            va="center" if is_last else "bottom",
            fontsize=9,
            fontweight="bold",
            annotation_clip=False,
            path_effects=[withStroke(linewidth=2.5, foreground="white")],
        )


def limit_to_bulk(axis: Axes, values: Sequence[float]) -> None:
    """Leave out the steep beginning of a model trained from scratch, which would flatten everything else."""
    ordered = sorted(values)
    if len(ordered) > 4:
        low, most, top = ordered[0], ordered[int(0.95 * (len(ordered) - 1))], ordered[-1]
        if top - low > 2 * (most - low) > 0:
            axis.set_ylim(low - 0.08 * (most - low), most + 0.25 * (most - low))


def token_axis(axis: Axes) -> None:
    """Write the x axis as token counts (`200K`, `1.5B`)."""
    axis.xaxis.set_major_locator(MaxNLocator(7))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_count(value)))


def save_chart(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, whole, and free it."""
    with whole_file(path, "wb") as file:
        # no date inside: the same numbers make the same bytes
        options: dict[str, Any] = {"metadata": {"Software": None}}
        figure.savefig(file, format="png", bbox_inches="tight", **options)
    plt.close(figure)
