"""JSON arrays and indented objects are read record by record by every verb, whatever a block's bounds cut."""

import gzip
import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_cpt.cli import main
from megatron_cpt.data.reading.documents import list_sources
from megatron_cpt.data.reading.json_values import ValueSplitter, holds_values
from megatron_cpt.data.reading.record_files import Reading, read_records
from megatron_cpt.data.reading.records import Problem
from megatron_cpt.data.reading.streams import Layout, parse_piece, pieces_of

ALPACA = [
    {"instruction": "Say [hi] {twice}", "input": "", "output": 'He said "hi", \\ and\nleft.', "text": "a ] b"},
    {"text": "日本語 \u2028 😀", "score": 1.5, "tags": ["x", ["y"], {"z": None}]},
    {"text": "last"},
]


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def documents(path: Path) -> list[dict]:
    (source,) = list_sources([path])
    return [record.value for record in read_records(source, Reading())]


FORMS = {
    "array": json.dumps(ALPACA),
    "array with indents": json.dumps(ALPACA, indent=4, ensure_ascii=False),
    "array, an object a line": "[\n" + ",\n".join(map(json.dumps, ALPACA)) + "\n]\n",
    "array behind spaces and a mark": "\ufeff \n" + json.dumps(ALPACA, indent="\t"),
    "Windows line ends": json.dumps(ALPACA, indent=2).replace("\n", "\r\n"),
    "indented objects": "\n".join(json.dumps(record, indent=2) for record in ALPACA),
    "indented objects with commas": ",\n".join(json.dumps(record, indent=2) for record in ALPACA) + ",\n",
    "arrays one after the other": json.dumps(ALPACA[:2], indent=1) + "\n" + json.dumps(ALPACA[2:], indent=1),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.json.gz"])
def test_every_way_to_write_records_gives_the_same_records(form, name, tmp_path):
    path = write(tmp_path / name, FORMS[form])
    (source,) = list_sources([path])
    assert source.format == "json" and not source.is_splittable
    assert documents(path) == ALPACA
    layout = Layout()
    for size in (1, 50, 1 << 20):
        found = [parse_piece(piece, layout) for piece in pieces_of(source, 0, layout, size)]
        assert [text for parsed in found for text in parsed.texts[0]] == [record["text"] for record in ALPACA]
        assert not any(parsed.problems for parsed in found)
        assert sum(parsed.num_lines for parsed in found) == 3
        assert sum(parsed.notes.total() for parsed in found) == ("mark" in form)


@pytest.mark.parametrize(
    ("text", "is_value"),
    [
        ('{"text": "a"}\n', False),
        ('{"text": "a"}', False),
        ('{"text": "a\n{"text": "b"}\n', False),  # a line that broke off
        ('{"text": "a",\n{"text": "b"}\n', False),
        ('{"text": "a"}{"text": "b"}\n{"text": "c"}\n', False),
        ('[{"role": "user"}]\n[{"role": "user"}]\n', False),  # a list per line
        ("[INFO] started\n", False),
        ("", False),
        ("plain\n", False),
        ('{\n"text": "a"}\n', True),
        ('{"text": "a",\n "id": 3}\n', True),
        ('[{"text": "a"}]', True),
        ("[]", True),
        ('{"a": {\n "b": "' + "x" * 100, True),
        ('{"a": [\n 3, ' + "4," * 100, True),
    ],
)
def test_the_first_bytes_tell_lines_from_values(text, is_value):
    assert holds_values(text.encode()) is is_value


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.sampled_from('ab"\\[]{},:\n é'), max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(_JSON, max_size=6),
    indent=st.sampled_from([None, 1]),
    is_array=st.booleans(),
    step=st.integers(1, 40),
)
def test_values_come_whole_wherever_the_stream_is_cut(values, indent, is_array, step):
    if not is_array:  # outside of an array only objects are told apart
        values = [value for value in values if isinstance(value, dict)]
    dumps = json.dumps(values, indent=indent) if is_array else " ".join(json.dumps(v, indent=indent) for v in values)
    data, splitter = dumps.encode(), ValueSplitter(1 << 20)
    found = [value for start in range(0, len(data), step) for value in splitter.feed(data[start : start + step])]
    found += splitter.finish()
    assert [json.loads(value) for value in found] == values
    assert not any(b"\n" in value for value in found)


@settings(max_examples=60, deadline=None)
@given(data=st.lists(st.sampled_from('{}[],:"\\\n a1'), max_size=30).map("".join), step=st.integers(1, 9))
def test_rubbish_ends_and_no_cut_changes_what_is_found(data, step):
    def split(size: int) -> list:
        splitter = ValueSplitter(1 << 20)
        parts = [data.encode()[start : start + size] for start in range(0, len(data), size)]
        return [*(value for part in parts for value in splitter.feed(part)), *splitter.finish()]

    assert split(step) == split(100)


