"""The `site:` section of a site file: queues, resources, modules, launcher, environment.

A site file holds sections of the run configuration (`launch:`, `paths:`) and one section of its own, `site:`, read
here. Account and queue can be set in the environment (MEGATRON_CPT_ACCOUNT, MEGATRON_CPT_QUEUE) or the command line
instead; shared files contain no account.
"""

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from megatron_cpt.config.loading.sources import find_site, read_yaml, shown
from megatron_cpt.config.settings.fields import nearest
from megatron_cpt.config.settings.values import parse_walltime
from megatron_cpt.errors import ConfigError
from megatron_cpt.launch.scheduler.job import VARIABLE_NAME


@dataclass(frozen=True, kw_only=True)
class StageResources:
    """Resources of one stage that override the site's defaults."""

    queue: str | None = None
    """Queue or partition of the stage."""
    walltime: int | None = None
    """Longest run of the stage's job, `HH:MM:SS`."""
    select: str | None = None
    """PBS: the stage's select statement."""
    options: tuple[str, ...] | None = None
    """Scheduler options of the stage, instead of the site's."""


@dataclass(frozen=True, kw_only=True)
class Site:
    """A cluster's ways."""

    queue: str | None = None
    """Queue (PBS) or partition (Slurm)."""
    account: str | None = None
    """Group, project or account that pays."""
    requires: tuple[str, ...] = ()
    """Of queue and account, those that the site insists on."""
    select: str = "{nodes}"
    """PBS: the select statement; {nodes} and {gpus_per_node} are filled in."""
    options: tuple[str, ...] = ()
    """Further directives, such as `-v RTYPE=rt_HF` or `--gpus-per-node={gpus_per_node}`."""
    processes: Literal["node", "rank"] = "node"
    """Processes that the launcher starts: torchrun once per node, or every rank."""
    launcher: tuple[str, ...] = ()
    """Command that starts processes on all nodes; {nodes}, {processes}, {processes_per_node}, {hostfile} are filled in."""
    modules: tuple[str, ...] = ()
    """Environment modules to load."""
    setup: tuple[str, ...] = ()
    """Shell lines that run before anything else in a job."""
    environment: dict[str, str] = field(default_factory=dict)
    """Variables of every process: fabric, threads, caches."""
    umask: str = "022"
    """Permissions that files lack."""
    signal_seconds: int = 600
    """Slurm: seconds before the walltime at which a run is asked to save and end."""
    max_walltime: int | None = None
    """Longest job the site allows, `HH:MM:SS`."""
    max_array_tasks: int = 1000
    """Most tasks of one array job."""
    gpu_memory_gib: float | None = None
    """Memory of one GPU, for `plan`."""
    gpu_tflops: float | None = None
    """Dense bf16 peak of one rank's device in TFLOP/s, for `plan --search`; an H100's 989 where it is not given."""
    gigabytes_inside_node: float | None = None
    """GB/s that a rank exchanges with others of its node (300: NVLink 4)."""
    gigabytes_between_nodes: float | None = None
    """GB/s that a rank exchanges with other nodes (40: a 400 Gb/s link)."""
    preflight: bool = False
    """Measure the nodes before each training job; bad ones end it early and are avoided by the next."""
    stages: dict[str, StageResources] = field(default_factory=dict)
    """Per stage (tokenize, convert, evaluate ...): queue, walltime, select, options."""


def read_site(site: str | Path | None, environment: Mapping[str, str] | None = None, **chosen: str | None) -> Site:
    """Return a site with account and queue from, in falling order, `chosen`, the environment and its file.

    Raises: ConfigError listing every mistake in the `site:` section.
    """
    environment = os.environ if environment is None else environment
    if site is None:
        values: Any = {}
        where = "site"
    else:
        path = find_site(site)
        values, where = read_yaml(path).get("site") or {}, shown(path)
    mistakes: list[str] = []
    settings = _checked(values, Site, f"{where}: site", mistakes)
    stages = settings.get("stages", {})
    if isinstance(stages, dict):
        settings["stages"] = {
            stage: StageResources(
                **_checked(resources or {}, StageResources, f"{where}: site.stages.{stage}", mistakes)
            )
            for stage, resources in stages.items()
        }
    for name in ("queue", "account"):
        value = chosen.get(name) or environment.get(f"MEGATRON_CPT_{name.upper()}")
        if value:
            settings[name] = value
    if mistakes:
        raise ConfigError("\n".join(mistakes))
    return Site(**settings)


def _checked(values: Any, kind: type, where: str, mistakes: list[str]) -> dict[str, Any]:
    if not isinstance(values, dict):
        mistakes.append(f"{where}: {values!r} is not a mapping of keys to values. Write `key: value` lines.")
        return {}
    fields = {item.name: item for item in dataclasses.fields(kind)}
    checked: dict[str, Any] = {}
    for key, value in values.items():
        if key not in fields:
            mistakes.append(f"{where}.{key}: unknown key. {nearest(str(key), list(fields))}".rstrip())
            continue
        try:
            checked[key] = _parse(str(key), fields[key].type, value)
        except ValueError as problem:
            mistakes.append(f"{where}.{key}: {problem}.")
    return checked


def _parse(key: str, kind: Any, value: Any) -> Any:
    """Return `value` as the field's type wants it; sites have few types, so they are told apart here."""
    kind_text = str(kind)
    if value is None:
        if "None" in kind_text:
            return None
        raise ValueError("nothing is given; give a value or leave the key out")
    if "tuple" in kind_text:
        if isinstance(value, str):
            return tuple(value.split()) if key in ("launcher", "requires") else (value,)
        return tuple(str(item) for item in value)
    if "dict[str, str]" in kind_text:
        if not isinstance(value, dict):
            raise ValueError(f"{value!r} is not a mapping of names to values")
        for name in value:
            if not VARIABLE_NAME.fullmatch(str(name)):
                raise ValueError(
                    f"{name!r} is not the name of a variable; letters, digits and _ are allowed, no digit first"
                )
        return {str(name): str(item) for name, item in value.items()}
    if kind is bool:
        if not isinstance(value, bool):
            raise ValueError(f"{value!r} is not true or false")
        return value
    if "int" in kind_text:
        return parse_walltime(value)
    if "float" in kind_text:
        return float(value)
    if "Literal" in kind_text and value not in kind.__args__:
        raise ValueError(f"{value!r} is not one of {', '.join(kind.__args__)}")
    if "str" in kind_text and "dict" not in kind_text:
        if isinstance(value, bool | int | float) and "umask" not in kind_text:
            raise ValueError(f"{value!r} is not text; put it in quotes")
        return str(value)
    return value
