"""Configuration files: search paths of params, task and site files, and YAML without duplicate keys.

Names are looked for from the current folder first, so that a user's own params, tasks and sites win, then among those that
come with this package: the folders of its checkout, or in an installed one their copies.
"""

import re
from pathlib import Path
from typing import Any

import yaml

from megatron_cpt.errors import ConfigError

_PACKAGE = Path(__file__).resolve().parents[2]
CHECKOUT = _PACKAGE / "shipped" if (_PACKAGE / "shipped").is_dir() else _PACKAGE.parent
"""Folder with the `params/`, `tasks/`, `pbs/` and `slurm/` that come with this package."""
SITE_DIRS = (Path("pbs/sites"), Path("slurm/sites"))


_MOST_LEVELS = 100
_MOST_NODES = 10_000_000
_DEEP_LINE = re.compile(rf"^[ \t?:-]{{{2 * _MOST_LEVELS}}}", re.M)
"""Block collections need an indentation, or dashes, of at least a character per level."""


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """YAML loader that refuses a key stated twice in one mapping."""


def _construct_mapping(loader: Any, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: dict[Any, int] = {}
    for key_node, _ in node.value:
        if key_node.tag == "tag:yaml.org,2002:merge":
            continue
        key = loader.construct_object(key_node, deep=True)
        line = key_node.start_mark.line + 1
        if not isinstance(key, str | int | float | bool):
            raise ConfigError(f"line {line}: a key is {key!r}. A key must be a plain name.")
        if key in seen:
            raise ConfigError(f"line {line}: {key} is stated twice, first in line {seen[key]}. Keep one of them.")
        seen[key] = line
    loader.flatten_mapping(node)
    mapping: dict[Any, Any] = yaml.constructor.SafeConstructor.construct_mapping(loader, node, deep=True)
    return mapping


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _construct_mapping)


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file; an empty file is an empty one. Keys come back as text.

    Raises: ConfigError naming the file and the line.
    """
    name = shown(path)
    try:
        value = parse_yaml(path.read_text(encoding="utf-8"))
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(f"{name}: {where}not valid YAML ({problem}).") from None
    except OSError as error:
        raise ConfigError(f"{name}: cannot be read ({error.strerror}).") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name}: byte {error.start} is not UTF-8. Save the file as UTF-8.") from None
    except (
        ValueError,
        TypeError,
        AttributeError,
        RecursionError,
    ) as error:  # a date of month 13, a number of 5,000 digits
        raise ConfigError(f"{name}: not valid YAML ({str(error)[:200]}).") from None
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(f"{name}: holds a {type(value).__name__}. A mapping of sections is needed.")
    return {str(key): item for key, item in value.items()}


def parse_yaml(text: str) -> Any:
    """Return the value of a YAML text whose shape is harmless.

    Raises: yaml.YAMLError, ConfigError, ValueError.
    """
    check_shape(text)
    return yaml.load(text, Loader=_Loader)


def check_shape(text: str) -> None:
    """Raise ConfigError where a YAML text nests so deep that libyaml's composer overflows the stack, or repeats itself endlessly.

    Raises: yaml.YAMLError too, where it is no YAML.
    """
    if text.count("[") + text.count("{") <= _MOST_LEVELS and "&" not in text and not _DEEP_LINE.search(text):
        return
    depth, nodes = 0, 0
    sizes: dict[str | None, int] = {}
    open_anchors: list[tuple[str | None, int]] = []
    event: Any
    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        line = event.start_mark.line + 1
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            open_anchors.append((event.anchor, nodes))
            if depth > _MOST_LEVELS:
                raise ConfigError(f"line {line}: more than {_MOST_LEVELS} levels deep. Nothing here needs as many.")
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
            anchor, before = open_anchors.pop()
            if anchor:
                sizes[anchor] = nodes - before + 1
        elif isinstance(event, yaml.ScalarEvent) and event.anchor:
            sizes[event.anchor] = 1
        if isinstance(event, yaml.NodeEvent):
            nodes += sizes.get(event.anchor, _MOST_NODES) if isinstance(event, yaml.AliasEvent) else 1
        if nodes > _MOST_NODES:
            raise ConfigError(
                f"line {line}: its aliases stand for more than {_MOST_NODES:,} values. Write out what is meant."
            )


def parse_inline(text: str) -> Any:
    """Return the value of a piece of YAML such as the right side of `key=value`.

    Raises: ValueError when it is not YAML.
    """
    try:
        return parse_yaml(text)
    except (yaml.YAMLError, ConfigError, ValueError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{text[:200]!r} is not valid YAML") from None


def shown(path: Path) -> str:
    """Return a path as a message names it: relative to the current folder or the checkout where it lies inside."""
    absolute = path.absolute()
    for root in (Path.cwd(), CHECKOUT):
        if absolute.is_relative_to(root):
            return str(absolute.relative_to(root))
    return str(path)


def find_task(task_dir: Path) -> Path:
    """Return the folder of a task, given as a path or as a name in `tasks/`."""
    candidates = [root / part for root in roots() for part in (task_dir, Path("tasks") / task_dir)]
    for candidate in candidates:
        if (candidate / "task.yaml").is_file():
            return candidate
    for candidate in candidates:
        if candidate.is_dir():
            raise ConfigError(f"{shown(candidate)}: has no task.yaml. Copy the one in tasks/template.")
    known = sorted({path.parent.name for root in roots() for path in root.glob("tasks/*/task.yaml")})
    raise ConfigError(
        f"{task_dir}: no such task folder. Known in tasks/: {', '.join(known) or 'none'}. {_looked_in(candidates)}"
    )


def find_params(params: str, task_dir: Path) -> Path:
    """Return the params file: a path, or a name in the task's own `params/`, else in `params/`."""
    return _find("params", params, [task_dir / "params", *(root / "params" for root in roots())])


def find_site(site: str | Path) -> Path:
    """Return the site file: a path, or a name in `pbs/sites/` or `slurm/sites/`.

    Raises: ConfigError when both have the name.
    """
    folders = [root / folder for root in roots() for folder in SITE_DIRS]
    path = _find("site", str(site), folders)
    twins = {folder.parent.name for folder in folders if (folder / f"{site}.yaml").is_file()}
    if len(twins) > 1:
        raise ConfigError(f"{site}: both pbs/sites and slurm/sites have it. Give the path of the one you mean.")
    return path


def roots() -> list[Path]:
    """Return the folders that names are relative to."""
    return list(dict.fromkeys([Path.cwd(), CHECKOUT]))


def _find(kind: str, name: str, folders: list[Path]) -> Path:
    if "/" in name or name.endswith((".yaml", ".yml")):
        for root in roots():
            if (root / name).is_file():
                return root / name
        raise ConfigError(f"{name}: no such {kind} file. {_looked_in([root / name for root in roots()])}")
    for folder in folders:
        if (folder / f"{name}.yaml").is_file():
            return folder / f"{name}.yaml"
    known = sorted({path.stem for folder in folders for path in folder.glob("*.yaml")})
    raise ConfigError(f"{name}: no such {kind}. Known: {', '.join(known) or 'none'}. {_looked_in(folders)}")


def _looked_in(places: list[Path]) -> str:
    """Return where a name was looked for, each place as a user can open it."""
    here = Path.cwd()
    shown_places = [str(place.relative_to(here)) if place.is_relative_to(here) else str(place) for place in places]
    return f"Looked in {', '.join(dict.fromkeys(shown_places))}."