def values_of(text: str, max_bytes: int = 1 << 20) -> list:
    splitter = ValueSplitter(max_bytes)
    found = [*splitter.feed(text.encode()), *splitter.finish()]
    return [(value.kind, value.detail) if isinstance(value, Problem) else value.decode() for value in found]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('[{"a": 1}, {"a": }, {"a": 3}]', ['{"a": 1}', '{"a": }', '{"a": 3}']),
        ('[{"a": 1}, "x, y", 5, [1, 2]]', ['{"a": 1}', '"x, y"', "5", "[1, 2]"]),
        ('[{"a": 1}', ['{"a": 1}', ("damaged or truncated file", "the array has no end")]),
        ('[{"a": 1}, {"b": "x', ['{"a": 1}', ("damaged or truncated file", "the file ends within a record")]),
        ('[{"a": "x\ny"}, {"b": 1}]', [("invalid JSON", "a line break within a string"), '{"b": 1}']),
        ('[{"a": "0123456789"}, {"b": 1}]', [("document too long", "19 bytes"), '{"b": 1}']),
        ('rubbish {"a": 1}', ["rubbish", '{"a": 1}']),
        ('[{"a": NaN}] ] }{"b": 1}', ['{"a": NaN}', "]", "}", '{"b": 1}']),
    ],
)
def test_a_bad_value_costs_only_itself(text, found):
    assert values_of(text, 12 if "0123" in text else 1 << 20) == found


def test_a_bad_record_is_named_by_its_number_and_policy_decides(tmp_path, capsys):
    write(tmp_path / "in/a.json", '[{"text": "a"},\n {"txt": "b"},\n {"text": "c"}, "d"')
    assert run("validate", "--input", tmp_path / "in", "--workers", 1) == 1
    out = capsys.readouterr().out
    assert "2 documents in 4 lines; 1 missing key; 1 damaged or truncated file" in out
    assert "line 2: missing key" in out
    assert run("repair", "--input", tmp_path / "in", "--output-dir", tmp_path / "out", "--workers", 1) == 0
    assert (tmp_path / "out/a.jsonl").read_text() == '{"text": "a"}\n{"text": "c"}\n'
    rejects = [json.loads(line) for line in (tmp_path / "out/a.jsonl.rejects").read_text().splitlines()]
    assert [(entry["line"], entry["reason"]) for entry in rejects] == [
        (2, "missing key"),
        (4, "damaged or truncated file"),
    ]


def run(*words: object) -> int:
    with pytest.raises(SystemExit) as left:
        main(["data", *map(str, words)])
    return left.value.code


@pytest.mark.parametrize(
    ("words", "output"),
    [
        (["extract", "--input", "in", "--output-dir", "out"], "out/a.jsonl"),
        (["merge-files", "--input", "in", "--output-dir", "out"], "out/documents-00000.jsonl"),
        (["dedup", "c=in", "--output", "out"], "out/c/a.jsonl"),
        (["sample", "in", "--output", "out"], "out/a.jsonl"),
        (["split", "c=in", "--output", "out", "--fraction", "0.000000001", "--name", "v"], "out/c/train/a.jsonl"),
        (["decontaminate", "c=in", "--against", "e=eval.json", "--output", "out"], "out/c/a.jsonl"),
    ],
)
def test_every_verb_that_reads_documents_reads_an_array(words, output, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "in/a.json", json.dumps(ALPACA, indent=2))
    write(tmp_path / "eval.json", json.dumps([{"text": "one two three four five six seven eight nine"}], indent=2))
    assert run(*words) == 0
    assert [json.loads(line) for line in Path(output).read_text().splitlines()] == ALPACA


def test_tokenizing_an_array_gives_the_shard_of_its_lines_and_the_audit_and_the_trace_know_it(tmp_path, bpe_dir):
    from megatron_cpt.data.audit.shards import audit_shard
    from megatron_cpt.data.audit.trace import trace_document
    from megatron_cpt.data.tokenize.driver import tokenize
    from megatron_cpt.data.tokenizer.interface import load_tokenizer

    write(tmp_path / "a.json", json.dumps(ALPACA, indent=2))
    write(tmp_path / "b.jsonl", "".join(json.dumps(record) + "\n" for record in ALPACA))
    for name in ("a.json", "b.jsonl"):
        tokenize([tmp_path / name], bpe_dir, output_prefix=tmp_path / name[0], workers=2)
    one, other = (tmp_path / f"{name}_text_document" for name in "ab")
    for suffix in (".bin", ".idx"):
        assert one.with_name(one.name + suffix).read_bytes() == other.with_name(other.name + suffix).read_bytes()
    assert trace_document(one, 2).line == 3
    assert not audit_shard(one, load_tokenizer(bpe_dir), None).problems


def test_a_named_format_is_taken_at_its_word(tmp_path):
    path = write(tmp_path / "a.json", json.dumps(ALPACA))
    assert list_sources([path], format="jsonl")[0].format == "jsonl"
    assert list_sources([os.fspath(path)], format="json")[0].format == "json"
