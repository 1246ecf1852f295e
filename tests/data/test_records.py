"""Every kind of bad line is named, every good one is kept, and nothing is counted twice."""

import json

import pytest

from megatron_cpt.data.reading import records
from megatron_cpt.data.reading.records import Problem, parse_lines, parse_text_file, parse_values

LIMIT = 1 << 20


def parse(data, format="jsonl", keys=("text",), limit=LIMIT):
    return parse_lines(data, format, keys, limit, is_start=True, is_end=True)


def line(text):
    return json.dumps({"text": text}).encode()


@pytest.mark.parametrize(
    ("bad", "kind"),
    [
        (b'{"text": "a"', records.INVALID_JSON),
        (b"plain words", records.INVALID_JSON),
        (b'{"text": "a"}{"text": "b"}', records.TWO_OBJECTS),
        (b'{"text": "a"} {"text": "b"}', records.TWO_OBJECTS),
        (b'{"text": "a"} trailing', records.INVALID_JSON),
        (b'{"body": "a"}', records.MISSING_KEY),
        (b'{"text": null}', records.NULL_TEXT),
        (b'{"text": 5}', records.NOT_TEXT),
        (b'{"text": ["a"]}', records.NOT_TEXT),
        (b'["text"]', records.NOT_AN_OBJECT),
        (b'"text"', records.NOT_AN_OBJECT),
        (b'{"text": "\xff"}', records.INVALID_UTF8),
        (b'{"text": "\\ud800"}', records.INVALID_UTF8),
    ],
)
def test_each_kind_of_bad_line_is_named_and_its_neighbours_are_kept(bad, kind):
    parsed = parse(line("one") + b"\n" + bad + b"\n" + line("two") + b"\n")
    assert parsed.texts == [["one", "two"]]
    assert parsed.lines == [0, 2]
    assert [(problem.line, problem.kind, problem.raw) for problem in parsed.problems] == [(1, kind, bad)]


def test_notes_lose_nothing_and_are_counted():
    parsed = parse(b"\xef\xbb\xbf" + line("one") + b"\n\n  \r\n" + line("") + b"\n" + line("two"))
    assert parsed.texts == [["one", "two"]]
    assert parsed.notes == {
        records.BYTE_ORDER_MARK: 1,
        records.BLANK_LINE: 2,
        records.EMPTY_TEXT: 1,
        records.NO_FINAL_NEWLINE: 1,
    }
    assert parsed.num_lines == 5 and not parsed.problems
    assert len(parsed.lines) + 2 + 1 == parsed.num_lines


def test_a_mark_and_a_missing_newline_are_looked_for_at_the_ends_of_the_file_only():
    parsed = parse_lines(line("one"), "jsonl", ("text",), LIMIT, is_start=False, is_end=False)
    assert parsed.texts == [["one"]] and not parsed.notes


def test_what_python_programs_write_is_read():
    parsed = parse(b'{"text": "a", "score": NaN, "big": 123456789012345678901234567890}\n')
    assert parsed.texts == [["a"]] and not parsed.problems


def test_windows_line_ends_are_line_ends():
    assert parse(line("a") + b"\r\n" + line("b") + b"\r\n").texts == [["a", "b"]]
    assert parse(b"a\r\nb\r\n", "txt").texts == [["a", "b"]]


def test_several_keys_give_aligned_texts_or_none():
    data = b'{"q": "1", "a": "2"}\n{"q": "3"}\n{"q": "5", "a": ""}\n{"q": "", "a": ""}\n'
    parsed = parse(data, keys=("q", "a"))
    assert parsed.texts == [["1", "5"], ["2", ""]]
    assert [problem.kind for problem in parsed.problems] == [records.MISSING_KEY]
    assert parsed.notes == {records.EMPTY_TEXT: 1}


def test_text_lines_are_documents():
    parsed = parse("eins\n\nzwei ü\n".encode() + b"\xff\n", "txt")
    assert parsed.texts == [["eins", "zwei ü"]]
    assert [(problem.line, problem.kind) for problem in parsed.problems] == [(3, records.INVALID_UTF8)]


def test_a_line_over_the_limit_is_a_problem_wherever_it_stands():
    for format, make in (("jsonl", line), ("txt", str.encode)):
        parsed = parse(make("a") + b"\n" + make("x" * 200) + b"\n" + make("b") + b"\n", format, limit=100)
        assert parsed.texts == [["a", "b"]]
        assert [(problem.line, problem.kind) for problem in parsed.problems] == [(1, records.TOO_LONG)]


def test_a_text_file_is_one_document():
    assert parse_text_file(b"\xef\xbb\xbfa\nb\n", ("text",)).texts == [["a\nb\n"]]
    assert parse_text_file(b"", ("text",)).notes == {records.EMPTY_TEXT: 1}
    assert parse_text_file(b"\xff", ("text",)).problems[0].kind == records.INVALID_UTF8


def test_table_rows_follow_the_same_rules():
    parsed = parse_values([["a", None, 5, "", "b"]], ("text",))
    assert parsed.texts == [["a", "b"]] and parsed.lines == [0, 4]
    assert [problem.kind for problem in parsed.problems] == [records.NULL_TEXT, records.NOT_TEXT]


def test_a_reject_record_keeps_the_line_whatever_its_bytes():
    assert Problem(0, "k", "d", b"a").record("f", 3) == {
        "path": "f",
        "line": 3,
        "reason": "k",
        "detail": "d",
        "raw": "a",
    }
    assert Problem(0, "k", raw=b"\xff").record("f", 3)["raw_base64"] == "/w=="
    assert Problem(0, "k", raw=b"x" * (2 << 20)).record("f", 3)["raw_bytes"] == 2 << 20


def test_a_line_nested_beyond_the_parsers_is_a_bad_line_and_no_crash():
    parsed = parse_lines(
        b'{"text": "a", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n",
        "jsonl",
        ("text",),
        1 << 20,
        is_start=True,
        is_end=True,
    )
    assert [(problem.kind, problem.detail) for problem in parsed.problems] == [("invalid JSON", "nested too deeply")]


def test_no_line_of_one_byte_is_lost():
    for byte in range(256):
        for format in ("txt", "jsonl"):
            parsed = parse(bytes([byte]) + b"\n", format)
            accounted = len(parsed.lines) + len(parsed.problems) + parsed.notes[records.BLANK_LINE]
            assert parsed.num_lines == accounted, (byte, format)
