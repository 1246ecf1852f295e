"""What records bring besides role and content: tools, calls, reasoning, marks, options, and what nobody reads."""

import itertools
import json
import re

import numpy as np
import pytest

from megatron_cpt.cli import main
from megatron_cpt.data.reading.turns import BadConversation, Mark, turns_of
from megatron_cpt.data.shards.indexed import document_bounds, read_index, read_shard_manifest, read_tokens
from megatron_cpt.data.shards.masked import LEARNED, PROMPT, read_mask
from megatron_cpt.data.tokenizer.interface import load_tokenizer
from tests.data.chat_families import FAMILIES, SPECIAL
from tests.data.conftest import build_bpe, save_tokenizer

TEMPLATE = r"""{%- if tools %}{{ '<|start|>tools ' ~ (tools | tojson) ~ '<|end|>' }}{% endif %}
{%- for m in messages %}{{ '<|start|>' ~ m.role ~ '\n' }}
    {%- if m.reasoning_content %}{{ '<think>' ~ m.reasoning_content ~ '</think>' }}{% endif %}{{ m.content or '' }}
    {%- for call in m.tool_calls or [] %}{{ '<call>' ~ (call.function | tojson) ~ '</call>' }}{% endfor %}{{ '<|end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"""
PLAIN = r"""{% for m in messages %}{{ '<|start|>' ~ m.role ~ '\n' ~ m.content ~ '<|end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"""
STRIPPING = FAMILIES["thinking"]


def user(text, **more):
    return {"role": "user", "content": text, **more}


def says(text, **more):
    return {"role": "assistant", "content": text, **more}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tokenizer(build_bpe(special_tokens=SPECIAL), tmp_path_factory.mktemp("records") / "tokenizer")


@pytest.fixture
def prepare(tmp_path, folder, capsys):
    """Return a function: (records, options) -> exit code, what is said."""

    def run(records, *options, template=TEMPLATE, prefix="a"):
        (tmp_path / "t.jinja").write_text(template)
        path = tmp_path / f"{prefix}.jsonl"
        if isinstance(records, list):
            path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
        else:
            path = records
        arguments = ["data", "prepare-chat", "--input", str(path), "--workers", "1", "--tokenizer", str(folder)]
        arguments += ["--template", str(tmp_path / "t.jinja"), "--output-prefix", str(tmp_path / prefix)]
        with pytest.raises(SystemExit) as left:
            main([*arguments, *options])
        said = capsys.readouterr()
        return left.value.code, said.out + said.err

    return run


@pytest.fixture
def shard(tmp_path, folder):
    """Return a function: prefix -> (learned texts of each document, what prompts say, manifest)."""

    def read(prefix="a"):
        path, tokenizer = tmp_path / f"{prefix}_chat_document", load_tokenizer(folder)
        index = read_index(path)
        bounds, ids, mask = document_bounds(index), read_tokens(index), read_mask(index)
        learned, prompts = [], []
        for start, end in itertools.pairwise(bounds):
            bits = mask[start:end]
            runs = np.split(np.arange(start, end), np.flatnonzero(np.diff(bits & LEARNED)) + 1)
            learned.append([tokenizer.decode(ids[run]) for run in runs if mask[run[0]] & LEARNED])
            prompts.append(tokenizer.decode(ids[start:end][(bits & PROMPT) != 0]))
        return learned, prompts, read_shard_manifest(path)

    return read


TOOL = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": "2"}}}
WRITTEN_CALL = '<call>{"name": "add", "arguments": {"a": 1, "b": "2"}}</call><|end|>'
TALKS = {
    "OpenAI's": {"messages": [user("q"), {"role": "assistant", "content": None, "tool_calls": [CALL]}]},
    "OpenAI's arguments as text": {
        "messages": [
            user("q"),
            {
                "role": "assistant",
                "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": "2"}'}}],
            },
        ]
    },
    "OpenAI's older call": {
        "messages": [
            user("q"),
            {"role": "assistant", "content": None, "function_call": {"name": "add", "arguments": '{"a": 1, "b": "2"}'}},
        ]
    },
    "ShareGPT's": {
        "conversations": [
            {"from": "human", "value": "q"},
            {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1, "b": "2"}}'},
        ]
    },
    "ms-swift's": {
        "messages": [
            user("q"),
            {"role": "tool_call", "content": '{"name": "add", "arguments": {"a": 1, "b": "2"}}'},
        ]
    },
}
RESULTS = {
    "OpenAI's": {"role": "tool", "tool_call_id": "x", "content": "3"},
    "OpenAI's older": {"role": "function", "name": "add", "content": "3"},
    "ShareGPT's": {"from": "observation", "value": "3"},
    "ms-swift's": {"role": "tool_response", "content": "3"},
}


