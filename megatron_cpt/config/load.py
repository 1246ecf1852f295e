"""One RunConfig from layers of files, with the origin of every value.

Later layers win: defaults < params file < task file < the task's `sizes.SIZE` < its `variants.VARIANT` < site file <
`key=value` arguments. A null resets a setting to its default. `data.mix` is replaced as a whole, `data.corpora` is
merged by corpus. The three lengths of `training` are one choice: the last layer that states one wins.

Every mistake of all layers, and every relation that does not hold (`config/check.py`), comes back in one ConfigError.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, is_dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_cpt.config.check import mistakes as relation_mistakes
from megatron_cpt.config.check import raise_mistakes
from megatron_cpt.config.check_stage import LENGTHS
from megatron_cpt.config.fields import IDENTITY, default_value, nearest, parse_field, section_fields, sections
from megatron_cpt.config.schema import RunConfig
from megatron_cpt.config.sources import find_params, find_site, find_task, parse_inline, read_yaml, shown
from megatron_cpt.errors import ConfigError
from megatron_cpt.files import write_text

TASK_KEYS = ("description", "sizes", "variants")


@dataclass(frozen=True)
class LoadedConfig:
    """A checked configuration and where each value comes from."""

    config: RunConfig
    origins: dict[str, str]
    """Dotted key -> `params/demo-5m.yaml`, `tasks/demo/task.yaml (variants.replay)`, `command line`, `default` ..."""


@dataclass(frozen=True)
class _Layer:
    """Settings of one origin, as YAML gives them: section -> key -> value."""

    origin: str
    settings: dict[str, Any]
    is_single_share: bool = False
    """Whether `data.mix` holds the one share to change, from `data.mix.NAME=SHARE`, not the whole mix."""


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
    mistakes: list[str] = []
    unusable: set[str] = set()
    layers = [
        _file_layer(params_path, ("description",)),
        *_task_layers(task_path / "task.yaml", size, variant, mistakes, unusable),
        *([] if site is None else [_file_layer(find_site(site), ("description", "site"))]),
        *_override_layers(overrides, mistakes),
    ]
    return _resolve(layers, identity, mistakes, unusable)


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that name a run: --task --params --size --variant --site and key=value."""
    parser.add_argument(
        "--task", required=True, type=Path, metavar="DIR", help="folder of the task, or its name in tasks/"
    )
    parser.add_argument("--params", required=True, metavar="NAME", help="params file: a name in params/, or a path")
    parser.add_argument("--size", required=True, metavar="SIZE", help="a key of the task's sizes, such as 50B")
    parser.add_argument("--variant", default="main", metavar="NAME", help="a key of the task's variants (main)")
    parser.add_argument("--site", metavar="NAME", help="site file: a name in pbs/sites or slurm/sites, or a path")
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="settings that win, such as training.micro_batch_size=2"
    )


def load_from_arguments(arguments: argparse.Namespace) -> LoadedConfig:
    """Return the configuration that `add_run_arguments`' arguments name."""
    return load_config(
        arguments.task, arguments.params, arguments.size, arguments.variant, arguments.site, arguments.overrides
    )


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
    missing = [key for key in IDENTITY if not isinstance(values.get(key), str)]
    if missing:
        raise ConfigError(f"{shown(path)}: no {', '.join(missing)}. This is not a run's config.yaml.")
    identity = {key: values.pop(key) for key in IDENTITY}
    return _resolve([_Layer(shown(path), values)], identity, [], set(), checked=False).config


def plain(value: Any) -> Any:
    """Return a setting's value in the types of YAML and JSON."""
    if is_dataclass(value) and not isinstance(value, type):
        if hasattr(value, "unit"):
            return str(value)
        return {key: plain(getattr(value, key)) for key in section_fields(type(value))}
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _inline(value: Any) -> str:
    text: str = yaml.safe_dump(plain(value), default_flow_style=True, width=float("inf"), sort_keys=False)
    text = text.removesuffix("\n").removesuffix("\n...")
    return json.dumps(plain(value)) if "\n" in text else text  # JSON is YAML, and one line whatever a text holds


def _file_layer(path: Path, extra_keys: tuple[str, ...]) -> _Layer:
    settings = {key: value for key, value in read_yaml(path).items() if key not in extra_keys}
    return _Layer(shown(path), settings)


def _task_layers(path: Path, size: str, variant: str, mistakes: list[str], unusable: set[str]) -> list[_Layer]:
    """Return the layers of a task file: itself, its size and its variant."""
    whole = read_yaml(path)
    layers = [_Layer(shown(path), {key: value for key, value in whole.items() if key not in TASK_KEYS})]
    for part, name in (("sizes", size), ("variants", variant)):
        choices = whole.get(part) or {}
        if not isinstance(choices, dict):
            mistakes.append(
                f"{shown(path)}: {part}: a {type(choices).__name__}. A mapping of names to settings is needed."
            )
            continue
        choices = {str(key): value for key, value in choices.items()}
        settings = choices.get(name)
        if name in choices and isinstance(settings, dict | None):
            layers.append(_Layer(f"{shown(path)} ({part}.{name})", settings or {}))
        elif name in choices:
            mistakes.append(f"{shown(path)}: {part}.{name}: {settings!r}. Settings are needed, such as training:.")
        elif choices or (part, name) != ("variants", "main"):
            known = f"Known: {', '.join(choices)}." if choices else f"Add it below {part}:."
            mistakes.append(f"{shown(path)}: {part} has no {name!r}. {known}")
            unusable.update(_stated_keys(choices))  # what it would have said is not known: no complaints about that
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


