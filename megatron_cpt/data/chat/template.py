"""Chat templates: Jinja programs that turn messages into the text a model sees, rendered as transformers renders them.

A tokenizer's folder holds one as `chat_template.jinja` or in `tokenizer_config.json`. It runs in Jinja's sandbox with the
names that transformers gives it: the special tokens, `raise_exception`, `strftime_now`, `tojson`, loop controls, and
`{% generation %}` around what the assistant says.

Source: huggingface/transformers, src/transformers/utils/chat_template_utils.py (which names exist, what they do).
"""

import datetime
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from megatron_cpt.errors import DataError
from megatron_cpt.files import read_json, text_hash

# Noncharacters of Unicode: no text that is interchanged holds them, and no `trim` takes them for white space.
OPEN, CLOSE, STAND_IN = "\ufdd0", "\ufdd1", "\ufdd2"
BUILT_IN = {
    "chatml": (
        "{% for m in messages %}{{ '<|im_start|>' ~ m.role ~ '\\n' ~ m.content ~ '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "llama3": (
        "{{ bos_token }}{% for m in messages %}"
        "{{ '<|start_header_id|>' ~ m.role ~ '<|end_header_id|>\\n\\n' ~ m.content | trim ~ '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
    ),
}
"""Templates for base models, which have none of their own; the tokenizer needs their control tokens."""
_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class TemplateRefusal(Exception):
    """The template does not take a conversation; the message says why."""


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}`: what the assistant says, put between `OPEN` and `CLOSE`."""

    tags = {"generation"}  # noqa: RUF012  the base class declares it so

    def parse(self, parser: Parser) -> nodes.Node:
        """Return the node of a block."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller: Callable[[], str]) -> str:
        return f"{OPEN}{caller()}{CLOSE}"


class ChatTemplate:
    """A compiled template. `hash` identifies its text and variables; `marks_generation` whether it has such blocks."""

    def __init__(self, source: str, variables: Mapping[str, Any], name: str, date: datetime.date | None = None):
        self.source, self.name = source, name
        self.variables = dict(variables)
        self.uses_date = "strftime_now" in source
        self.date = date or datetime.date.today()
        self.hash = text_hash(source + json.dumps(self.variables, sort_keys=True, ensure_ascii=False))
        try:
            self._template = _environment(self.date).from_string(source)
        except jinja2.TemplateSyntaxError as problem:
            raise DataError(f"{name}:{problem.lineno}: {problem.message}. A Jinja chat template is needed.") from None
        self.marks_generation = "endgeneration" in source

    def render(self, turns: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = False) -> str:
        """Return the text of a conversation, with `OPEN` and `CLOSE` where the template marks generation.

        Raises: TemplateRefusal with the template's own words, or what failed in it.
        """
        try:
            return self._template.render(
                messages=[dict(turn) for turn in turns],
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self.variables,
            )
        except jinja2.TemplateError as problem:
            raise TemplateRefusal(str(problem)) from None
        except (TypeError, ValueError, KeyError, IndexError, AttributeError, ArithmeticError) as problem:
            raise TemplateRefusal(f"{type(problem).__name__}: {problem}") from None


def load_template(
    tokenizer_dir: Path,
    template_path: Path | None = None,
    variables: Mapping[str, Any] | None = None,
    date: datetime.date | None = None,
) -> ChatTemplate:
    """Return the template in `template_path` (a file or a name in `BUILT_IN`), or else the tokenizer's own.

    `variables` are set in the template (`enable_thinking`); `date` is what `strftime_now` tells, today where it is None.

    Raises: DataError when there is none or it is no Jinja program.
    """
    folder = tokenizer_dir if tokenizer_dir.is_dir() else tokenizer_dir.parent
    if template_path is None:
        source, name = _own_template(folder)
    elif str(template_path) in BUILT_IN and not template_path.exists():
        source, name = BUILT_IN[str(template_path)], str(template_path)
    else:
        source, name = _text(template_path), str(template_path)
    return ChatTemplate(source, _special_tokens(folder) | dict(variables or {}), name, date)


def _own_template(folder: Path) -> tuple[str, str]:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return _text(path), str(path)
    path = folder / "tokenizer_config.json"
    found = read_json(path, DataError).get("chat_template") if path.is_file() else None
    if isinstance(found, list):
        named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
        found = named.get("default")
        if found is None:
            raise DataError(
                f"{path}: has the chat templates {', '.join(map(str, named))}, none called default. "
                "Write the one to use to a file and name it with --template."
            )
    if not isinstance(found, str):
        raise DataError(
            f"{folder}: has no chat template (chat_template.jinja, or chat_template in tokenizer_config.json). "
            f"A base model has none; name one with --template FILE.jinja, or one of {', '.join(BUILT_IN)}."
        )
    return found, f"{path} (chat_template)"


def _special_tokens(folder: Path) -> dict[str, Any]:
    """Return the special tokens by name, as text."""
    found: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        settings = read_json(folder / name, DataError) if (folder / name).is_file() else {}
        for key in _SPECIAL:
            value = settings.get(key)
            value = value.get("content") if isinstance(value, dict) else value
            if isinstance(value, str):
                found[key] = value
    return found


def _environment(date: datetime.date) -> jinja2.Environment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = date.strftime
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        raise DataError(f"{path}: cannot be read ({problem}). A chat template (Jinja) is needed.") from None