@pytest.mark.parametrize("call", TALKS)
@pytest.mark.parametrize("result", RESULTS)
def test_calls_are_learned_and_results_are_not_in_every_spelling(prepare, shard, call, result):
    (key, turns), *_ = TALKS[call].items()
    answer = {"from": "gpt", "value": "Three."} if key == "conversations" else says("Three.")
    code, said = prepare([{key: [*turns, RESULTS[result], answer], "tools": [TOOL]}])
    assert code == 0, said
    learned, prompts, manifest = shard()
    assert learned == [[WRITTEN_CALL, "Three.<|end|>"]]
    assert prompts[0].startswith('<|start|>tools [{"type": "function", "function": {"name": "add"')
    assert "<|start|>tool\n3<|end|>" in prompts[0]
    assert manifest["statistics"]["turns"] == {"system": 0, "user": 1, "assistant": 2, "tool": 1}


def test_calls_of_one_answer_that_are_turns_of_their_own_are_one_turn():
    turns, _ = turns_of(
        [
            {"from": "human", "value": "q"},
            {"from": "gpt", "value": "Let me see."},
            {
                "from": "function_call",
                "value": '[{"name": "a", "arguments": {}}, {"name": "b", "parameters": {"x": 1}}]',
            },
            {"from": "function_call", "value": '{"name": "c", "arguments": "{\\"y\\": 2}"}'},
            {"from": "observation", "value": "r"},
            {"from": "observation", "value": ""},
            {"from": "gpt", "value": "Done."},
        ]
    )
    assert [turn["role"] for turn in turns] == ["user", "assistant", "tool", "tool", "assistant"]
    assert turns[1]["content"] == "Let me see."
    assert [call["function"] for call in turns[1]["tool_calls"]] == [
        {"name": "a", "arguments": {}},
        {"name": "b", "arguments": {"x": 1}},
        {"name": "c", "arguments": {"y": 2}},
    ]


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ([user("q"), {"role": "tool", "content": "3"}, says("a")], "tool result without a call"),
        ([user("q"), says("a"), {"role": "tool", "content": "3"}], "ends with a tool's result"),
        ([user("q"), {"role": "function_call", "content": "add 1 and 2"}], "not a tool call"),
        ([user("q"), {"role": "function_call", "content": "[]"}], "not a tool call"),
        ([user("q"), {"role": "assistant", "tool_calls": "add"}], "not a tool call"),
        ([user("q"), {"role": "assistant", "tool_calls": [{"function": {"arguments": {}}}]}], "not a tool call"),
        ([user("q"), {"role": "assistant", "tool_calls": []}], "null text"),
        ([user("q"), says("", tool_calls=[])], "empty answer"),
        ([user("q"), says("a", reasoning_content=["b"])], "text is not a string"),
        ([user("q"), says("a", weight=0.5)], "learning mark is not understood"),
        ([user("q"), says("a", weight="1")], "learning mark is not understood"),
        ([user("q"), says("a", weight=1, train=False)], "learning mark is not understood"),
        ([user("q"), says("a", train_detail=[{"from": 1}])], "learning mark is not understood"),
        ([user("q"), says("a"), says("b", tool_calls=[CALL])], "two assistant turns in a row"),
    ],
)
def test_a_bad_turn_is_named(turns, reason):
    with pytest.raises(BadConversation) as bad:
        turns_of(turns)
    assert bad.value.kind == reason


@pytest.mark.parametrize(
    ("said", "mark"),
    [
        ({}, Mark()),
        ({"weight": 0}, Mark(False)),
        ({"weight": 1.0}, Mark(True)),
        ({"loss_weight": 0.0}, Mark(False)),
        ({"loss": False}, Mark(False)),
        ({"train": True}, Mark(True)),
        ({"training": False}, Mark(False)),
        ({"masked": True}, Mark(False)),
        ({"weight": None, "train": None}, Mark()),
        ({"train_detail": [{"begin_offset": 0, "end_offset": 3, "train": True}]}, Mark(True, ((0, 4),))),
        ({"train_detail": [{"begin_offset": 0, "end_offset": 3, "train": False}]}, Mark(True, ())),
        ({"train_detail": []}, Mark(False)),
        ({"train": False, "train_detail": [{"begin_offset": 0, "end_offset": 3, "train": True}]}, Mark(False)),
        ({"training_detail": '[{"begin_offset": 2, "end_offset": 2, "train": true}]'}, Mark(True, ((2, 3),))),
    ],
)
def test_learning_marks_of_the_usual_formats_are_read_and_taken_off(said, mark):
    turns, marks = turns_of([user("q"), says("An answer.", **said)])
    assert marks == [Mark(), mark] and turns[1] == says("An answer.")


