"""The grid of a sweep: `KEY=V1,V2` arguments become points, each with a label and the settings that its command carries."""

import argparse
import contextlib
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import yaml

from megatron_cpt.config.loading.resolve import load_config
from megatron_cpt.config.settings.schema import DataConfig, RunConfig
from megatron_cpt.errors import ConfigError
from megatron_cpt.run.variants import mix_text, scaled_mix

REPLAY = "replay"
"""Axis that is no setting: the share of the old data in data.mix."""
MAX_POINTS = 64
_CLOSING = {"{": "}", "[": "]", "(": ")"}


@dataclass(frozen=True, kw_only=True)
class Point:
    """One combination of the grid."""

    label: str
    axes: Mapping[str, str]
    """Axis -> value, as they were written."""
    settings: Mapping[str, str]
    """Setting -> value that the point's command carries."""


def parse_grid(arguments: Sequence[str]) -> dict[str, list[str]]:
    """Return axis -> values from `KEY=V1,V2` arguments; commas inside brackets do not separate.

    Raises: ConfigError for an axis without values, twice the same, one of the job's shape, or too many points.
    """
    grid: dict[str, list[str]] = {}
    for argument in arguments:
        key, _, text = argument.partition("=")
        values = list(dict.fromkeys(_split(text)))
        if not values or (key != REPLAY and "." not in key):
            raise ConfigError(
                f"--grid {argument}: no axis. A setting with its values is needed, such as optimizer.lr=1e-4,3e-4, or "
                f"{REPLAY}=0.05,0.25."
            )
        if key in grid or key.split(".")[0] in ("launch", "paths"):
            found = "stated twice" if key in grid else "the same for all points of an array"
            raise ConfigError(f"--grid {argument}: {key} is {found}. Vary another setting.")
        grid[key] = values
    count = len(list(itertools.product(*grid.values()))) if grid else 0
    if not 1 <= count <= MAX_POINTS:
        raise ConfigError(f"--grid: {count} points. Between 1 and {MAX_POINTS} are allowed. Change the values.")
    return grid


def grid_points(grid: Mapping[str, Sequence[str]], config: RunConfig, old: tuple[str, ...]) -> list[Point]:
    """Return every combination, the last axis changing fastest.

    Raises: ConfigError where the replay axis has no mix to change.
    """
    points = []
    for values in itertools.product(*grid.values()):
        axes = dict(zip(grid, values, strict=True))
        settings = {
            key if key != REPLAY else "data.mix": value if key != REPLAY else _replay_mix(value, config.data, old)
            for key, value in axes.items()
        }
        label = "_".join(f"{key.rpartition('.')[2]}-{_plain(value)}" for key, value in axes.items())
        points.append(Point(label=label, axes=axes, settings=settings))
    if len({point.label for point in points}) < len(points):
        raise ConfigError("--grid: two points would have the same name. Write values that differ in more than signs.")
    return points


def old_corpora(arguments: argparse.Namespace, config: RunConfig) -> tuple[str, ...]:
    """Return the corpora that must not be forgotten: those of --old, of the variant that is forked, or the first one.

    Raises: ConfigError for a name that is no corpus.
    """
    unknown = [name for name in arguments.old if name not in config.data.corpora]
    if unknown:
        raise ConfigError(f"--old {unknown[0]}: no corpus of the task. There are {', '.join(config.data.corpora)}.")
    if arguments.old:
        return tuple(arguments.old)
    source = config.init.from_path or ""
    if source.startswith("variant:"):
        variant = source.removeprefix("variant:").partition("@")[0]
        parent = load_config(arguments.task, arguments.params, arguments.size, variant, arguments.site).config
        return tuple(name for name in parent.data.mix if name in config.data.corpora)
    return tuple(config.data.corpora)[:1]


def _replay_mix(value: str, data: DataConfig, old: tuple[str, ...]) -> str:
    mix = data.mix
    new = [name for name in mix if name not in (*old, "buffer")]
    try:
        share = float(value)
    except ValueError:
        share = -1.0
    if not new or not old or not 0 <= share <= 1 - mix.get("buffer", 0.0):
        raise ConfigError(
            f"--grid {REPLAY}={value}: old data {', '.join(old) or 'none'}, new data {', '.join(new) or 'none'} in "
            "data.mix. A share from 0 to 1 and both kinds are needed. Name the old corpora with --old."
        )
    buffer = mix.get("buffer", 0.0)
    return mix_text(scaled_mix(mix, {"old": share, "new": 1 - share - buffer, "buffer": buffer}, old))


def _split(text: str) -> list[str]:
    values, closing = [""], list[str]()
    for character in text:
        if character == "," and not closing:
            values.append("")
            continue
        if character in _CLOSING:
            closing.append(_CLOSING[character])
        elif closing and character == closing[-1]:
            closing.pop()
        values[-1] += character
    return [value.strip() for value in values if value.strip()]


def _plain(value: str) -> str:
    with contextlib.suppress(TypeError, ValueError, yaml.YAMLError):
        value = f"{float(yaml.safe_load(value)):g}"  # 0.10 and 1e-3 have one name however they are written
    return re.sub(r"[^A-Za-z0-9.+-]+", "-", value).strip("-")
