"""Relations between settings: every layout, batch, schedule and mix that cannot work is refused with its numbers.

A setting that the rest of the configuration would leave without effect is a mistake too. All problems come back at
once. Types were checked before, in `config/settings/fields.py`.
"""

from collections.abc import Collection
from dataclasses import replace

from megatron_cpt.config.checks.batch import ramp_problems
from megatron_cpt.config.checks.model import model_problems
from megatron_cpt.config.checks.parallel import parallel_problems
from megatron_cpt.config.checks.ranges import out_of_range, with_ones
from megatron_cpt.config.checks.stage import stage_problems
from megatron_cpt.config.settings.fields import setting_value
from megatron_cpt.config.settings.schema import RunConfig
from megatron_cpt.errors import ConfigError


def check_config(config: RunConfig, origins: dict[str, str]) -> None:
    """Raise one ConfigError that lists every relation that does not hold, each with its file and numbers."""
    raise_mistakes(mistakes(config, origins))


def mistakes(config: RunConfig, origins: dict[str, str], unusable: Collection[str] = ()) -> list[str]:
    """Return every problem as `<file>: <key> is <found>. <needed>. <do>.`

    Problems that involve an `unusable` key (its value could not be read) are left out.
    """
    found: list[tuple[tuple[str, ...], str]] = [
        ((key,), f"{key} is {setting_value(config, key)}. {needed} is needed.") for key, needed in out_of_range(config)
    ]
    bad = {*unusable, *(keys[0] for keys, _ in found)}
    sane = with_ones(config, [keys[0] for keys, _ in found])
    if ramp := [problem for problem in ramp_problems(sane.training) if not bad.intersection(problem.keys)]:
        found += [(problem.keys, problem.text) for problem in ramp]
        sane = replace(sane, training=replace(sane.training, rampup_batch_size=None))
    for problems in (model_problems, parallel_problems, stage_problems):
        found += [(problem.keys, problem.text) for problem in problems(sane) if not bad.intersection(problem.keys)]
    return [f"{_where(keys, origins) or f'task {config.task}'}: {text}" for keys, text in found]


def raise_mistakes(found: list[str]) -> None:
    """Raise a ConfigError with one mistake, or with a numbered heading and one mistake a line; none: return."""
    if found:
        raise ConfigError(found[0] if len(found) == 1 else "\n  ".join([f"{len(found)} mistakes", *found]))


def _where(keys: tuple[str, ...], origins: dict[str, str]) -> str:
    """Return the most particular origin of the settings, where a change that broke something was made; "": defaults."""
    named = [origins[key] for key in keys if origins.get(key, "default") != "default"]
    marks = ("command line", "(variants.", "(sizes.", "")
    return next((origin for mark in marks for origin in named if mark in origin), "")
