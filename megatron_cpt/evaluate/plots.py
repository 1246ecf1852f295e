"""Charts of a report: training curves, validation, blend, forgetting, weight divergence. PNG files, drawn without a display.

A stage or model has one colour in all charts of a report. Lines and bars carry their labels themselves; the token axis
counts what the weights have seen since the first stage.
"""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from megatron_cpt.evaluate.forgetting import Change
from megatron_cpt.evaluate.stages import Stage, smoothed
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


def colours(names: Iterable[str]) -> dict[str, str]:
    """Return a colour per name, the same for the same order of first appearance."""
    distinct = dict.fromkeys(names)
    return {name: PALETTE[index % len(PALETTE)] for index, name in enumerate(distinct)}


def plot_training(stages: Sequence[Stage], colour: dict[str, str], path: Path) -> None:
    """Draw loss and learning rate over tokens for all stages, interruptions marked."""
    with plt.rc_context(STYLE):
        figure, (loss, rate) = plt.subplots(
            2, 1, figsize=(8, 5.6), sharex=True, height_ratios=(3, 1.2), layout="constrained"
        )
        rates: set[tuple[float, ...]] = set()
        for stage in stages:
            tokens = [stage.offset_tokens + record["consumed_tokens"] for record in stage.train]
            values = [record["loss"] for record in stage.train]
            if not tokens:
                continue
            loss.plot(tokens, values, color=colour[stage.name], alpha=0.25, linewidth=0.8)
            smooth = smoothed(values, max(1, len(values) // 25))
            loss.plot(tokens, smooth, color=colour[stage.name])
            lrs = [record["lr"] for record in stage.train]
            # Stages with the same schedule lie on one another: the later one is dashed so that both are seen.
            rate.plot(tokens, lrs, color=colour[stage.name], linestyle="--" if tuple(lrs) in rates else "-")
            rates.add(tuple(lrs))
        _limit_to_bulk(loss, [record["loss"] for stage in stages for record in stage.train])
        for stage in stages:
            _mark_interruptions(loss, stage, colour[stage.name])
        _label_ends(
            loss,
            [
                (
                    stage.offset_tokens + stage.tokens,
                    smoothed([record["loss"] for record in stage.train], max(1, len(stage.train) // 25))[-1],
                    stage.name,
                    colour[stage.name],
                )
                for stage in stages
                if stage.train
            ],
        )
        loss.set_title("Training loss")
        loss.set_ylabel("nats per token")
        rate.set_title("Learning rate")
        rate.set_xlabel("tokens seen since the first stage began")
        rate.set_ylim(bottom=0)
        rate.yaxis.set_major_locator(MaxNLocator(4))
        rate.yaxis.set_major_formatter(
            FuncFormatter(lambda value, _: f"{value:.1e}".replace("e-0", "e-") if value else "0")
        )
        _token_axis(rate)
        _save(figure, path)


def plot_validation(stages: Sequence[Stage], colour: dict[str, str], path: Path) -> None:
    """Draw held-out bits per byte (else loss) over tokens, a panel per corpus."""
    corpora = list(dict.fromkeys(record["corpus"] for stage in stages for record in stage.validation))
    key = "bits_per_byte"
    if any(record.get(key) is None for stage in stages for record in stage.validation):
        key = "loss"
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            1, len(corpora), figsize=(4.2 * max(len(corpora), 1.6), 3.6), squeeze=False, layout="constrained"
        )
        for panel, corpus in zip(axes[0], corpora, strict=True):
            ends = []
            for stage in stages:
                points = [record for record in stage.validation if record["corpus"] == corpus]
                if not points:
                    continue
                tokens = [stage.offset_tokens + record["consumed_tokens"] for record in points]
                values = [record[key] for record in points]
                panel.plot(tokens, values, color=colour[stage.name], marker="o", markersize=3)
                ends.append((tokens[-1], values[-1], stage.name, colour[stage.name]))
            _limit_to_bulk(
                panel, [record[key] for stage in stages for record in stage.validation if record["corpus"] == corpus]
            )
            _label_ends(panel, ends)
            panel.set_title(f"Held-out {corpus}")
            panel.set_xlabel("tokens seen")
            _token_axis(panel)
        axes[0][0].set_ylabel("bits per byte" if key == "bits_per_byte" else "nats per token")
        _save(figure, path)


def plot_blend(stages: Sequence[Stage], path: Path) -> None:
    """Draw what each stage reads as a bar of tokens, split by corpus."""
    drawn = [stage for stage in stages if stage.blend]
    corpora = sorted({corpus for stage in drawn for corpus in stage.blend})
    longest = max(sum(stage.blend.values()) for stage in drawn)
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(8, 0.9 + 0.55 * len(drawn)), layout="constrained")
        for row, stage in enumerate(drawn):
            left, total = 0, sum(stage.blend.values())
            for corpus in sorted(stage.blend, key=lambda name: (-stage.blend[name], name)):
                amount = stage.blend[corpus]
                shade = CORPUS_PALETTE[corpora.index(corpus) % len(CORPUS_PALETTE)]
                axis.barh(row, amount, left=left, height=0.62, color=shade, edgecolor="white")
                label = f"{corpus} {amount / total:.0%}"
                if amount < 0.08 * longest:
                    label = ""
                axis.text(left + amount / 2, row, label, ha="center", va="center", fontsize=8.5, color="#222222")
                left += amount
            small = [
                f"{corpus} {amount / total:.3g}".replace("0.", ".")
                if amount / total < 0.005
                else f"{corpus} {amount / total:.0%}"
                for corpus, amount in stage.blend.items()
                if amount < 0.08 * longest
            ]
            note = f"{format_count(total)} tokens" + (f" ({', '.join(small)})" if small else "")
            axis.text(total + longest * 0.01, row, note, va="center", fontsize=8.5, color="#444444")
        axis.set_yticks(range(len(drawn)), [stage.name for stage in drawn])
        axis.invert_yaxis()
        axis.set_xlim(0, longest * 1.22)
        axis.set_title("What each stage reads")
        axis.set_xlabel("tokens")
        axis.grid(axis="y", visible=False)
        axis.tick_params(axis="y", length=0)
        _token_axis(axis)
        _save(figure, path)


def plot_forgetting(changes: Sequence[Change], colour: dict[str, str], path: Path) -> None:
    """Draw each model's change in bits per byte from the first model, a panel per domain, with 95 % intervals."""
    models = list(dict.fromkeys(change.model for change in changes))
    texts = list(dict.fromkeys(change.text for change in changes))
    drawn = models[1:] or models
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            1,
            len(texts),
            figsize=(4.3 * max(len(texts), 1.4), 1.35 + 0.42 * len(drawn)),
            sharey=True,
            squeeze=False,
            layout="constrained",
        )
        for panel, text in zip(axes[0], texts, strict=True):
            of_text = {change.model: change for change in changes if change.text == text}
            for row, model in enumerate(drawn):
                found = of_text[model]
                errors = [[found.change - found.change_low], [found.change_high - found.change]]
                panel.barh(row, found.change, height=0.6, color=colour[model], alpha=0.85)
                panel.errorbar(found.change, row, xerr=errors, color="#333333", linewidth=1, capsize=2.5)
                outward = found.change_high if found.change >= 0 else found.change_low
                panel.annotate(
                    f"{found.change:+.3f}".replace("-", "−"),
                    (outward, row),
                    xytext=(5 if found.change >= 0 else -5, 0),
                    textcoords="offset points",
                    ha="left" if found.change >= 0 else "right",
                    va="center",
                    fontsize=8.5,
                )
            panel.axvline(0, color="#555555", linewidth=1)
            low = min(0.0, *(change.change_low for change in of_text.values()))
            high = max(0.0, *(change.change_high for change in of_text.values()))
            room = 0.24 * max(high - low, 1e-6)
            panel.set_xlim(low - (room if low < 0 else 0.25 * room), high + (room if high > 0 else 0.25 * room))
            reference = of_text[models[0]].bits_per_byte
            panel.set_title(f"{text}  ({models[0]}: {reference:.3f} bits per byte)")
            panel.set_xlabel("change in bits per byte\n← learned      forgot →")
            panel.xaxis.set_major_locator(MaxNLocator(5))
            panel.grid(axis="y", visible=False)
            panel.tick_params(axis="y", length=0)
        axes[0][0].set_yticks(range(len(drawn)), drawn)
        axes[0][0].invert_yaxis()
        _save(figure, path)


def plot_divergence(divergence: dict[str, dict[str, list[float]]], path: Path) -> None:
    """Draw relative weight change over layers: `divergence` is model -> group of weights -> value per layer."""
    groups = list(dict.fromkeys(group for model in divergence.values() for group in model))
    colour = colours(["", *divergence])
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            1, len(groups), figsize=(3.2 * max(len(groups), 2), 3.3), sharey=True, squeeze=False, layout="constrained"
        )
        for panel, group in zip(axes[0], groups, strict=True):
            ends = []
            for model, values in divergence.items():
                layers = list(range(len(values.get(group, []))))
                if layers:
                    panel.plot(layers, values[group], color=colour[model], marker="o", markersize=3.5)
                    ends.append((layers[-1], values[group][-1], model, colour[model]))
            _label_ends(panel, ends)
            panel.set_title(group)
            panel.set_xlabel("layer")
            panel.set_ylim(bottom=0)
            panel.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes[0][0].set_ylabel("|| w - w base || / || w base ||")
        _save(figure, path)