@pytest.mark.parametrize("template", [PLAIN, FAMILIES["chatml"]], ids=["unmarked", "marked"])
def test_marks_choose_the_turns_and_the_characters_that_are_learned(prepare, shard, template):
    detail = [{"begin_offset": 0, "end_offset": 4, "train": False}, {"begin_offset": 5, "end_offset": 8, "train": True}]
    turns = [user("one"), says("eins", weight=0), user("two", train=True), says("zwei"), user("three")]
    turns.append(says("drei, vier!", train_detail=detail))
    code, said = prepare([{"messages": turns}], template=template)
    assert code == 0, said
    learned, prompts, manifest = shard()
    assert learned[0][:2] == ["two<|end|>", "zwei<|end|>"]
    assert re.sub("\\W", "", learned[0][2]) in ("vie", "vier") and learned[0][-1].endswith("<|end|>")
    assert "eins" not in prompts[0] and "one" in prompts[0]
    assert manifest["statistics"]["marks"] == {"learned": 2, "not learned": 1}
    assert "turns marked in their records: learned: 2, not learned: 1" in said


def test_a_conversation_of_which_nothing_is_learned_is_left_out_by_name(prepare, shard):
    records = [{"messages": [user("q"), says("a", weight=0)]}, {"messages": [user("q"), says("b")]}]
    code, said = prepare(records)
    assert code == 2 and "a.jsonl:1: nothing is learned" in said
    code, said = prepare(records, "--on-bad", "skip")
    assert code == 0 and "nothing is learned: 1" in said
    assert shard()[2]["rejects"] == {"nothing is learned": 1}


@pytest.mark.parametrize(
    ("key", "template"),
    [
        ("reasoning_content", TEMPLATE),
        ("reasoning", TEMPLATE),
        ("thinking", TEMPLATE),
        ("reasoning_content", TEMPLATE.replace("reasoning_content", "thinking")),
    ],
)
def test_reasoning_reaches_the_template_under_the_name_that_it_knows(prepare, shard, key, template):
    code, said = prepare([{"messages": [user("q"), says("4", **{key: "2 and 2"})]}], template=template)
    assert code == 0, said
    assert shard()[0] == [["<think>2 and 2</think>4<|end|>"]]


def test_what_holds_something_said_and_is_not_read_is_refused(prepare, shard):
    thought = {"messages": [user("q"), says("4", reasoning_content="2 and 2")]}
    call = {"messages": [user("q"), says("Let me see.", tool_calls=[CALL])]}
    for record, key in ((thought, "reasoning_content"), (call, "tool_calls")):
        code, said = prepare([record], template=PLAIN)
        assert code == 2 and f"the template does not read it ({key} of turn 2" in said and "--ignore-keys" in said
        code, said = prepare([record], "--ignore-keys", key, template=PLAIN, prefix=key)
        assert code == 0 and shard(key)[2]["options"]["ignored_keys"] == [key], said
    no_tools = FAMILIES["two-blocks"]  # writes turns of system, user and assistant only
    record = {"messages": [user("q"), says("See."), {"role": "tool", "content": "3"}, says("4")]}
    code, said = prepare([record], template=no_tools)
    assert code == 2 and "content of turn 3, a tool's" in said


def test_what_else_nobody_reads_is_counted_by_name(prepare, shard):
    record = {
        "messages": [user("q", name="Anna"), says("a", id=7, score=None)],
        "id": 5,
        "lang": "de",
        "source": "x",
        "tools": [TOOL],
        "chat_template_kwargs": {"enable_thinking": False},
        "empty": None,
    }
    code, said = prepare([record, record], "--where", "lang=de", template=PLAIN)
    assert code == 0, said
    not_read = shard()[2]["statistics"]["not_read"]
    assert not_read["turn"] == {"id": 2, "name": 2}
    assert not_read["record"] == {"chat_template_kwargs.enable_thinking": 2, "id": 2, "source": 2, "tools": 2}
    assert "not read, of turns: id: 2, name: 2" in said and "not read, of records: " in said


