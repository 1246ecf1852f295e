"""The turns of a conversation in the usual spellings, as the messages that chat templates read.

- Roles: `{role, content}` (OpenAI, Mistral, TRL) and ShareGPT's `{from, value}`. `human` is a user, `gpt` an assistant;
  `function_call` is an assistant's turn that calls a tool, `observation` and `function` are the result of a tool.
- Everything else of a turn (reasoning_content, tool_calls, name, ...) is unchanged, so that a template can read it.
- Learning marks are taken off a turn: `weight` (OpenAI, Mistral: 0 or 1), `loss_weight` (LLaMA-Factory), `loss`
  (ms-swift), `train` or `training` and `train_detail` (axolotl), `masked` (torchtune). They do not reach the template.

After an optional system turn a user comes first; an assistant's turn follows a user's or a tool's; a tool's result follows
an assistant's turn or another result; an assistant's turn is the last.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_cpt.data.reading.records import NOT_TEXT, NULL_TEXT, value_problem

SYSTEM, USER, ASSISTANT, TOOL, DEVELOPER = "system", "user", "assistant", "tool", "developer"
_CALL = "call"
ROLES = {
    **dict.fromkeys(("system", DEVELOPER), SYSTEM),
    **dict.fromkeys(("user", "human", "prompter"), USER),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model", "chatbot"), ASSISTANT),
    **dict.fromkeys(
        ("tool", "observation", "function", "function_response", "tool_response", "tool_results", "ipython"), TOOL
    ),
    **dict.fromkeys(("function_call", "tool_call"), _CALL),
}
REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names of the reasoning field; transformers passes all of the first two to a template."""
DETAILS = ("train_detail", "training_detail")
MARKS = ("weight", "loss_weight", "loss", "train", "training", "masked")
MAX_DEPTH = 100
ON_EMPTY_ANSWER = ("reject", "learn", "mask")

NOT_A_LIST = "not a list of turns"
NO_TURNS = "no turns"
NOT_A_TURN = "turn is not an object of role and content"
UNKNOWN_ROLE = "unknown role"
EMPTY_TURN = {USER: "empty prompt", ASSISTANT: "empty answer"}
LATE_SYSTEM = "system turn is not the first"
TWO_SYSTEMS = "two system prompts"
TWO_IN_A_ROW = {USER: "two user turns in a row", ASSISTANT: "two assistant turns in a row"}
NO_ANSWER = "no assistant turn"
STARTS_WITH_ANSWER = "begins with the assistant"
ENDS_WITH_USER = "ends with the user"
ENDS_WITH_TOOL = "ends with a tool's result"
NO_CALL = "tool result without a call"
NOT_A_CALL = "not a tool call"
TOO_DEEP = "nested too deep"
UNCLEAR_MARK = "learning mark is not understood"


class BadConversation(Exception):
    """Problem of a conversation: kind and detail."""

    def __init__(self, kind: str, detail: str = ""):
        super().__init__(kind, detail)
        self.kind, self.detail = kind, detail


@dataclass(frozen=True)
class Mark:
    """Whether a turn is learned, if its record marks it."""

    is_learned: bool | None = None
    details: tuple[tuple[int, int], ...] | None = None
    """Characters [start, end) of the content that are learned; None: the whole turn."""


Turn = dict[str, Any]


def turns_of(
    value: Any, *, system: str | None = None, on_empty_answer: str = "reject", ignored: Sequence[str] = ()
) -> tuple[list[Turn], list[Mark]]:
    """Return the turns of a conversation with the roles system, user, assistant and tool, and the mark of each.

    `system` is the record's own system prompt; an empty one is none. An empty answer is a bad conversation, learned
    (the model outputs nothing), or excluded from the loss. Keys in `ignored` are left out of every turn.

    Raises: BadConversation naming what is wrong and where (turns are counted from 1).
    """
    if not isinstance(value, list):
        raise BadConversation(NOT_A_LIST, f"a {type(value).__name__}")
    if not value:
        raise BadConversation(NO_TURNS)
    turns: list[Turn] = []
    marks: list[Mark] = []
    if system is not None and system.strip():
        turns.append({"role": SYSTEM, "content": system})
        marks.append(Mark())
    for number, message in enumerate(value, 1):
        role, turn, mark = _turn(message, number, ignored)
        if role == SYSTEM and not (text_of(turn).strip() or turn.get("tools") or turn.get("functions")):
            continue
        if role == SYSTEM and number == 1 and [text_of(said) for said in turns] == [text_of(turn)]:
            turns, marks = [], []  # the record's own prompt, said again
        if _is_merged(role, turn, turns, number):
            turns[-1] = _merged(turns[-1], turn)
            continue
        _check_order(role, turns, number)
        if role in EMPTY_TURN and is_empty(turn):
            if role == USER or on_empty_answer == "reject":
                raise BadConversation(EMPTY_TURN[role], f"turn {number}")
            turn.setdefault("content", "")
            if on_empty_answer == "mask":
                mark = Mark(False)
        turns.append(turn)
        marks.append(mark)
    if not any(turn["role"] == ASSISTANT for turn in turns):
        raise BadConversation(NO_ANSWER)
    if turns[-1]["role"] != ASSISTANT:
        raise BadConversation(ENDS_WITH_USER if turns[-1]["role"] == USER else ENDS_WITH_TOOL)
    return turns, marks


