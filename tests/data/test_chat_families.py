"""Ids and masks of whole records equal transformers' own, for templates with the features of the public training templates."""

import itertools
import json
import random
import re

import numpy as np
import pytest

from megatron_cpt.cli import main
from megatron_cpt.data.shards.indexed import document_bounds, read_index, read_shard_manifest, read_tokens
from megatron_cpt.data.shards.masked import LEARNED, read_mask
from tests.data.chat_families import FAMILIES, HEADER_OUTSIDE, SPECIAL, WITH_REASONING, WITH_TOOLS
from tests.data.conftest import build_bpe, save_tokenizer

SYSTEM = {"role": "system", "content": "Speak briefly."}
ASK = {"role": "user", "content": "What is it? 人工知能"}
ANSWER = {"role": "assistant", "content": "  It is\n- a fox\n- 研究 🦊"}
MORE = {"role": "user", "content": "And it's <here>?"}
LAST = {"role": "assistant", "content": "A small one."}
TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Looks up a word.",
        "parameters": {"type": "object", "properties": {"word": {"type": "string"}}, "required": ["word"]},
    },
}
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "look_up", "arguments": {"word": "狐", "n": 2}}}
SECOND_CALL = {"id": "abcdefghj", "type": "function", "function": {"name": "look_up", "arguments": {}}}
RESULT = {"role": "tool", "name": "look_up", "tool_call_id": "abcdefghi", "content": "fox, 2"}
SECOND_RESULT = RESULT | {"tool_call_id": "abcdefghj", "content": "nothing"}


def calling(*calls, **more):
    return {"role": "assistant", "tool_calls": list(calls)} | more


def records_of(family):
    """Return records that a family's template takes."""
    found = [
        {"messages": [ASK, ANSWER]},
        {"messages": [ASK, ANSWER, MORE, LAST]},
        {"messages": [SYSTEM, ASK, ANSWER, MORE, LAST, ASK, ANSWER]},
    ]
    if family in WITH_TOOLS:
        content = {"content": ""} if family == "outputs" else {}
        found += [
            {"messages": [ASK, calling(CALL, **content), RESULT, LAST], "tools": [TOOL]},
            {"messages": [ASK, calling(CALL, **content), RESULT, LAST, MORE, ANSWER], "tools": [TOOL]},
            {"messages": [ASK, ANSWER, MORE, calling(CALL, **content)], "tools": [TOOL]},
            {"messages": [ASK, calling(SECOND_CALL, **content), SECOND_RESULT, calling(CALL, **content), RESULT, LAST]},
        ]
        if family not in ("channels", "trimmed"):
            two = calling(CALL, SECOND_CALL, **content)
            found.append({"messages": [ASK, two, RESULT, SECOND_RESULT, LAST, MORE, ANSWER], "tools": [TOOL]})
        if family in ("chatml", "thinking", "next-speaker", "outputs"):
            found.append({"messages": [ASK, calling(CALL, content="Let me see."), RESULT, LAST], "tools": [TOOL]})
    if family in WITH_REASONING:
        thought = {"reasoning_content": "An animal."}
        found += [
            {"messages": [ASK, ANSWER | thought, MORE, LAST | {"reasoning_content": "It is small."}]},
            {"messages": [ASK, LAST | {"thinking": "It is small."}]},
            {"messages": [ASK, LAST | {"reasoning": "It is small."}]},
            {"messages": [ASK, calling(CALL, **thought), RESULT, LAST | thought], "tools": [TOOL]},
        ]
    if family == "thinking":
        found.append({"messages": [ASK, LAST | {"content": "<think>\nSmall.\n</think>\n\nA small one."}]})
        found.append({"messages": [ASK, ANSWER, MORE, LAST], "chat_template_kwargs": {"enable_thinking": False}})
    if family == "channels":
        found.append({"messages": [ASK, LAST], "chat_template_kwargs": {"reasoning_effort": "high"}})
    if family == "documents":
        documents = [{"doc_id": 1, "title": "Foxes", "text": "Foxes are small."}]
        found += [
            {"messages": [ASK, LAST], "documents": documents},
            {"messages": [ASK | {"name": "Anna"}, LAST], "controls": {"length": "short"}},
        ]
    if family in ("model", "next-speaker", "parts"):
        found.append({"messages": [parts_of(ASK), parts_of(LAST), parts_of(MORE), parts_of(ANSWER)]})
    return found[3:] if family == "parts" else found


