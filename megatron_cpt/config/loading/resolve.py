"""One RunConfig from layers of files, with the origin of every value.

Later layers win: defaults < params file < task file < the task's `sizes.SIZE` < its `variants.VARIANT` < site file <
`key=value` arguments. A null resets a setting to its default. `data.mix` is replaced as a whole, `data.corpora` is
merged by corpus. The four lengths of `training` are one choice: the last layer that states one wins.

`VARIANT+LABEL` is VARIANT in a separate run directory: `key=value` overrides set the differences, so a trial needs no
edit of the task.

Every mistake of all layers, and every relation that does not hold (`config/checks/all.py`), comes back in one ConfigError.
"""

import argparse
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_cpt.config.checks.all import mistakes as relation_mistakes
from megatron_cpt.config.checks.all import raise_mistakes
from megatron_cpt.config.checks.stage import LENGTHS
from megatron_cpt.config.loading.layers import Layer, MergedLayers
from megatron_cpt.config.loading.naming import RESOLVED, is_run_directory, name_run
from megatron_cpt.config.loading.paths import with_paths
from megatron_cpt.config.loading.sources import find_params, find_site, find_task, parse_inline, read_yaml, shown
from megatron_cpt.config.settings.fields import IDENTITY, plain, section_fields, sections
from megatron_cpt.config.settings.schema import RunConfig
from megatron_cpt.errors import ConfigError
from megatron_cpt.files import write_text

TASK_KEYS = ("description", "sizes", "variants")
_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=+-]*")


@dataclass(frozen=True)
class LoadedConfig:
    """A checked configuration and where each value comes from."""

    config: RunConfig
    origins: dict[str, str]
    """Dotted key -> `params/demo-5m.yaml`, `tasks/demo/task.yaml (variants.replay)`, `command line`, `default` ..."""


