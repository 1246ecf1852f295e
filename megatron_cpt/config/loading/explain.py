"""Explanations of settings: the text under a field in the schema, with its value, origin and Megatron names."""

import ast
import inspect
import textwrap
from collections.abc import Iterator
from pathlib import Path

from megatron_cpt.config.loading.resolve import LoadedConfig
from megatron_cpt.config.megatron.rows import ROWS
from megatron_cpt.config.settings import schema
from megatron_cpt.config.settings.fields import nearest, plain, setting_keys, setting_value
from megatron_cpt.errors import ConfigError


def explain(loaded: LoadedConfig, name: str = "") -> str:
    """Return value, origin and meaning of the settings that `name` means: a key, a field, a section, or all ("").

    Raises: ConfigError naming the nearest setting.
    """
    keys = setting_keys()
    chosen = [key for key in keys if not name or name in (key, key.partition(".")[0], key.rpartition(".")[2])]
    if not chosen:
        raise ConfigError(f"--explain {name}: no such setting. {nearest(name, known_names(keys))}")
    texts = field_texts()
    return "\n\n".join("\n".join(_lines(loaded, key, texts[key])) for key in chosen) + "\n"


def known_names(keys: list[str]) -> list[str]:
    """Return what `explain` takes, with the short names last: they win only where they are nearer."""
    return [*keys, *dict.fromkeys(key.rpartition(".")[2] for key in keys)]


def field_texts() -> dict[str, str]:
    """Return the docstring under each field of the schema by dotted key."""
    tree = ast.parse(Path(inspect.getfile(schema)).read_text(encoding="utf-8"))
    classes = {node.name: dict(_texts_of(node)) for node in tree.body if isinstance(node, ast.ClassDef)}
    texts = dict(classes["RunConfig"])
    for section, kind in schema.RunConfig.__annotations__.items():
        if isinstance(kind, type) and kind.__name__ in classes:
            texts |= {f"{section}.{name}": text for name, text in classes[kind.__name__].items()}
    return texts


def _texts_of(node: ast.ClassDef) -> Iterator[tuple[str, str]]:
    for statement, following in zip(node.body, node.body[1:]):
        match statement, following:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                yield name, inspect.cleandoc(text)


def _lines(loaded: LoadedConfig, key: str, text: str) -> Iterator[str]:
    row = next(row for row in ROWS if row.setting == key)
    yield f"{key}: {plain(setting_value(loaded.config, key))}"
    yield f"    from {loaded.origins.get(key, 'default')}"
    yield from textwrap.wrap(" ".join(text.split()), 110, initial_indent="    ", subsequent_indent="    ")
    reach = [*row.arguments, *([f"honoured by {row.honoured_by}"] if row.honoured_by else [])]
    yield f"    Megatron-Core: {', '.join(reach)}"
    if row.flag:
        yield f"    Megatron-LM: {row.flag}"
