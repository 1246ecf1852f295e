"""Chat templates: Jinja programs that turn messages into the text a model sees, rendered as transformers renders them.

A tokenizer's folder holds one as `chat_template.jinja` or in `tokenizer_config.json`. It runs in Jinja's sandbox with
the same names as in transformers: the special tokens, `raise_exception`, `strftime_now`, `tojson`, loop controls, and
`{% generation %}` around the assistant's content.

Source: huggingface/transformers, src/transformers/utils/chat_template_utils.py (which names exist, what they do).
"""

import datetime
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
import jinja2.meta
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from megatron_cpt.data.reading.turns import DEVELOPER, REASONING, SYSTEM, Turn, text_of
from megatron_cpt.errors import DataError
from megatron_cpt.files import read_json_object, text_hash

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


_RESERVED = {"messages", "add_generation_prompt", "raise_exception", "strftime_now", "namespace", *_SPECIAL}
_PROBE = "Probe of a text"


class TemplateRefusal(Exception):
    """The template rejects a conversation; the message contains the reason."""


@dataclass
class Reads:
    """Keys that a rendering read of each turn, and in which order."""

    keys: list[set[str]] = field(default_factory=list)
    """Keys whose value was read, per turn."""
    touched: list[tuple[int, str]] = field(default_factory=list)
    """Turn and key of each look at a turn, in order; an empty key where only its presence was asked for."""
    blocks: list[tuple[int, int]] = field(default_factory=list)
    """Of each generation block the part of `touched` that was looked at within it, [first, last)."""

    def see(self, number: int, *keys: str) -> None:
        """Note that a turn was looked at, and which of its values."""
        self.touched.extend((number, key) for key in keys or ("",))
        self.keys[number].update(keys)


