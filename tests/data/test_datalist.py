"""Data lists in every format keep their numbers and name the line that is wrong."""

import contextlib
import os
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_cpt.data.lists.data_list import (
    FORMATS,
    DataEntry,
    detect_format,
    parse_data_list,
    read_data_list,
    render_data_list,
    write_data_list,
)
from megatron_cpt.errors import DataError

_PREFIXES = st.from_regex(r"[a-z./_][a-zA-Z0-9./_-]{0,20}", fullmatch=True).filter(
    lambda text: not text.startswith("-")
)
_CORPORA = st.from_regex(r"[a-z][a-z0-9_]{0,8}", fullmatch=True)
_TOKENS = st.integers(1, 10**15)
_WEIGHTS = st.floats(1e-300, 1e12, allow_nan=False)


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_recognised_by_its_content_and_reads_its_own_sample(name):
    assert detect_format(FORMATS[name].sample) == name
    assert parse_data_list(FORMATS[name].sample)[0].prefix == "data/en_text_document"


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=40, deadline=None)
@given(rows=st.lists(st.tuples(_TOKENS, _PREFIXES, _CORPORA), min_size=1, max_size=5))
def test_token_counts_survive_every_format_to_the_last_digit(name, rows):
    entries = [DataEntry(tokens=tokens, prefix=prefix, corpus=corpus) for tokens, prefix, corpus in rows]
    text = render_data_list(entries, name)
    found = parse_data_list(text)
    assert [(entry.amount, entry.prefix) for entry in found] == [(entry.amount, entry.prefix) for entry in entries]
    if name in ("yaml", "csv", "blendcorpus"):
        assert [entry.corpus for entry in found] == [entry.corpus for entry in entries]
    assert render_data_list(found, name) == text if name not in ("csv",) else True


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=40, deadline=None)
@given(rows=st.lists(st.tuples(_WEIGHTS, _PREFIXES), min_size=1, max_size=5))
def test_weights_survive_every_format_as_the_same_double(name, rows):
    entries = [DataEntry(weight=Fraction(weight), prefix=prefix, corpus="c") for weight, prefix in rows]
    found = parse_data_list(render_data_list(entries, name))
    assert [float(entry.amount) for entry in found] == [weight for weight, _ in rows]


def test_a_list_without_weights_stays_without_weights():
    entries = parse_data_list("a_text_document b_text_document\n")
    assert [entry.amount for entry in entries] == [None, None]
    assert parse_data_list(render_data_list(entries, "megatron")) == entries
    with pytest.raises(DataError, match="neither tokens nor weight"):
        render_data_list(entries, "llm-jp")


def test_a_list_written_to_disk_reads_back_equal(tmp_path):
    entries = [DataEntry(tokens=7, prefix="with space/a", corpus="x"), DataEntry(tokens=2**53 + 1, prefix='q"b')]
    write_data_list(tmp_path / "list.yaml", entries)
    assert read_data_list(tmp_path / "list.yaml") == entries


def test_white_space_in_a_path_is_refused_by_formats_that_would_tear_it():
    entries = [DataEntry(tokens=7, prefix="with space/a", corpus="x")]
    assert parse_data_list(render_data_list(entries, "llm-jp"))[0].prefix == "with space/a"
    for name in ("blendcorpus", "weights", "megatron", "json"):
        with pytest.raises(DataError, match="white space"):
            render_data_list(entries, name)


def test_the_shell_lists_that_llm_jp_writes_are_read_without_a_shell():
    text = """# v4 data
function calc() {
    repeat=$1; shift
}
ROOT="/data/v4"
export TRAIN_DATA_PATH=(
    # code
    $(calc 8 106882005818 ${ROOT}/code_text_document)
    #$(calc 8 5 ${ROOT}/off_text_document)
    $(calc 0 5 ${ROOT}/zero_text_document)
    51572633747 "$ROOT/en_text_document"  # a comment
    9.24274e+09 rounded_by_awk
)
"""
    assert parse_data_list(text) == [
        DataEntry(tokens=855056046544, prefix="/data/v4/code_text_document"),
        DataEntry(tokens=51572633747, prefix="/data/v4/en_text_document"),
        DataEntry(tokens=9242740000, prefix="rounded_by_awk"),
    ]


