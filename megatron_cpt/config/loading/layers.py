"""Layers of settings merged into one RunConfig: typed values, their origins, and every mistake on the way."""

from dataclasses import MISSING, dataclass
from typing import Any

from megatron_cpt.config.checks.stage import LENGTHS
from megatron_cpt.config.settings.fields import (
    IDENTITY,
    default_value,
    nearest,
    parse_field,
    plain,
    section_fields,
    sections,
)
from megatron_cpt.config.settings.schema import RunConfig


@dataclass(frozen=True)
class Layer:
    """Settings of one origin, as parsed from YAML: section -> key -> value."""

    origin: str
    settings: dict[str, Any]
    is_single_share: bool = False
    """Whether a mapping holds the one item to change, from `data.mix.NAME=SHARE`, not the whole mix or all rules."""


class MergedLayers:
    """The merged settings of the layers applied so far; each value in `values` is of its field's type and has an
    origin."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.origins: dict[str, str] = {}
        self.mistakes: list[str] = []
        self.unusable: set[str] = set()
        """Keys whose value could not be read: relations between settings leave them out."""

    def apply(self, layer: Layer) -> None:
        """Let a layer's settings win over earlier ones; null resets a setting to its default."""
        stated_lengths = []
        for section, settings in layer.settings.items():
            kind = sections().get(section)
            if kind is None:
                self.mistakes.append(f"{layer.origin}: {section}: {_unknown_section(section)}")
            elif isinstance(settings, dict):
                for name, value in settings.items():
                    self._set(layer, kind, section, str(name), value)
                    stated_lengths += [f"{section}.{name}"] if value is not None else []
            elif settings is not None:
                self.mistakes.append(
                    f"{layer.origin}: {section}: {settings!r} is no section. Write its settings below it."
                )
        self._choose_length(layer, [key for key in stated_lengths if key in LENGTHS])

    def build(self, identity: dict[str, str]) -> RunConfig | None:
        """Return the configuration, or None where a required setting is missing; fill in the origins of defaults."""
        built = {section: self._build_section(section, kind) for section, kind in sections().items()}
        return None if None in built.values() else RunConfig(**identity, **built)  # type: ignore[arg-type]

    def _set(self, layer: Layer, kind: type, section: str, name: str, value: Any) -> None:
        key, known = f"{section}.{name}", section_fields(kind)
        if name not in known:
            self.mistakes.append(f"{layer.origin}: {key}: no such setting. {nearest(name, list(known))}")
            return
        if value is None:
            self._reset(key)
            return
        try:
            self.values[key] = parse_field(known[name][0], self._over_earlier(layer, key, value), key)
        except ValueError as problem:
            self.mistakes.append(f"{layer.origin}: {key}: {str(problem).removesuffix('.')}.")
            self.unusable.add(key)
        self.origins[key] = layer.origin

    def _reset(self, key: str) -> None:
        self.values.pop(key, None)
        self.origins.pop(key, None)

    def _over_earlier(self, layer: Layer, key: str, value: Any) -> Any:
        """Return a mapping merged over earlier layers: corpora by name, single shares; other values unchanged."""
        earlier = self.values.get(key)
        if not isinstance(earlier, dict) or not isinstance(value, dict):
            return value
        value = {str(name): item for name, item in value.items()}
        if key == "data.corpora":
            merged = dict(earlier)
            for name, corpus in value.items():
                is_partial = isinstance(corpus, dict) and name in merged
                merged[name] = plain(merged[name]) | corpus if is_partial else corpus
            return {name: corpus for name, corpus in merged.items() if corpus is not None}
        if layer.is_single_share:
            return {name: share for name, share in (earlier | value).items() if share is not None}
        return value

    def _choose_length(self, layer: Layer, stated: list[str]) -> None:
        if len(stated) > 1:
            self.mistakes.append(
                f"{layer.origin}: {' and '.join(stated)}: {len(stated)} lengths. One is needed. Remove the others."
            )
        for key in LENGTHS if stated else ():
            if key not in stated:
                self._reset(key)

    def _build_section(self, section: str, kind: type) -> Any:
        arguments = {}
        for name, (_, field) in section_fields(kind).items():
            key = f"{section}.{name}"
            arguments[name] = self.values.get(key, default_value(field))
            self.origins.setdefault(key, "default")
        missing = [name for name, value in arguments.items() if value is MISSING]
        named = [name for name in missing if f"{section}.{name}" not in self.unusable]
        if named:
            self.mistakes.append(
                f"{section}: no {', '.join(named)}. They have no default. Set them in the params file."
            )
        return None if missing else kind(**arguments)


def _unknown_section(name: str) -> str:
    if name in IDENTITY:
        return f"is given on the command line (--{name}), not in a file. Remove it."
    owners = [section for section, kind in sections().items() if name in section_fields(kind)]
    if owners:
        return f"a setting outside its section. Write it below {owners[0]}:."
    return f"no such section. {nearest(name, list(sections()))}"