def _mark_interruptions(axis: Axes, stage: Stage, colour: str) -> None:
    for number, found in enumerate(stage.interruptions):
        resumed = stage.offset_tokens + found.resumed_tokens
        stopped = stage.offset_tokens + found.stopped_tokens
        axis.axvspan(resumed, stopped, color=colour, alpha=0.12, linewidth=0)
        axis.axvline(resumed, color=colour, linewidth=0.9, linestyle=(0, (4, 2)))
        change = f"\n{found.layout_before} → {found.layout_after}" if found.layout_before != found.layout_after else ""
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


def _label_ends(axis: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Write names at line ends (x, y, name, colour): at the right, moved apart where they would overlap; above the end
    of a line that others continue."""
    axis.figure.canvas.draw()
    height = axis.get_window_extent().height * 72 / axis.figure.dpi
    low, high = axis.get_ylim()
    rightmost = max((x for x, *_ in ends), default=0)
    highest = -height
    for x, y, name, colour in sorted(ends, key=lambda end: end[1]):
        is_last = x > 0.9 * rightmost
        at = (y - low) / (high - low) * height
        shift = max(highest + 13 - at, 0.0) if is_last else 9.0
        if is_last:
            highest = at + shift
        axis.annotate(
            name,
            (x, y),
            xytext=(6 if is_last else 0, shift),
            textcoords="offset points",
            color=colour,
            ha="left" if is_last else "right",
            va="center",
            fontsize=9,
            fontweight="bold",
            annotation_clip=False,
        )


def short_layouts(before: str, after: str) -> tuple[str, str]:
    """Return two layouts such as `TP2 PP1 CP1 DP1` without the parts that are 1 in both."""
    pairs = list(zip(before.split(), after.split(), strict=False))
    pairs = [pair for pair in pairs if {re.sub(r"[A-Z]+", "", part) for part in pair} != {"1"}]
    return " ".join(one for one, _ in pairs), " ".join(other for _, other in pairs)


def _limit_to_bulk(axis: Axes, values: Sequence[float]) -> None:
    """Leave out the steep beginning of a model trained from scratch, which would flatten everything else."""
    ordered = sorted(values)
    if len(ordered) > 4:
        low, most, top = ordered[0], ordered[int(0.95 * (len(ordered) - 1))], ordered[-1]
        if top - low > 2 * (most - low) > 0:
            axis.set_ylim(low - 0.08 * (most - low), most + 0.25 * (most - low))


def _token_axis(axis: Axes) -> None:
    axis.xaxis.set_major_locator(MaxNLocator(7))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_count(value)))


def _save(figure: Figure, path: Path) -> None:
    with whole_file(path, "wb") as file:
        # no date inside: the same numbers make the same bytes
        options: dict[str, Any] = {"metadata": {"Software": None}}
        figure.savefig(file, format="png", bbox_inches="tight", **options)
    plt.close(figure)