def test_a_shell_string_that_grows_line_by_line_is_a_list_too():
    text = """DATASET_DIR=/data/v3
export TRAIN_DATA_PATH=""
# code
TRAIN_DATA_PATH="${TRAIN_DATA_PATH} 14486363187 ${DATASET_DIR}/stack_0000.jsonl_text_document"
TRAIN_DATA_PATH="$TRAIN_DATA_PATH 12799385151 ${DATASET_DIR}/stack_0001.jsonl_text_document"
"""
    assert parse_data_list(text) == [
        DataEntry(tokens=14486363187, prefix="/data/v3/stack_0000.jsonl_text_document"),
        DataEntry(tokens=12799385151, prefix="/data/v3/stack_0001.jsonl_text_document"),
    ]
    with pytest.raises(DataError, match="line.txt:3: '5' is left over"):
        parse_data_list('VALID_DATA_PATH=""\n\nVALID_DATA_PATH="${VALID_DATA_PATH} 5"\n', "line.txt")


def test_the_other_ways_in_which_shell_lists_are_written_are_read(monkeypatch):
    monkeypatch.delenv("ROOT", raising=False)
    text = """calc() {
    local repeat=$1
    echo $((repeat * $2))
}
HERE="$(cd "$(dirname "$0")" && pwd)"
ROOT=/data; ROOT+=/v4
declare -a TRAIN_DATA_PATH=(
    --data-path
    5 '/data/$HOME/a #1 (old)' # quoted, as it stands
    6 "${ROOT}/b"   7 /data/c\\ d
)
TRAIN_DATA_PATH+=( 8 $ROOT/e ) ;
"""
    text = text.replace("ROOT=/data; ROOT+=/v4", "ROOT=/data;  # the disk\nROOT+=/v4")
    assert [(entry.tokens, entry.prefix) for entry in parse_data_list(text)] == [
        (5, "/data/$HOME/a #1 (old)"),
        (6, "/data/v4/b"),
        (7, "/data/c d"),
        (8, "/data/v4/e"),
    ]
    growing = 'TRAIN_DATA_PATH=""\nPAIR="3 c"\nTRAIN_DATA_PATH+=" 1 a"\nTRAIN_DATA_PATH="$TRAIN_DATA_PATH 2 b $PAIR"\n'
    assert [(entry.tokens, entry.prefix) for entry in parse_data_list(growing)] == [(1, "a"), (2, "b"), (3, "c")]


def test_numbers_as_names_of_corpora_and_comments_behind_lines_are_read():
    assert parse_data_list("0.5 a 2024  # crawl\n0.5 b 2025\n") == [
        DataEntry(weight=Fraction(1, 2), prefix="a", corpus="2024"),
        DataEntry(weight=Fraction(1, 2), prefix="b", corpus="2025"),
    ]
    assert parse_data_list("1e-7 /data/a,b_text_document\n") == [
        DataEntry(weight=Fraction(1, 10**7), prefix="/data/a,b_text_document")
    ]


def test_arguments_over_several_lines_are_read_as_megatron_reads_them():
    expected = [DataEntry(weight=Fraction(3, 10), prefix="a"), DataEntry(weight=Fraction(7, 10), prefix="b")]
    for text in ("0.3\na\n0.7\nb\n", "--data-path \\\n  0.3 a \\\n  0.7 b\n", "0.3 a 0.7\nb\n"):
        assert parse_data_list(text) == expected


_ODD = st.text(alphabet=list("ab0/._- ,;:#()[]{}$'\"\\*?=@`|&<>~%+é日\t"), min_size=1, max_size=9)


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=60, deadline=None)
@given(rows=st.lists(st.tuples(_TOKENS, _ODD, _ODD), min_size=1, max_size=3))
def test_a_list_is_only_written_where_it_reads_back_whatever_the_paths(name, rows):
    entries = [DataEntry(tokens=tokens, prefix=prefix, corpus=corpus) for tokens, prefix, corpus in rows]
    try:
        text = render_data_list(entries, name)
    except DataError:
        assert name != "yaml"
        return
    found = parse_data_list(text)
    assert [(entry.amount, entry.prefix) for entry in found] == [(entry.amount, entry.prefix) for entry in entries]
    if name in ("yaml", "csv", "blendcorpus"):
        assert [entry.corpus for entry in found] == [entry.corpus for entry in entries]


_LINES = st.one_of(
    st.text(max_size=30),
    st.sampled_from(["export X=(", ")", "5 a", "0.5 a b", "- {tokens: 5, prefix: a}", '{"train": [1, "a"]}', "a,b,5"]),
)


@settings(max_examples=300, deadline=None)
@given(lines=st.lists(_LINES, max_size=5))
def test_whatever_a_file_holds_it_is_a_list_or_an_error_that_says_why(lines):
    with contextlib.suppress(DataError):
        assert parse_data_list("\n".join(lines))


