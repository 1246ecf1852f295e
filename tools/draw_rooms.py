#!/usr/bin/env python3
"""Draw the package as its rooms: a row per layer, a box per room, an arrow per import between rooms of different packages.

Example: tools/draw_rooms.py docs/pictures/rooms.png
"""

import argparse
import ast
import sys
from collections import Counter
from graphlib import TopologicalSorter
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "megatron_cpt"
ROWS = (
    ("verbs", "interface"),
    ("train", "evaluate", "start"),
    ("checkpoint",),
    ("data", "launch"),
    ("run",),
    ("config",),
)
"""Layers from the top: a package imports only from rows below its own (data and launch do not import each other)."""
COLORS = {
    "verbs": "#d9d9d9", "interface": "#c9d9e9", "start": "#f3c6d3", "train": "#f4b6a6", "evaluate": "#f7d794", "checkpoint": "#c7b8ea",
    "data": "#a8d5ba", "launch": "#9cc7e8", "run": "#e0e0c0", "config": "#d6c3b0",
}  # fmt: skip


def main() -> int:
    """Write the picture; return an exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="the PNG file to write")
    arguments = parser.parse_args()
    lines, imports = measure()
    figure, axes = pyplot.subplots(figsize=(12, 8.4), dpi=100)
    places = draw_rooms(axes, {room: lines[room] for room in ground_first(lines, imports)})
    draw_imports(axes, places, imports)
    axes.set_xlim(0, 100)
    axes.set_ylim(0, 10 * len(ROWS))
    axes.axis("off")
    figure.tight_layout(pad=0.4)
    figure.savefig(arguments.output)
    return 0


def measure() -> tuple[dict[str, int], Counter[tuple[str, str]]]:
    """Return the lines of each room and how many modules of one import from another; a room is `data/reading`."""
    lines: dict[str, int] = {}
    imports: Counter[tuple[str, str]] = Counter()
    for path in sorted(PACKAGE.rglob("*.py")):
        room = room_of(path)
        if not room:
            continue
        text = path.read_text(encoding="utf-8")
        lines[room] = lines.get(room, 0) + text.count("\n")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("megatron_cpt."):
                target = ROOT.joinpath(*node.module.split("."))
                other = room_of(target / "__init__.py" if target.is_dir() else target.with_suffix(".py"))
                if other and other != room:
                    imports[room, other] += 1
    return lines, imports


def ground_first(lines: dict[str, int], imports: Counter[tuple[str, str]]) -> list[str]:
    """Return the rooms with code, each after those that it imports; so a row reads from its ground floor to its top."""
    sorter: TopologicalSorter[str] = TopologicalSorter()
    for room in lines:
        sorter.add(room, *(other for importer, other in imports if importer == room))
    return [room for room in sorter.static_order() if lines[room] > 10]


def room_of(path: Path) -> str:
    """Return the room of a module's file: its package and the folder in it, the package alone where it has none."""
    parts = path.relative_to(PACKAGE).parts[:-1]
    return "/".join(parts[:2]) if parts else ""


def draw_rooms(axes: pyplot.Axes, lines: dict[str, int]) -> dict[str, tuple[float, float]]:
    """Draw a row of boxes per layer, as wide as the rooms have lines (by root); return the middle of each room."""
    places = {}
    for row, packages in enumerate(ROWS):
        bottom = 10 * (len(ROWS) - 1 - row) + 2
        rooms = [[room for room in lines if room.split("/")[0] == package] for package in packages]
        gap, spare = 1.0, 3.0
        weights = [[max(lines[room], 150) ** 0.5 for room in group] for group in rooms]
        width = 98 - gap * sum(map(len, rooms)) - spare * (len(rooms) - 1)
        scale = min(width / sum(map(sum, weights)), 0.55)
        left = 1.0
        for package, group, sizes in zip(packages, rooms, weights, strict=True):
            axes.text(left, bottom + 6.2, package, fontsize=11, weight="bold", va="bottom")
            for room, size in zip(group, sizes, strict=True):
                box = FancyBboxPatch(
                    (left, bottom),
                    size * scale,
                    5.2,
                    boxstyle="round,pad=0.1",
                    fc=COLORS[package],
                    ec="#555555",
                    lw=0.8,
                    zorder=2,
                )
                axes.add_patch(box)
                name = room.partition("/")[2] or package
                axes.text(
                    left + size * scale / 2, bottom + 2.7, f"{name.replace('_', chr(10))}\n{lines[room]:,}",
                    ha="center", va="center", fontsize=7.5, zorder=3, rotation=90 if size * scale < 4.2 else 0,
                )  # fmt: skip
                places[room] = (left + size * scale / 2, bottom)
                left += size * scale + gap
            left += spare
    return places


def draw_imports(axes: pyplot.Axes, places: dict[str, tuple[float, float]], imports: Counter[tuple[str, str]]) -> None:
    """Draw an arrow from each room to those of lower rows that it imports, the stronger the more modules do."""
    for (room, other), count in imports.items():
        if room.split("/")[0] == other.split("/")[0] or other.startswith("config"):
            continue  # the order inside a package is in the text, and everything reads the settings
        (x, y), (to_x, to_y) = places[room], places[other]
        arrow = FancyArrowPatch(
            (x, y - 0.2), (to_x, to_y + 5.5), arrowstyle="-|>", mutation_scale=6,
            lw=0.4 + min(count, 12) / 8, color="#333333", alpha=0.15 + min(count, 12) / 40, zorder=1,
        )  # fmt: skip
        axes.add_patch(arrow)


if __name__ == "__main__":
    sys.exit(main())