def parts_of(turn):
    half = len(turn["content"]) // 2
    texts = [turn["content"][:half], turn["content"][half:]]
    return turn | {"content": [{"type": "text", "text": text} for text in texts]}


@pytest.fixture(scope="module")
def family_dir(tmp_path_factory):
    """A tokenizer with the special tokens of all families, whose offsets are whole."""
    folder = save_tokenizer(build_bpe(special_tokens=SPECIAL), tmp_path_factory.mktemp("families") / "tokenizer")
    settings = {"eos_token": "<|end_of_text|>", "bos_token": "<bos>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def theirs(family_dir):
    """Return a function: (template, record) -> ids and mask by transformers."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(family_dir / "tokenizer.json"), bos_token="<bos>", eos_token="<|end_of_text|>"
    )

    def apply(source, record):
        fields = {key: value for key, value in record.items() if key not in ("messages", "chat_template_kwargs")}
        found = tokenizer.apply_chat_template(
            record["messages"],
            chat_template=source,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            **fields,
            **record.get("chat_template_kwargs", {}),
        )
        return found["input_ids"], found["assistant_masks"]

    return apply


@pytest.fixture
def ours(tmp_path, family_dir, capsys):
    """Return a function: (template, records, options) -> (ids, learned) of each document, the manifest, what is said."""

    def run(source, records, *options, prefix="a"):
        (tmp_path / "t.jinja").write_text(source)
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        (tmp_path / f"{prefix}.jsonl").write_text(lines)
        arguments = ["data", "prepare-chat", "--input", str(tmp_path / f"{prefix}.jsonl"), "--workers", "1"]
        arguments += ["--tokenizer", str(family_dir), "--template", str(tmp_path / "t.jinja")]
        with pytest.raises(SystemExit) as left:
            main([*arguments, "--output-prefix", str(tmp_path / prefix), *options])
        said = capsys.readouterr()
        assert left.value.code == 0, said.err
        index = read_index(tmp_path / f"{prefix}_chat_document")
        bounds, ids, mask = document_bounds(index), read_tokens(index), read_mask(index)
        documents = [
            (ids[start:end].tolist(), (mask[start:end] & LEARNED).tolist()) for start, end in itertools.pairwise(bounds)
        ]
        return documents, read_shard_manifest(tmp_path / f"{prefix}_chat_document"), said.out

    return run


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_and_masks_of_marked_templates_are_those_of_transformers(family, ours, theirs):
    records = records_of(family)
    documents, _, _ = ours(FAMILIES[family], records)
    assert len(documents) == len(records)
    for record, (ids, learned) in zip(records, documents, strict=True):
        expected_ids, expected = theirs(FAMILIES[family], record)
        assert ids[:-1] == expected_ids, record
        assert learned[:-1] == expected, record
        assert learned[-1] == 0


MOVED_MARKS = {
    "thinking": [
        (r"{%- generation %}{{ '<|start|>assistant\n' }}", r"{{- '<|start|>assistant\n' }}{% generation %}"),
        (r"{{- '<|end|>\n' }}{% endgeneration %}", r"{{- '<|end|>' }}{% endgeneration %}{{ '\n' }}"),
    ],
    "within": [
        (r"{{ '</turn>\n' }}{% endgeneration %}", r"{{ '</turn>' }}{% endgeneration %}{{ '\n' }}"),
    ],
}
"""Marks of families whose blocks hold more: moved to where the prompt for an answer ends, and to the last special token."""


def without_marks(source):
    return re.sub(r"\{%(-?) *(end)?generation *-?%\}", r"{%\1 if true %}{% endif %}", source)


@pytest.mark.parametrize("family", (*HEADER_OUTSIDE, *MOVED_MARKS))
def test_the_same_templates_without_their_marks_give_the_same_masks(family, ours, theirs):
    source = FAMILIES[family]
    for before, after in MOVED_MARKS.get(family, ()):
        assert before in source
        source = source.replace(before, after)
    unmarked = without_marks(source)
    assert "endgeneration" not in unmarked
    # an empty block of reasoning that the prompt holds is the prompt's, which marks within the turn do not say
    records = [record for record in records_of(family) if "enable_thinking" not in str(record)]
    documents, _, _ = ours(unmarked, records)
    for record, (ids, learned) in zip(records, documents, strict=True):
        expected_ids, expected = theirs(source, record)
        assert ids[:-1] == expected_ids, record
        assert learned[:-1] == expected, (record, np.flatnonzero(np.array(learned[:-1]) != expected).tolist())


@pytest.mark.full
@pytest.mark.parametrize("family", FAMILIES)
def test_random_conversations_have_the_masks_of_transformers(family, ours, theirs):
    """Words that look like heads, tags, white space and JSON, in every place where somebody says something."""
    records = [random_record(family, random.Random(f"{family} {seed}")) for seed in range(40)]
    for source in filter(
        None, (FAMILIES[family], without_marks(FAMILIES[family]) if family in HEADER_OUTSIDE else None)
    ):
        documents, _, _ = ours(source, records, prefix="m" if source is FAMILIES[family] else "u")
        for record, (ids, learned) in zip(records, documents, strict=True):
            assert (ids[:-1], learned[:-1]) == theirs(FAMILIES[family], record), record


def random_record(family, chooser):
    words = [
        "assistant",
        "user\n",
        "model\n",
        " ",
        "\n",
        "\n\n",
        "<think>",
        "</think>",
        "🦊",
        "研究",
        "fox",
        "It's",
        "\t",
        "é",
    ]
    words += ["</tool_call>", "<tool_call>", "{", "}", '"', "'", "\\", "assistant\n\n", "[", "]", "0", "<sep"]

    def text():
        return next(
            filter(str.strip, ("".join(chooser.choices(words, k=chooser.randint(1, 6))) for _ in range(99))), "a"
        )

    def call(number):
        values = [text(), 1, 2.5, True, None, ["x", 1], {"k": text()}, ""]
        arguments = {name: chooser.choice(values) for name in chooser.sample("abc", chooser.randint(0, 2))}
        return CALL | {"id": f"abcdefg{number:02d}", "function": {"name": "look_up", "arguments": arguments}}

    def said(turn):
        thinks = family in WITH_REASONING and chooser.random() < 0.5
        return turn | ({"reasoning_content": text()} if thinks else {})

    messages = [{"role": "system", "content": text()}] if chooser.random() < 0.4 else []
    for number in range(chooser.randint(1, 3)):
        messages.append({"role": "user", "content": text()})
        for step in range(chooser.randint(0, 2) if family in WITH_TOOLS else 0):
            calls = [call(number * 10 + step * 3)]
            if family not in ("channels", "trimmed") and chooser.random() < 0.5:
                calls.append(call(number * 10 + step * 3 + 1))
            content = {"content": ""} if family == "outputs" else {}
            if family in ("chatml", "thinking", "next-speaker") and chooser.random() < 0.4:
                content = {"content": text()}
            messages.append(said(calling(*calls, **content)))
            messages += [RESULT | {"tool_call_id": each["id"], "content": text()} for each in calls]
        messages.append(said({"role": "assistant", "content": text()}))
    return {"messages": [parts_of(turn) for turn in messages] if family == "parts" else messages}


def test_a_developer_stays_one_where_the_template_tells_him_from_the_system(ours, theirs):
    record = {"messages": [SYSTEM | {"role": "developer"}, ASK, LAST]}
    ((ids, learned),), manifest, _ = ours(FAMILIES["channels"], [record])
    assert (ids[:-1], learned[:-1]) == theirs(FAMILIES["channels"], record)
    assert manifest["statistics"]["turns"]["system"] == 1
    ((ids, _),), _, _ = ours(FAMILIES["chatml"], [record], prefix="b")
    assert ids[:-1] == theirs(FAMILIES["chatml"], {"messages": [SYSTEM, ASK, LAST]})[0]