def test_options_documents_and_a_system_prompt_of_a_record_reach_the_template(prepare, shard):
    template = (
        r"""{{ 'style ' ~ (style if style is defined else 'none') ~ ', depth ' ~ (depth or 0) }}
{%- for document in documents or [] %}{{ ' [' ~ document.text ~ ']' }}{% endfor %}"""
        + PLAIN
    )
    record = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "Be kind."}
    record |= {"style": "plain", "chat_template_kwargs": {"depth": 3}, "documents": [{"text": "Foxes."}]}
    asis = {"messages": [{"role": "system", "content": "Be kind."}, user("q"), says("a")], "system": "Be kind."}
    both = asis | {"system": "Be rude."}
    code, said = prepare([record, asis, both], "--set", "depth=1", "--on-bad", "skip", template=template)
    assert code == 0, said
    _, prompts, manifest = shard()
    assert prompts[0].startswith("style plain, depth 3 [Foxes.]<|start|>system\nBe kind.<|end|>\n<|start|>user\nq")
    assert prompts[1].startswith("style none, depth 1<|start|>system\nBe kind.<|end|>\n<|start|>user\nq")
    assert manifest["rejects"] == {"two system prompts": 1}
    assert manifest["statistics"]["given_to_the_template"] == {"style": 1}
    assert "fields of records given to the template: style: 1" in said


def test_records_of_tables_are_read_without_their_nulls(prepare, shard, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    calls = says(None, tool_calls=[{"function": {"name": "add", "arguments": {"a": 1, "b": None}}, "type": None}])
    other = says(
        "x", tool_calls=[{"function": {"name": "add", "arguments": {"a": None, "b": "2"}}, "type": "function"}]
    )
    records = [{"messages": [user("q"), calls], "tools": json.dumps([TOOL])}, {"messages": [user("q"), other]}]
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "in.parquet")
    code, said = prepare(tmp_path / "in.parquet")
    assert code == 0, said
    learned, prompts, _ = shard()
    assert learned == [
        ['<call>{"name": "add", "arguments": {"a": 1}}</call><|end|>'],
        ['x<call>{"name": "add", "arguments": {"b": "2"}}</call><|end|>'],
    ]
    assert "Adds." in prompts[0]


@pytest.mark.parametrize(
    ("policy", "expected"),
    [("learn", ["<|end|>", "b<|end|>"]), ("mask", ["b<|end|>"])],
)
def test_empty_answers_follow_a_policy(prepare, shard, policy, expected):
    record = {"messages": [user("q"), says(" "), user("r"), says("b")]}
    code, said = prepare([record])
    assert code == 2 and "empty answer" in said
    code, said = prepare(
        [record | {"messages": [user("q"), says(""), *record["messages"][2:]]}], "--on-empty-answer", policy
    )
    assert code == 0, said
    assert shard()[0] == [expected] and shard()[2]["notes"]["empty answer kept"] == 1
    assert "warning: 1 answers are empty" in said


THOUGHTS = {
    "messages": [
        *(user("q1"), says("a1", reasoning_content="t1")),
        *(user("q2"), says("a2", reasoning_content="t2")),
    ]
}


def test_a_template_that_rewrites_history_is_warned_of(prepare, shard):
    code, said = prepare([THOUGHTS, {"messages": [user("q"), says("a")]}], template=STRIPPING)
    assert code == 0 and "warning: 1 conversations have earlier answers that the template writes otherwise" in said
    assert shard()[2]["notes"]["history written otherwise"] == 1
    assert shard()[0][0] == [
        "<|start|>assistant\na1<|end|>\n",
        "<|start|>assistant\n<think>\nt2\n</think>\n\na2<|end|>\n",
    ]
    code, said = prepare([THOUGHTS], template=TEMPLATE, prefix="b")
    assert code == 0 and "warning" not in said


def test_the_last_answer_alone_and_each_answer_in_a_document_of_its_own(prepare, shard, tmp_path, folder, capsys):
    last = "<|start|>assistant\n<think>\nt2\n</think>\n\na2<|end|>\n"
    code, said = prepare([THOUGHTS], "--train-on", "last", template=STRIPPING)
    assert code == 0 and "warning" not in said and shard()[0] == [[last]]
    code, said = prepare([THOUGHTS], "--unroll", template=STRIPPING, prefix="u")
    assert code == 0 and "warning" not in said
    learned, prompts, manifest = shard("u")
    assert learned == [[last.replace("2", "1")], [last]]
    assert "q2" not in prompts[0] and "a1" not in prompts[1]
    assert (manifest["documents"], manifest["statistics"]["conversations"]) == (2, 1)
    assert manifest["statistics"]["turns"]["assistant"] == 2
    audit = ["data", "audit", "--input", str(tmp_path / "u_chat_document"), "--tokenizer", str(folder)]
    with pytest.raises(SystemExit) as left:
        main(audit)
    assert left.value.code == 0 and "2 samples encode to the same ids and masks" in capsys.readouterr().out
    code, said = prepare([THOUGHTS], "--unroll", "--pack", "128", template=STRIPPING, prefix="p")
    assert code == 0 and shard("p")[2]["mask"]["pieces"] == 3  # two documents and the filling
    code, said = prepare([THOUGHTS], "--unroll", "--train-on", "last", prefix="x")
    assert code == 2 and "--unroll" in said


