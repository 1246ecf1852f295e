"""Values of single settings: conversion from YAML or the command line to the type of the schema's annotation.

Every parser raises a ValueError that reads `<found>. <what is needed>`; `config/loading/resolve.py` puts file and key before it.
"""

import math
import types
import typing
from dataclasses import MISSING, Field, fields, is_dataclass
from difflib import get_close_matches
from fractions import Fraction
from functools import cache, reduce
from typing import Any, Literal, Union

from megatron_cpt.config.settings.schema import CorpusConfig, RunConfig
from megatron_cpt.config.settings.values import (
    ALL_SETTINGS,
    Duration,
    parse_count,
    parse_duration,
    parse_ramp,
    parse_walltime,
)

IDENTITY = ("task", "params", "size", "variant")
"""Fields of RunConfig that the command line names, not a file."""


@cache
def section_fields(section: type) -> dict[str, tuple[Any, Field[Any]]]:
    """Return the annotation and the dataclass field of each field of a section, in the schema's order."""
    hints = typing.get_type_hints(section)
    return {field.name: (hints[field.name], field) for field in fields(section)}


@cache
def sections() -> dict[str, type]:
    """Return the sections of RunConfig by name."""
    return {name: kind for name, (kind, _) in section_fields(RunConfig).items() if name not in IDENTITY}


def setting_keys() -> list[str]:
    """Return the dotted key of every setting, in the order of the schema."""
    keys = list(IDENTITY)
    for section, kind in sections().items():
        keys += [f"{section}.{name}" for name in section_fields(kind)]
    return keys


def setting_value(config: RunConfig, key: str) -> Any:
    """Return the value of a dotted key."""
    return reduce(getattr, key.split("."), config)


def default_value(field: Field[Any]) -> Any:
    """Return a field's default, or MISSING where it must be given."""
    return field.default_factory() if field.default_factory is not MISSING else field.default


def parse_field(kind: Any, value: Any, key: str = "") -> Any:
    """Return `value` as the annotation `kind` wants it.

    Raises: ValueError with the value found and the value needed.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        return None if value is None else parse_field(next(a for a in arguments if a is not type(None)), value, key)
    if key == "held_out":
        return _parse_part(value)
    if origin is Literal:
        return _parse_choice(arguments, value)
    if key == "checkpoint.accept_changes" and isinstance(value, bool):
        return (ALL_SETTINGS,) if value else ()
    if origin is tuple:
        return parse_ramp(value) if key == "training.rampup_batch_size" else _parse_strings(value)
    if origin is dict:
        return _parse_mapping(arguments[1], value)
    if key == "launch.walltime":
        return parse_walltime(value)
    return _PARSERS[kind](value)


def plain(value: Any) -> Any:
    """Return a setting's value in the types of YAML and JSON."""
    if isinstance(value, Duration):
        return str(value)
    if is_dataclass(value) and not isinstance(value, type):
        return {key: plain(getattr(value, key)) for key in section_fields(type(value))}
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, tuple) else value


def nearest(name: str, known: list[str] | tuple[str, ...]) -> str:
    """Return ` Did you mean X?` for a name that is close to a known one, else the known ones."""
    close = get_close_matches(name, known, n=1, cutoff=0.6)
    return f"Did you mean {close[0]}?" if close else f"Known: {', '.join(known) or 'none'}."


def _parse_choice(choices: tuple[Any, ...], value: Any) -> Any:
    if value in choices:
        return value
    hint = nearest(value, choices) if isinstance(value, str) else ""
    hint = hint if hint.startswith("Did") else ""
    raise ValueError(f"{_shown(value)} is not one of {', '.join(choices)}. {hint or 'Choose one of them.'}")


def _parse_strings(value: Any) -> tuple[str, ...]:
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, list | tuple) or not all(isinstance(item, str) for item in items):
        raise ValueError(f"{_shown(value)} is not a list of texts. Write [a, b]")
    return tuple(items)


def _parse_mapping(kind: Any, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{_shown(value)} is not a mapping. Write one 'name: value' per line")
    parsed = {}
    for name, item in value.items():
        try:
            parsed[str(name)] = _parse_corpus(item) if kind is CorpusConfig else parse_field(kind, item)
        except ValueError as problem:
            raise ValueError(f"{name}: {problem}") from None
    return parsed


def _parse_corpus(value: Any) -> CorpusConfig:
    if isinstance(value, CorpusConfig):
        return value
    if not isinstance(value, dict):
        raise ValueError(
            f"{_shown(value)} is not a corpus. Write its tokens:, documents: and validation: below its name"
        )
    known = section_fields(CorpusConfig)
    for name in value:
        if name not in known:
            raise ValueError(f"{name} is not a setting of a corpus. {nearest(str(name), list(known))}")
    return CorpusConfig(
        **{name: parse_field(known[name][0], item, name) for name, item in value.items() if item is not None}
    )


def _parse_bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    raise ValueError(f"{_shown(value)} is not a truth value. Write true or false")


def _parse_float(value: Any) -> float:
    if not isinstance(value, bool):
        try:
            number = float(value)
        except (TypeError, ValueError):
            pass
        else:
            if math.isfinite(number):
                return number
    raise ValueError(f"{_shown(value)} is not a number. Write for example 0.1 or 3e-4")


def _parse_part(value: Any) -> float:
    """Return a part of a whole, written 0.01 or 1/100."""
    try:
        part = Fraction(str(value))
    except (ValueError, ZeroDivisionError):
        part = Fraction(0)
    if isinstance(value, bool) or not 0 < part < 1:
        raise ValueError(f"{_shown(value)} is not a part between 0 and 1. Write for example 1/100")
    return float(part)


def _parse_str(value: Any) -> str:
    if isinstance(value, str) and value.strip():
        return value
    if isinstance(value, bool | int | float):
        raise ValueError(f"YAML reads {value!r} here, not a text. Write it in quotes")
    raise ValueError(f"{_shown(value)} is not a text. Write a text, or null for nothing")


def _shown(value: Any) -> str:
    return repr(value) if len(repr(value)) <= 60 else repr(value)[:57] + "..."


_PARSERS: dict[type, Any] = {
    bool: _parse_bool,
    int: parse_count,
    float: _parse_float,
    str: _parse_str,
    Duration: parse_duration,
}