def _override_layers(overrides: Sequence[str], mistakes: list[str]) -> list[_Layer]:
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
        layers.append(_Layer("command line", settings, is_single_share=len(parts) > 2))
    return layers


def _is_text(parts: list[str]) -> bool:
    """Return whether a key's value is a text, taken from the command line as it stands."""
    kind = sections().get(parts[0])
    hint = section_fields(kind).get(parts[1], (None, None))[0] if kind else None
    return len(parts) == 2 and hint in (str, str | None)


def _resolve(
    layers: list[_Layer], identity: dict[str, str], mistakes: list[str], unusable: set[str], checked: bool = True
) -> LoadedConfig:
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for layer in layers:
        _apply(layer, values, origins, mistakes, unusable)
    built = {}
    for section, kind in sections().items():
        built[section] = _build_section(section, kind, values, origins, unusable, mistakes)
    config = None if None in built.values() else RunConfig(**identity, **built)  # type: ignore[arg-type]
    if config and checked:
        mistakes += relation_mistakes(config, origins, unusable)
    raise_mistakes(mistakes)
    assert config is not None  # a missing setting is a mistake
    return LoadedConfig(config, origins | dict.fromkeys(IDENTITY, "command line"))


def _apply(
    layer: _Layer, values: dict[str, Any], origins: dict[str, str], mistakes: list[str], unusable: set[str]
) -> None:
    """Parse a layer's settings into `values` and note their origin; collect what is wrong with them."""
    stated_lengths = []
    for section, settings in layer.settings.items():
        kind = sections().get(section)
        if kind is None:
            mistakes.append(f"{layer.origin}: {section}: {_unknown_section(section)}")
            continue
        if settings is None:
            continue
        if not isinstance(settings, dict):
            mistakes.append(f"{layer.origin}: {section}: {settings!r} is no section. Write its settings below it.")
            continue
        known = section_fields(kind)
        for name, value in settings.items():
            key = f"{section}.{name}"
            if name not in known:
                mistakes.append(f"{layer.origin}: {key}: no such setting. {nearest(str(name), list(known))}")
                continue
            if value is None:
                values.pop(key, None)
                origins.pop(key, None)
                unusable.discard(key)
                continue
            try:
                values[key] = parse_field(known[name][0], _merged(layer, key, value, values), key)
            except ValueError as problem:
                mistakes.append(f"{layer.origin}: {key}: {str(problem).removesuffix('.')}.")
                unusable.add(key)
            origins[key] = layer.origin
            stated_lengths += [key] if key in LENGTHS else []
    _choose_length(layer, stated_lengths, values, origins, mistakes)


def _merged(layer: _Layer, key: str, value: Any, values: dict[str, Any]) -> Any:
    """Return a mapping setting over what earlier layers gave: corpora by name, single shares from the command line."""
    earlier = values.get(key)
    if not isinstance(earlier, dict) or not isinstance(value, dict):
        return value
    if key == "data.corpora":
        merged = dict(earlier)
        for name, corpus in value.items():
            is_partial = isinstance(corpus, dict) and str(name) in merged
            merged[str(name)] = plain(merged[str(name)]) | corpus if is_partial else corpus
        return {name: corpus for name, corpus in merged.items() if corpus is not None}
    if layer.is_single_share and key == "data.mix":
        return {name: share for name, share in (earlier | value).items() if share is not None}
    return value


def _choose_length(
    layer: _Layer, stated: list[str], values: dict[str, Any], origins: dict[str, str], mistakes: list[str]
) -> None:
    if len(stated) > 1:
        mistakes.append(
            f"{layer.origin}: {' and '.join(stated)}: {len(stated)} lengths. One is needed. Remove the others."
        )
    for key in LENGTHS if stated else ():
        if key not in stated:
            values.pop(key, None)
            origins.pop(key, None)


def _build_section(
    section: str,
    kind: type,
    values: dict[str, Any],
    origins: dict[str, str],
    unusable: set[str],
    mistakes: list[str],
) -> Any:
    """Return a section from its values and defaults, or None where a required setting is missing."""
    arguments = {}
    missing = []
    for name, (_, field) in section_fields(kind).items():
        key = f"{section}.{name}"
        value = values.get(key, default_value(field))
        origins.setdefault(key, "default")
        arguments[name] = value
        if value is MISSING:
            missing.append(name)
    named = [name for name in missing if f"{section}.{name}" not in unusable]
    if named:
        mistakes.append(f"{section}: no {', '.join(named)}. They have no default. Set them in the params file.")
    return None if missing else kind(**arguments)


def _unknown_section(name: str) -> str:
    if name in IDENTITY:
        return f"is given on the command line (--{name}), not in a file. Remove it."
    owners = [section for section, kind in sections().items() if name in section_fields(kind)]
    if owners:
        return f"a setting outside its section. Write it below {owners[0]}:."
    return f"no such section. {nearest(name, list(sections()))}"