def text_of(turn: Turn) -> str:
    """Return the text of a turn's content; that of its parts is joined."""
    content = turn.get("content", "")
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def reasoning_of(turn: Turn) -> str:
    """Return the reasoning of a turn that has some in a field of its own."""
    return next((turn[key] for key in REASONING if isinstance(turn.get(key), str)), "")


def is_empty(turn: Turn) -> bool:
    """Return whether a turn is empty: no text, no tool call, no reasoning."""
    return not (text_of(turn).strip() or turn.get("tool_calls") or reasoning_of(turn).strip())


def strings_of(value: Any) -> list[str]:
    """Return every text within a value, keys of objects included."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [text for pair in value.items() for item in pair for text in strings_of(item)]
    return [text for item in value for text in strings_of(item)] if isinstance(value, list) else []


def check_depth(value: Any, where: str, depth: int = MAX_DEPTH) -> None:
    """Check that a value is not nested deeper than what reads it later can follow. Raises: BadConversation."""
    if depth == 0:
        raise BadConversation(TOO_DEEP, f"{where}: more than {MAX_DEPTH} levels")
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        if isinstance(item, (dict, list)):
            check_depth(item, where, depth - 1)


def without_nulls(value: Any) -> Any:
    """Return a value of a table without what is null: there every object has the keys of all."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def from_json(value: Any) -> Any:
    """Return what a text of JSON holds, where a value is one; tables and LLaMA-Factory keep objects so."""
    if isinstance(value, str) and value.strip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _turn(message: Any, number: int, ignored: Sequence[str]) -> tuple[str, Turn, Mark]:
    if not isinstance(message, dict):
        raise BadConversation(NOT_A_TURN, f"turn {number} is a {type(message).__name__}")
    # a table has every column in every row, null where a record has none
    turn = {key: value for key, value in message.items() if value is not None and key not in ignored}
    role_key = next((key for key in ("role", "from") if key in turn), None)
    if role_key is None:
        raise BadConversation(NOT_A_TURN, f"turn {number} has the keys {', '.join(map(repr, list(message)[:8]))}")
    spelled = turn[role_key]
    role = ROLES.get(spelled) if isinstance(spelled, str) else None
    if role is None:
        raise BadConversation(UNKNOWN_ROLE, f"{spelled!r} in turn {number}")
    turn = {{role_key: "role"}.get(key, key): value for key, value in turn.items()}
    if "content" not in turn and "value" in turn:
        turn = {"content" if key == "value" else key: value for key, value in turn.items()}
    mark = _mark(turn, number)
    _check_content(turn, number)
    if turn["role"] != DEVELOPER:  # whom some templates tell from the system
        turn["role"] = ASSISTANT if role == _CALL else role
    if role == _CALL:
        turn["tool_calls"] = [_envelope(call) for call in _calls(turn.pop("content", None), number)]
    elif role == ASSISTANT:
        _gather_calls(turn, number)
    check_depth(turn, f"turn {number}")
    if "content" not in turn and not (turn.get("tool_calls") or reasoning_of(turn)):
        raise BadConversation(NULL_TEXT, f"turn {number}")
    return (ASSISTANT if role == _CALL else role), turn, mark


def _check_content(turn: Turn, number: int) -> None:
    content = turn.get("content")
    if isinstance(content, list):
        for part in content:
            if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
                raise BadConversation(NOT_TEXT, f"turn {number} has parts that are not text")
            if problem := value_problem(part["text"]):
                raise BadConversation(problem, f"turn {number}")
    elif content is not None and (problem := value_problem(content)):
        raise BadConversation(problem, f"turn {number}")
    for key in REASONING:
        if key in turn and (problem := value_problem(turn[key])):
            raise BadConversation(problem, f"{key} of turn {number}")