def test_unrolled_documents_that_are_too_long_are_left_out_by_name(prepare, shard):
    talk = {"messages": [user("q"), says("a"), user("long " * 50), says("b")]}
    code, said = prepare([talk], "--unroll", "--max-length", "60")
    assert code == 0 and "conversation too long: 1" in said
    assert shard()[0] == [["a<|end|>"]]


def test_ends_of_several_tokens_are_learned_at_every_turn(prepare, shard):
    template = PLAIN.replace("<|end|>\\n'", "</answer></turn>\\n'")
    code, _ = prepare([{"messages": [user("q"), says("a"), user("r"), says("b")]}], template=template)
    assert code == 0 and shard()[0] == [["a</answer></turn>", "b</answer></turn>"]]
    code, _ = prepare(
        [{"messages": [user("q"), says("a"), user("r"), says("b")]}],
        "--train-on-eos",
        "none",
        template=template,
        prefix="n",
    )
    assert code == 0 and shard("n")[0] == [["a", "b"]]
    words = PLAIN.replace("<|end|>", "### end")  # no token of its own
    code, _said = prepare([{"messages": [user("q"), says("a"), user("r"), says("b")]}], template=words, prefix="w")
    assert code == 0 and shard("w")[0] == [["a### end", "b### end", "<|end_of_text|>"]]


def test_a_template_whose_marks_leave_the_end_out_is_warned_of(prepare, shard):
    template = PLAIN.replace(
        "~ m.content ~ '<|end|>\\n' }}",
        "}}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{{ '<|end|>\\n' }}",
    )
    assert "endgeneration" in template
    code, said = prepare([{"messages": [user("q"), says("a")]}], template=template)
    assert code == 0 and "leave out what ends an answer ('<|end|>')" in said
    assert shard()[0] == [["a"]]


def test_control_tokens_in_reasoning_calls_and_tools_are_found(prepare):
    call = {"function": {"name": "add", "arguments": {"a": {"b": ["<|end|>"]}}}}
    for record in (
        {"messages": [user("q"), says("a", reasoning_content="x<|end|>")]},
        {"messages": [user("q"), says("a", tool_calls=[call])]},
        {"messages": [user("q"), says("a")], "tools": [TOOL | {"note": "<|end|>"}]},
    ):
        code, said = prepare([record])
        assert code == 2 and "control token in a message (<|end|> in " in said


def deep(levels):
    return json.loads('{"a":' * levels + "1" + "}" * levels)


@pytest.mark.parametrize("levels", [150, 900])
def test_what_is_nested_too_deep_is_a_bad_conversation_wherever_it_stands(prepare, levels):
    text = '{"a":' * 5000 + "1" + "}" * 5000
    for number, record in enumerate(
        (
            {"messages": [user("q"), says("a", extra=deep(levels))]},
            {"messages": [user("q"), says("a", tool_calls=[{"function": {"name": "f", "arguments": deep(levels)}}])]},
            {"messages": [user("q"), says("a")], "tools": [deep(levels)]},
        )
    ):
        good = {"messages": [user("q"), says("a")]}
        code, said = prepare([record, good], "--number", "1", "--on-bad", "skip", prefix=f"p{number}")
        assert code == 0 and "nested too deep: 1" in said
    code, said = prepare([{"messages": [user("q"), says("a", tool_calls=text)]}])
    assert code == 2 and "not a tool call" in said


def test_images_are_refused_by_name(prepare):
    code, said = prepare([{"messages": [user("q"), says("a")], "images": ["a.png"]}])
    assert code == 2 and "images, audio or video (the record has images)" in said


def test_learning_everything_keeps_what_records_exclude(prepare, shard):
    record = {"messages": [user("q", train=False), says("a"), user("r"), says("b", weight=0)]}
    code, said = prepare([record], "--train-on", "all")
    assert code == 0, said
    text = "|".join(shard()[0][0])
    assert "a<|end|>" in text and "<|start|>user\nr<|end|>" in text
    assert "b" not in text.replace("|", " ").split("assistant")[-1] and "user\nq" not in text
