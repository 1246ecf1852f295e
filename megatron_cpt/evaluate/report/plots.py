"""Charts of a report: training curves, validation, blend, forgetting, weight divergence. PNG files, drawn without a display.

A stage or model has one colour in all charts of a report. Lines and bars carry their labels themselves; the token axis
counts what the weights have seen since the first stage.
"""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from megatron_cpt.evaluate.models.forgetting import Change
from megatron_cpt.evaluate.report.drawing import (
    CORPUS_PALETTE,
    STYLE,
    Line,
    colours,
    label_lines,
    limit_to_bulk,
    mark_interruptions,
    plt,
    save_chart,
    token_axis,
)
from megatron_cpt.evaluate.report.stages import Stage, smoothed
from megatron_cpt.log import format_count

PANELS_A_ROW = 3
FEW = 20
"""Fewer points than this are drawn as points."""


def plot_training(stages: Sequence[Stage], colour: dict[str, str], path: Path) -> None:
    """Draw loss and learning rate over tokens for all stages, interruptions marked."""
    with plt.rc_context(STYLE):
        figure, (loss, rate) = plt.subplots(
            2, 1, figsize=(8, 5.6), sharex=True, height_ratios=(3, 1.2), layout="constrained"
        )
        lines: list[Line] = []
        for stage in stages:
            if not stage.train:
                continue
            tokens = [stage.offset_tokens + record["consumed_tokens"] for record in stage.train]
            values = [record["loss"] for record in stage.train]
            line = Line(tokens, smoothed(values, max(3, len(values) // 25)), stage.name, colour[stage.name])
            loss.plot(tokens, values, color=line.colour, alpha=0.25, linewidth=0.8)
            loss.plot(tokens, line.y, color=line.colour, marker="o" if len(values) < FEW else None, markersize=3)
            # Stages that fork from one checkpoint often share a schedule: the later one is dashed so that both are seen.
            is_covered = any(other.x[0] == tokens[0] for other in lines)
            rate.plot(
                tokens,
                [record["lr"] for record in stage.train],
                color=line.colour,
                linestyle=(0, (3, 3)) if is_covered else "-",
            )
            lines.append(line)
        limit_to_bulk(loss, [record["loss"] for stage in stages for record in stage.train])
        for stage in stages:
            mark_interruptions(loss, stage, colour[stage.name])
        label_lines(loss, lines)
        loss.set_title("Training loss")
        loss.set_ylabel("nats per token")
        rate.set_title("Learning rate")
        rate.set_xlabel("tokens seen since the first stage began")
        rate.set_ylim(bottom=0)
        rate.yaxis.set_major_locator(MaxNLocator(4))
        rate.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.2g}"))
        token_axis(rate)
        save_chart(figure, path)


def plot_validation(stages: Sequence[Stage], colour: dict[str, str], path: Path) -> None:
    """Draw held-out bits per byte (else loss) over tokens, a panel per corpus."""
    corpora = list(dict.fromkeys(record["corpus"] for stage in stages for record in stage.validation))
    key = "bits_per_byte"
    if any(record.get(key) is None for stage in stages for record in stage.validation):
        key = "loss"
    with plt.rc_context(STYLE):
        figure, panels = _panels(len(corpora), width=4.2, height=3.4)
        for panel, corpus in zip(panels, corpora, strict=True):
            lines = []
            for stage in stages:
                points = [record for record in stage.validation if record["corpus"] == corpus]
                if not points:
                    continue
                tokens = [stage.offset_tokens + record["consumed_tokens"] for record in points]
                values = [record[key] for record in points]
                panel.plot(tokens, values, color=colour[stage.name], marker="o", markersize=3)
                lines.append(Line(tokens, values, stage.name, colour[stage.name]))
            limit_to_bulk(
                panel, [record[key] for stage in stages for record in stage.validation if record["corpus"] == corpus]
            )
            label_lines(panel, lines)
            panel.set_title(f"Held-out {corpus}")
            panel.set_xlabel("tokens seen")
            token_axis(panel)
        for panel in panels[::PANELS_A_ROW]:
            panel.set_ylabel("bits per byte" if key == "bits_per_byte" else "nats per token")
        save_chart(figure, path)


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
        token_axis(axis)
        save_chart(figure, path)


def plot_forgetting(changes: Sequence[Change], colour: dict[str, str], path: Path) -> None:
    """Draw each model's change in bits per byte from the first model, grouped by text on one scale, with 95 % intervals."""
    models = list(dict.fromkeys(change.model for change in changes))
    texts = list(dict.fromkeys(change.text for change in changes))
    drawn = models[1:] or models
    by_key = {(change.model, change.text): change for change in changes}
    rows = [(text, model) for text in texts for model in drawn]
    places = [index + 0.8 * texts.index(text) for index, (text, _) in enumerate(rows)]
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(8, 1.2 + 0.36 * (len(rows) + 0.8 * len(texts))), layout="constrained")
        for place, (text, model) in zip(places, rows, strict=True):
            found = by_key[model, text]
            # of very few documents a bootstrap's interval need not hold the value itself
            errors = [[max(found.change - found.change_low, 0)], [max(found.change_high - found.change, 0)]]
            axis.barh(place, found.change, height=0.7, color=colour[model], alpha=0.85)
            axis.errorbar(found.change, place, xerr=errors, color="#333333", linewidth=1, capsize=2.5)
            is_forgotten = found.change >= 0
            axis.annotate(
                f"{found.change:+.3f}".replace("-", "−"),
                (max(found.change, found.change_high) if is_forgotten else min(found.change, found.change_low), place),
                xytext=(5 if is_forgotten else -5, 0),
                textcoords="offset points",
                ha="left" if is_forgotten else "right",
                va="center",
                fontsize=8.5,
            )
        for text in texts:
            first = places[rows.index((text, drawn[0]))]
            reference = by_key[models[0], text].bits_per_byte
            title = f"{text}  ({models[0]}: {reference:.3f} bits per byte)"
            axis.text(
                0, first - 0.75, title, transform=axis.get_yaxis_transform(), fontsize=9, fontweight="bold", va="center"
            )
        axis.axvline(0, color="#555555", linewidth=1)
        low = min(0.0, *(min(change.change, change.change_low) for change in changes))
        high = max(0.0, *(max(change.change, change.change_high) for change in changes))
        room = 0.12 * max(high - low, 1e-6)
        axis.set_xlim(low - room, high + room)
        per_stage = " from the model before" if len({change.reference for change in changes}) > 1 else ""
        axis.set_xlabel(f"change in bits per byte{per_stage}\n← learned      forgot →")
        axis.xaxis.set_major_locator(MaxNLocator(7))
        axis.grid(axis="y", visible=False)
        axis.tick_params(axis="y", length=0)
        axis.set_yticks(places, [model for _, model in rows])
        axis.set_ylim(places[-1] + 0.6, places[0] - 1.2)
        save_chart(figure, path)


def plot_divergence(divergence: dict[str, dict[str, list[float]]], base: str, path: Path) -> None:
    """Draw how far weights moved from `base` over layers: `divergence` is model -> group of weights -> value per layer.

    A panel per group that every layer has, each with a scale of its own.
    """
    groups = [group for group, values in next(iter(divergence.values())).items() if len(values) > 1]
    colour = colours([base, *divergence])
    with plt.rc_context(STYLE):
        figure, panels = _panels(len(groups), width=3.6, height=3.2)
        for panel, group in zip(panels, groups, strict=False):
            lines = []
            for model, values in divergence.items():
                layers = list(range(len(values[group])))
                panel.plot(layers, values[group], color=colour[model], marker="o", markersize=3.5)
                lines.append(Line(layers, values[group], model, colour[model]))
            # room for the labels above the highest point
            panel.set_ylim(0, 1.15 * max(max(line.y) for line in lines) or 1)
            label_lines(panel, lines)
            panel.set_title(group)
            panel.set_xlabel("layer")
            panel.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        panels[0].set_ylabel(f"distance from {base}, relative to its norm")
        save_chart(figure, path)


def _panels(number: int, *, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """Return a figure with axes for `number` panels, three a row; at least one."""
    rows, columns = -(-max(number, 1) // PANELS_A_ROW), min(max(number, 1), PANELS_A_ROW)
    size = (width * max(columns, 1.6), height * rows)
    figure, grid = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    panels = [panel for row in grid for panel in row]
    for panel in panels[max(number, 1) :]:
        panel.set_visible(False)
    return figure, panels[: max(number, 1)]