def _gather_calls(turn: Turn, number: int) -> None:
    """Put an assistant's calls into `tool_calls`, OpenAI's older `function_call` included; no calls are no key."""
    if "tool_calls" in turn:
        calls = from_json(turn["tool_calls"])
        if not isinstance(calls, list):
            raise BadConversation(NOT_A_CALL, f"tool_calls of turn {number} are no list")
        turn["tool_calls"] = calls
        for call in calls:
            _check_call(call, number)
        if not calls:
            del turn["tool_calls"]
    if "function_call" in turn and "tool_calls" not in turn:
        turn["tool_calls"] = [_envelope(call) for call in _calls(turn.pop("function_call"), number)]


def _calls(value: Any, number: int) -> list[Any]:
    found = from_json(value)
    calls = found if isinstance(found, list) else [found]
    for call in calls:
        _check_call(call, number)
    if not calls:
        raise BadConversation(NOT_A_CALL, f"turn {number} has none")
    return calls


def _check_call(call: Any, number: int) -> None:
    inner = call.get("function", call) if isinstance(call, dict) else None
    if not (isinstance(inner, dict) and isinstance(inner.get("name"), str) and inner["name"]):
        raise BadConversation(NOT_A_CALL, f"a call of turn {number} has no name of a function")


def _envelope(call: Turn) -> Turn:
    """Return a bare call as the usual object around it."""
    if "function" in call:
        return call
    arguments = call.get("arguments", call.get("parameters", {}))
    more = {key: value for key, value in call.items() if key not in ("name", "arguments", "parameters")}
    return {"type": "function", "function": {"name": call["name"], "arguments": from_json(arguments)}} | more


def _is_merged(role: str, turn: Turn, turns: list[Turn], number: int) -> bool:
    """Whether a turn of calls only continues the previous assistant turn, as ShareGPT writes calls."""
    is_call_alone = role == ASSISTANT and "content" not in turn and "tool_calls" in turn
    return is_call_alone and bool(turns) and turns[-1]["role"] == ASSISTANT


def _merged(turn: Turn, call: Turn) -> Turn:
    return turn | {"tool_calls": [*turn.get("tool_calls", ()), *call["tool_calls"]]}


def _check_order(role: str, turns: list[Turn], number: int) -> None:
    before = ROLES[turns[-1]["role"]] if turns else None
    if role == SYSTEM and before is not None:
        kind = TWO_SYSTEMS if number == 1 else LATE_SYSTEM
        raise BadConversation(kind, f"turn {number}")
    if role == before and role in TWO_IN_A_ROW:
        raise BadConversation(TWO_IN_A_ROW[role], f"turns {number - 1} and {number}")
    if role == ASSISTANT and before in (None, SYSTEM):
        raise BadConversation(STARTS_WITH_ANSWER)
    if role == TOOL and before not in (ASSISTANT, TOOL):
        raise BadConversation(NO_CALL, f"turn {number}")


def _mark(turn: Turn, number: int) -> Mark:
    """Take the learning marks off a turn."""
    found = {key: turn.pop(key) for key in MARKS if key in turn}
    details = {key: turn.pop(key) for key in DETAILS if key in turn}
    said = set()
    for key, value in found.items():
        if value not in (0, 1):
            raise BadConversation(UNCLEAR_MARK, f"{key}={value!r} in turn {number}; 0, 1, true and false are")
        said.add(bool(value) != (key == "masked"))
    if len(said) > 1:
        raise BadConversation(UNCLEAR_MARK, f"{' and '.join(found)} of turn {number} contradict each other")
    is_learned = said.pop() if said else None
    detail = next((from_json(value) for value in details.values()), None)
    if detail is None:
        return Mark(is_learned)
    spans = _detail_spans(detail, number)
    if is_learned is None:  # as in axolotl: details alone say that the turn is learned, in part
        is_learned = bool(detail)
    return Mark(is_learned, spans if is_learned and detail else None)


def _detail_spans(details: Any, number: int) -> tuple[tuple[int, int], ...]:
    """Return the learned characters of axolotl's `[{begin_offset, end_offset, train}]`, whose ends are inclusive."""
    try:
        return tuple(
            (int(detail["begin_offset"]), int(detail["end_offset"]) + 1) for detail in details if detail["train"]
        )
    except (TypeError, KeyError, ValueError):
        raise BadConversation(
            UNCLEAR_MARK, f"turn {number}: begin_offset, end_offset and train of each detail are needed"
        ) from None