class _Watched(dict[str, Any]):
    """A turn that notes what a template reads of it."""

    __slots__ = ("_number", "_reads")

    def __init__(self, turn: Turn, number: int, reads: Reads):
        super().__init__(turn)
        self._number, self._reads = number, reads

    def __getitem__(self, key: str) -> Any:
        self._reads.see(self._number, key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        """Return a value, as of any dictionary."""
        self._reads.see(self._number, key)
        return super().get(key, default)

    def __contains__(self, key: object) -> bool:
        self._reads.see(self._number)
        return super().__contains__(key)

    def __iter__(self) -> Iterator[str]:
        self._reads.see(self._number, *super().keys())
        return super().__iter__()

    def keys(self) -> Any:
        """Return the keys, as of any dictionary."""
        self._reads.see(self._number, *super().keys())
        return super().keys()

    def items(self) -> Any:
        """Return keys and values, as of any dictionary."""
        self._reads.see(self._number, *super().keys())
        return super().items()

    def values(self) -> Any:
        """Return the values, as of any dictionary."""
        self._reads.see(self._number, *super().keys())
        return super().values()

    def __repr__(self) -> str:
        self._reads.see(self._number, *super().keys())
        return super().__repr__()


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}`: the assistant's content, between `OPEN` and `CLOSE`."""

    tags = {"generation"}  # noqa: RUF012  the base class declares it so
    reads: Reads | None = None
    """Record of the running rendering for the turns of its blocks."""

    def parse(self, parser: Parser) -> nodes.Node:
        """Return the node of a block."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller: Callable[[], str]) -> str:
        reads = self.reads
        if reads is None:
            return f"{OPEN}{caller()}{CLOSE}"
        before = len(reads.touched)
        said = caller()
        reads.blocks.append((before, len(reads.touched)))
        return f"{OPEN}{said}{CLOSE}"


class ChatTemplate:
    """A compiled template. `hash` identifies its text and variables; `marks_generation` whether it has such blocks."""

    def __init__(self, source: str, variables: Mapping[str, Any], name: str, date: datetime.date | None = None):
        self.source, self.name = source, name
        self.variables = dict(variables)
        self.uses_date = "strftime_now" in source
        self.date = date or datetime.date.today()
        self.hash = text_hash(source + json.dumps(self.variables, sort_keys=True, ensure_ascii=False))
        environment = _environment(self.date)
        try:
            self._template = environment.from_string(source)
            program = environment.parse(source)
        except jinja2.TemplateSyntaxError as problem:
            raise DataError(f"{name}:{problem.lineno}: {problem.message}. A Jinja chat template is needed.") from None
        self._blocks: Any = environment.extensions[_Generation.identifier]
        self.names = frozenset(jinja2.meta.find_undeclared_variables(program)) - _RESERVED
        """Variables that it reads, besides the turns and the special tokens."""
        assigned = {found.name for found in program.find_all(nodes.Name) if found.ctx == "store"}
        self.parameters = self.names - assigned - {"tools", "documents"}
        """Those that it never sets itself: a record's field of this name is meant for it."""
        self.reasoning = {name for name in REASONING if re.search(rf"\b{name}\b", source)}
        """Names of reasoning that it reads, even if it writes only the reasoning of the last answers."""
        self.marks_generation = "endgeneration" in source

    def render(
        self,
        turns: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = False,
        variables: Mapping[str, Any] | None = None,
        reads: Reads | None = None,
    ) -> str:
        """Return the text of a conversation, with `OPEN` and `CLOSE` where the template marks generation.

        `variables` (tools, documents, ...) win over the template's own. `reads` records the keys that it reads of the
        turns.

        Raises: TemplateRefusal with the template's own words, or what failed in it.
        """
        messages: list[Any] = [_with_reasoning(turn) for turn in turns]
        if reads is not None:
            reads.keys.extend(set() for _ in messages)
            messages = [_Watched(turn, number, reads) for number, turn in enumerate(messages)]
        self._blocks.reads = reads
        given = {"tools": None, "documents": None, **self.variables, **(variables or {})}
        try:
            return self._template.render(
                **{**given, "messages": messages, "add_generation_prompt": add_generation_prompt}
            )
        except jinja2.TemplateError as problem:
            raise TemplateRefusal(str(problem)) from None
        except (
            TypeError,
            ValueError,
            KeyError,
            IndexError,
            AttributeError,
            ArithmeticError,
            RecursionError,
        ) as problem:
            raise TemplateRefusal(f"{type(problem).__name__}: {problem}") from None
        finally:
            self._blocks.reads = None

    def fitted(self, turns: Sequence[Turn]) -> list[Turn]:
        """Return turns in the forms that the template takes: text or parts of text, arguments as objects or as JSON."""
        return [self._with_arguments(self._with_content(self._with_role(turn))) for turn in turns]

    def _with_role(self, turn: Turn) -> Turn:
        is_other = turn["role"] == DEVELOPER and DEVELOPER not in self.source
        return turn | {"role": SYSTEM} if is_other else turn

    def _with_content(self, turn: Turn) -> Turn:
        content = turn.get("content")
        if isinstance(content, list) and not self._takes_parts:
            return turn | {"content": text_of(turn)}
        if isinstance(content, str) and self._takes_parts and not self._takes_text:
            return turn | {"content": [{"type": "text", "text": content}]}
        return turn

    def _with_arguments(self, turn: Turn) -> Turn:
        if "tool_calls" not in turn or self._arguments is None:
            return turn
        return turn | {"tool_calls": [_with_arguments_as(call, self._arguments) for call in turn["tool_calls"]]}

    @cached_property
    def _takes_text(self) -> bool:
        return self._shows(_PROBE)

    @cached_property
    def _takes_parts(self) -> bool:
        return self._shows([{"type": "text", "text": _PROBE}])

    def _shows(self, content: Any) -> bool:
        """Whether a content in this form is written as text, for users and assistants."""
        text = self._tried([{"role": "user", "content": content}, {"role": "assistant", "content": content}])
        return text.count(_PROBE) == 2 and "text'" not in text and 'text"' not in text

    @cached_property
    def _arguments(self) -> type | None:
        """The type of arguments that the template writes right, where it does not write both."""
        found = {}
        for kind, arguments in ((dict, {"probe": _PROBE}), (str, json.dumps({"probe": _PROBE}))):
            call = {"id": "probe1234", "type": "function", "function": {"name": "probe", "arguments": arguments}}
            result = {"role": "tool", "name": "probe", "tool_call_id": "probe1234", "content": "1"}
            for more in ({}, {"content": ""}):
                text = self._tried(
                    [
                        {"role": "user", "content": "a"},
                        {"role": "assistant", "tool_calls": [call], **more},
                        result,
                        {"role": "assistant", "content": "b"},
                    ]
                )
                found[kind] = _PROBE in text and '\\"probe' not in text
                if found[kind]:
                    break
        if found[dict] == found[str]:
            return None
        return dict if found[dict] else str

    def _tried(self, turns: Sequence[Turn]) -> str:
        try:
            return self.render(turns)
        except TemplateRefusal:
            return ""


def _with_reasoning(turn: Mapping[str, Any]) -> Turn:
    """Return a turn without what is null, its reasoning under the names that templates look for, as in transformers."""
    kept = {key: value for key, value in turn.items() if value is not None}
    reasoning = next((kept[key] for key in REASONING if key in kept), None)
    return kept if reasoning is None else {"thinking": reasoning, **kept, "reasoning_content": reasoning}


def _with_arguments_as(call: Turn, kind: type) -> Turn:
    inner = call.get("function", call)
    arguments = inner.get("arguments")
    if kind is dict and isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            return call
    elif kind is str and isinstance(arguments, dict):
        arguments = json.dumps(arguments, ensure_ascii=False)
    changed = inner | {"arguments": arguments}
    return call | {"function": changed} if "function" in call else changed


def load_template(
    tokenizer_dir: Path,
    template_path: Path | None = None,
    variables: Mapping[str, Any] | None = None,
    date: datetime.date | None = None,
) -> ChatTemplate:
    """Return the template in `template_path` (a file or a name in `BUILT_IN`), or else the tokenizer's own.

    `variables` are set in the template (`enable_thinking`); `date` is the value of `strftime_now`; None means today.

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
    found = read_json_object(path, DataError).get("chat_template") if path.is_file() else None
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
        settings = read_json_object(folder / name, DataError) if (folder / name).is_file() else {}
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