def load_config(
    task_dir: Path,
    params: str,
    size: str,
    variant: str = "main",
    site: str | Path | None = None,
    overrides: Sequence[str] = (),
) -> LoadedConfig:
    """Return the configuration of one run, checked.

    Raises: ConfigError naming every mistake, a line each.
    """
    task_path = find_task(task_dir)
    params_path = find_params(params, task_path)
    identity = {"task": task_path.resolve().name, "params": params_path.stem, "size": size, "variant": variant}
    merged = MergedLayers()
    layers = [
        _file_layer(params_path, ("description",)),
        *_task_layers(task_path / "task.yaml", size, variant, merged),
        *([] if site is None else [_file_layer(find_site(site), ("description", "site"))]),
        *_override_layers(overrides, merged.mistakes),
    ]
    for layer in layers:
        merged.apply(layer)
    config = merged.build(identity)
    if config:
        config = with_paths(config, merged.origins)
        merged.mistakes += relation_mistakes(config, merged.origins, merged.unusable)
    raise_mistakes(merged.mistakes)
    assert config is not None  # a missing setting is a mistake
    return LoadedConfig(config, merged.origins | dict.fromkeys(IDENTITY, "command line"))


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that name a run: --task --params --size --variant --site and key=value."""
    parser.add_argument(
        "--task", type=Path, metavar="DIR", help="folder of the task, its name in tasks/, or a run directory"
    )
    parser.add_argument(
        "--params", metavar="NAME", help="params file: a name in params/, or a path (the task's only one)"
    )
    parser.add_argument("--size", metavar="SIZE", help="a key of the task's sizes, such as 50B (the only one)")
    parser.add_argument(
        "--variant", metavar="NAME", help="a key of the task's variants (main); KEY+LABEL: in a run of its own"
    )
    parser.add_argument("--site", metavar="NAME", help="site file: a name in pbs/sites or slurm/sites, or a path")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="TASK | KEY=VALUE",
        help="the task or run without --task, and settings that win, such as training.micro_batch_size=2",
    )


def load_from_arguments(arguments: argparse.Namespace) -> LoadedConfig:
    """Return the configuration that `add_run_arguments`' arguments name, and state in them what was left out.

    Raises: ConfigError with the missing name and the available ones.
    """
    name_run(arguments)
    config_path = arguments.task / RESOLVED
    if is_run_directory(arguments.task):
        return _load_run(config_path, arguments.overrides)
    return load_config(
        arguments.task, arguments.params, arguments.size, arguments.variant, arguments.site, arguments.overrides
    )


def _load_run(path: Path, overrides: Sequence[str]) -> LoadedConfig:
    """Return the configuration of a run directory as it last trained, with settings on top; the directory can have
    moved."""
    values, where, folder = read_yaml(path), shown(path), path.parent
    identity = _identity(path, values)
    if folder.absolute().parts[-len(identity) :] != tuple(identity.values()):
        raise ConfigError(
            f"{where}: of the run {'/'.join(identity.values())}, by which its last {len(identity)} folders are named. "
            "Name them so again, or give --task."
        )
    place = folder if len(folder.parts) >= len(identity) else folder.absolute()
    merged = MergedLayers()
    merged.apply(Layer(where, values))
    merged.apply(Layer(where, {"paths": {"runs_dir": str(place.parents[len(identity) - 1])}}))
    for layer in _override_layers(overrides, merged.mistakes):
        merged.apply(layer)
    config = merged.build(identity)
    if config:
        merged.mistakes += relation_mistakes(config, merged.origins, merged.unusable)
    raise_mistakes(merged.mistakes)
    assert config is not None
    return LoadedConfig(config, merged.origins | dict.fromkeys(IDENTITY, where))


def write_resolved(loaded: LoadedConfig, path: Path) -> None:
    """Write every setting with its origin as a YAML file that `read_resolved` reads back equal."""
    write_text(path, resolved_text(loaded))


def resolved_text(loaded: LoadedConfig) -> str:
    """Return every setting as YAML, `key: value  # origin` a line."""
    lines = [f"{key}: {_inline(getattr(loaded.config, key))}" for key in IDENTITY]
    for section, kind in sections().items():
        lines += ["", f"{section}:"]
        for key in section_fields(kind):
            value = _inline(getattr(getattr(loaded.config, section), key))
            lines.append(f"  {key}: {value}  # {loaded.origins.get(f'{section}.{key}', 'default')}")
    return "\n".join(lines) + "\n"


def read_resolved(path: Path) -> RunConfig:
    """Return the configuration that `write_resolved` wrote.

    Raises: ConfigError when a setting is missing, unknown or of the wrong type.
    """
    values = read_yaml(path)
    identity = _identity(path, values)
    merged = MergedLayers()
    merged.apply(Layer(shown(path), values))
    config = merged.build(identity)
    raise_mistakes(merged.mistakes)
    assert config is not None
    return config


def _identity(path: Path, values: dict[str, Any]) -> dict[str, str]:
    """Take what names a run out of the values of its config.yaml."""
    missing = [key for key in IDENTITY if not isinstance(values.get(key), str)]
    if missing:
        raise ConfigError(f"{shown(path)}: no {', '.join(missing)}. This is not a run's config.yaml.")
    return {key: values.pop(key) for key in IDENTITY}


def _inline(value: Any) -> str:
    text: str = yaml.safe_dump(plain(value), default_flow_style=True, width=float("inf"), sort_keys=False)
    text = text.removesuffix("\n").removesuffix("\n...")
    return json.dumps(plain(value)) if "\n" in text else text  # JSON is YAML, and one line whatever a text holds


def _file_layer(path: Path, extra_keys: tuple[str, ...]) -> Layer:
    settings = {key: value for key, value in read_yaml(path).items() if key not in extra_keys}
    return Layer(shown(path), settings)


def _task_layers(path: Path, size: str, variant: str, merged: MergedLayers) -> list[Layer]:
    """Return the layers of a task file: itself, its size and its variant, without the label after a `+`."""
    whole = read_yaml(path)
    variant, plus, label = variant.partition("+")
    if plus and not _LABEL.fullmatch(label):
        merged.mistakes.append(
            f"--variant {variant}+{label}: {label!r} is no label. Letters, digits and . _ = + - name a run of its own."
        )
    layers = [Layer(shown(path), {key: value for key, value in whole.items() if key not in TASK_KEYS})]
    for part, name in (("sizes", size), ("variants", variant)):
        choices = whole.get(part) or {}
        if not isinstance(choices, dict):
            merged.mistakes.append(
                f"{shown(path)}: {part}: a {type(choices).__name__}. A mapping of names to settings is needed."
            )
            continue
        choices = {str(key): value for key, value in choices.items()}
        settings = choices.get(name)
        if name in choices and isinstance(settings, dict | None):
            layers.append(Layer(f"{shown(path)} ({part}.{name})", settings or {}))
        elif name in choices:
            merged.mistakes.append(
                f"{shown(path)}: {part}.{name}: {settings!r}. Settings are needed, such as training:."
            )
        elif choices or (part, name) != ("variants", "main"):
            known = f"Known: {', '.join(choices)}." if choices else f"Add it below {part}:."
            merged.mistakes.append(f"{shown(path)}: {part} has no {name!r}. {known}")
            merged.unusable.update(
                _stated_keys(choices)
            )  # what it would have said is not known: no complaints about that
    return layers


def _stated_keys(choices: dict[str, Any]) -> set[str]:
    """Return the dotted keys that any of a task's sizes or variants states; for a length, all lengths."""
    parts = [part for part in choices.values() if isinstance(part, dict)]
    keys = {
        f"{section}.{name}"
        for part in parts
        for section, settings in part.items()
        if isinstance(settings, dict)
        for name in settings
    }
    return keys | set(LENGTHS if keys.intersection(LENGTHS) or not choices else ())


def _override_layers(overrides: Sequence[str], mistakes: list[str]) -> list[Layer]:
    """Return a layer for each `key=value`, so that the last one of two wins."""
    layers = []
    for override in overrides:
        key, equals, text = override.partition("=")
        parts = key.strip().split(".")
        if not equals or len(parts) < 2:
            mistakes.append(
                f"command line: {override!r}. Write section.key=value, such as training.micro_batch_size=2."
            )
            continue
        try:
            value = text if _is_text(parts) and text not in ("null", "~", "") else parse_inline(text)
        except ValueError as problem:
            mistakes.append(f"command line: {key}: {problem}. Quote it, or write a plain value.")
            continue
        settings: dict[str, Any] = {parts[-1]: value}
        for part in reversed(parts[:-1]):
            settings = {part: settings}
        layers.append(Layer("command line", settings, is_single_share=len(parts) > 2))
    return layers


def _is_text(parts: list[str]) -> bool:
    """Return whether a key's value is a text, taken from the command line unchanged."""
    kind = sections().get(parts[0])
    hint = section_fields(kind).get(parts[1], (None, None))[0] if kind else None
    return len(parts) == 2 and hint in (str, str | None)
