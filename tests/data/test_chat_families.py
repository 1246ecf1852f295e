"""Ids and masks of whole records equal transformers' own, for templates with the features of the public training templates."""

import itertools
import json
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


@pytest.mark.parametrize("family", HEADER_OUTSIDE)
def test_the_same_templates_without_their_marks_give_the_same_masks(family, ours, theirs):
    unmarked = re.sub(r"\{%-? *(end)?generation *-?%\}", "", FAMILIES[family])
    assert unmarked.count("generation") == unmarked.count("add_generation_prompt")
    records = records_of(family)
    documents, _, _ = ours(unmarked, records)
    for record, (ids, learned) in zip(records, documents, strict=True):
        expected_ids, expected = theirs(FAMILIES[family], record)
        assert ids[:-1] == expected_ids, record
        assert learned[:-1] == expected, (record, np.flatnonzero(np.array(learned[:-1]) != expected).tolist())