def test_fractions_in_a_shell_list_are_weights():
    entries = parse_data_list("export TRAIN_DATA_PATH=(\n 0.25 a\n 0.75 b\n)\n")
    assert [entry.weight for entry in entries] == [Fraction(1, 4), Fraction(3, 4)]


def test_a_split_of_a_json_file_is_chosen_by_name(tmp_path):
    path = tmp_path / "list.json"
    path.write_text('{"train": ["1", "a"], "valid": ["2", "b"], "test": null}')
    assert read_data_list(path, "valid")[0].prefix == "b"
    with pytest.raises(DataError, match="no list under 'test'"):
        read_data_list(path, "test")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no entry"),
        ("# only a comment\n", "no entry"),
        ("0.5 a en\n\n0.5 b\n", "line.txt:3: 2 columns"),
        ("0.5 a en\nx b en\n", "line.txt:2: 'x' is not a number"),
        ("0.000000 a en\n", "line.txt:1: 0.000000 is not positive"),
        ("-1 a\n", "line.txt:1: -1 is not positive"),
        ("0.3 a 0.7\n", "weight '0.7' has no prefix"),
        ("0.3 a b c\n", "argument 3 is 'b'"),
        ("--data-path 0.3 a b 0.7\n", "argument 3 is 'b'"),
        ("0.3 a b 0.7 c\n", "argument 3 is 'b'"),
        ("export X=(\n 5 a\n", "no closing"),
        ("export X=(\n 5 a 6\n)\n", "line.txt:2: '6' is left over"),
        ("export X=(\n 5 ${NOT_SET_ANYWHERE}/a\n)\n", "line.txt:2: ${NOT_SET_ANYWHERE} is not set"),
        ("export X=(\n $(cat tokens) a\n)\n", "line.txt:2: .*runs a command"),
        ("export X=(\n 5 a\n)\nexport Y=(\n 5 b\n)\n", "line.txt:4: a second array"),
        ('{"train": [', "line.txt:1: not valid JSON"),
        ("- {tokens: 1.5, prefix: a}\n", "entry 1: tokens is 1.5"),
        ("- {tokens: 1}\n", "entry 1: no prefix"),
        ("- a\n", "not a list of mappings"),
        ("export X=(\n 5 ${ROOT:-/data}/a\n)\n", "line.txt:2: .*as only a shell can"),
        ("export X=(\n 5 a | tee\n)\n", "line.txt:2: '|' in"),
        ("export X=(\n 5 'a\n)\n", "line.txt:2: .*no closing quotation"),
        ('HERE="$(pwd)"\nexport X=(\n 5 $HERE/a\n)\n', "line.txt:1: .*runs a command"),
        ("X=(\n 5 a\n)\nfor f in *; do X+=(1 $f); done\n", "line.txt:4: .*only a shell can follow"),
        ("X=(\n 5 a\n)\nY+=(\n 5 b\n)\n", "line.txt:4: a second array"),
        ("- {tokens: 1, prefx: a}\n", "entry 1: unknown key prefx"),
        ("- {tokens: 1, prefix: a}\n- {weight: 1, prefix: b}\n", r"some entries state tokens \(a\) and a weight \(b\)"),
        ("- {tokens: 1, prefix: a}\n- {prefix: b}\n", r"some entries state tokens \(a\) and neither \(b\)"),
        ("path,tokens,repeat\na,1,2\n", "line.txt:1: the columns are .*; repeat would be ignored"),
        ("tokens,prefix,tokens\n1,a,2\n", "line.txt:1: the columns are tokens,prefix,tokens"),
        ("en,a\n", "2 columns and no header"),
        ("tokens,prefix\n1,a\n2,b,c\n", "line.txt:3: 3 columns"),
    ],
)
def test_a_damaged_list_names_its_file_and_line(text, message):
    message = message.replace("$", r"\$").replace("{", r"\{").replace("}", r"\}").replace("|", r"\|")
    with pytest.raises(DataError, match=message):
        parse_data_list(text, "line.txt")


def test_a_weight_that_would_round_away_is_refused():
    with pytest.raises(DataError, match="rounds away"):
        render_data_list([DataEntry(weight=Fraction(1, 10**400), prefix="a")], "weights")


def test_a_name_that_is_not_utf8_is_refused_by_name(tmp_path):
    name = os.fsdecode(b"\x83e_text_document")
    for format in FORMATS:
        with pytest.raises(DataError, match="the name is not UTF-8"):
            render_data_list([DataEntry(tokens=1, prefix=name, corpus="c")], format)
    with pytest.raises(DataError, match="not a text file that can be read"):
        read_data_list(tmp_path)
