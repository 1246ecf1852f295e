"""Pieces cover every line once, whatever the piece size, the compression or the damage."""

import bz2
import gzip
import json
import lzma
import os

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_cpt.data.reading import records
from megatron_cpt.data.reading.documents import list_sources
from megatron_cpt.data.reading.streams import Layout, parse_piece, pieces_of
from megatron_cpt.errors import DataError

COMPRESS = {
    "gz": gzip.compress,
    "xz": lzma.compress,
    "bz2": bz2.compress,
    "zst": zstandard.ZstdCompressor().compress,
}


def read(path, piece_bytes=1 << 20, **layout):
    """Return texts, line numbers, problems as (line, kind) and notes of a file read in pieces."""
    source = list_sources([path])[0]
    settings = Layout(**layout)
    texts, lines, problems, notes, before = [], [], [], {}, 0
    for piece in pieces_of(source, 0, settings, piece_bytes):
        parsed = parse_piece(piece, settings)
        texts += parsed.texts[0]
        lines += [before + line for line in parsed.lines]
        problems += [(before + problem.line, problem.kind) for problem in parsed.problems]
        for kind, count in parsed.notes.items():
            notes[kind] = notes.get(kind, 0) + count
        before += parsed.num_lines
        if piece.descriptor is not None:
            os.close(piece.descriptor)
    return texts, lines, problems, notes


def as_jsonl(texts):
    return b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)


TEXTS = [f"document {i} " + "x" * (i * 37 % 300) for i in range(200)]


@settings(max_examples=60, deadline=None)
@given(
    lines=st.lists(st.text(st.characters(blacklist_characters="\n\r", blacklist_categories=["Cs"]), max_size=30)),
    piece_bytes=st.integers(1, 100),
    ends=st.booleans(),
)
def test_byte_ranges_of_any_size_give_every_line_once(tmp_path_factory, lines, piece_bytes, ends):
    path = tmp_path_factory.mktemp("range") / "x.txt"
    path.write_bytes("\n".join(lines).encode() + (b"\n" if ends else b""))
    whole = read(path, 1 << 20)
    assert read(path, piece_bytes) == whole
    first = [line.removeprefix("\ufeff") if i == 0 else line for i, line in enumerate(lines)]
    assert whole[0] == [line for line in first if line.encode().strip()]


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("piece_bytes", [50, 1000, 1 << 20])
def test_a_compressed_file_gives_what_the_plain_one_gives(tmp_path, compression, piece_bytes):
    data = as_jsonl(TEXTS) + b"\n{broken\n" + as_jsonl(["last"])[:-1]
    (tmp_path / "x.jsonl").write_bytes(data)
    (tmp_path / f"y.jsonl.{compression}").write_bytes(COMPRESS[compression](data))
    assert read(tmp_path / f"y.jsonl.{compression}", piece_bytes) == read(tmp_path / "x.jsonl")


@pytest.mark.parametrize("compression", COMPRESS)
def test_several_members_in_one_file_are_read_as_one(tmp_path, compression):
    compress = COMPRESS[compression]
    path = tmp_path / f"x.jsonl.{compression}"
    path.write_bytes(compress(as_jsonl(TEXTS[:50])) + compress(as_jsonl(TEXTS[50:])))
    assert read(path)[0] == TEXTS


@pytest.mark.parametrize("compression", COMPRESS)
def test_a_truncated_member_is_noticed_and_the_whole_lines_before_it_are_kept(tmp_path, compression):
    compress = COMPRESS[compression]
    whole, cut = compress(as_jsonl(TEXTS[:50])), compress(as_jsonl(TEXTS[50:]))
    path = tmp_path / f"x.jsonl.{compression}"
    path.write_bytes(whole + cut[: len(cut) // 2])
    texts, _, problems, _ = read(path)
    assert texts[:50] == TEXTS[:50] and texts == TEXTS[: len(texts)] and len(texts) < len(TEXTS)
    assert [kind for _, kind in problems] == [records.DAMAGED]


@pytest.mark.parametrize("compression", COMPRESS)
def test_a_file_that_is_not_compressed_at_all_is_damaged(tmp_path, compression):
    path = tmp_path / f"x.jsonl.{compression}"
    path.write_bytes(as_jsonl(TEXTS))
    assert read(path)[2] == [(0, records.DAMAGED)]


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("piece_bytes", [64, 1 << 20])
def test_a_document_over_the_limit_is_read_past(tmp_path, suffix, piece_bytes):
    data = as_jsonl(["a", "x" * 5000, "b"])
    path = tmp_path / f"x.jsonl{suffix}"
    path.write_bytes(gzip.compress(data) if suffix else data)
    texts, lines, problems, _ = read(path, piece_bytes, max_document_bytes=1000)
    assert (texts, lines, problems) == (["a", "b"], [0, 2], [(1, records.TOO_LONG)])


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_text_file_can_be_one_document(tmp_path, suffix):
    data = b"first line\n\nthird line\n"
    path = tmp_path / f"x.txt{suffix}"
    path.write_bytes(gzip.compress(data) if suffix else data)
    assert read(path, txt_documents="file")[0] == [data.decode()]
    assert read(path, txt_documents="file", max_document_bytes=5)[2] == [(0, records.TOO_LONG)]


@pytest.mark.parametrize("kind", ["parquet", "arrow-file", "arrow-stream"])
@pytest.mark.parametrize("piece_bytes", [200, 1 << 20])
def test_tables_give_their_text_column(tmp_path, kind, piece_bytes):
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"id": list(range(201)), "text": [*TEXTS, None]})
    path = tmp_path / ("x.parquet" if kind == "parquet" else "x.arrow")
    if kind == "parquet":
        pq.write_table(table, path, row_group_size=60)
    else:
        make = pa.ipc.new_stream if kind == "arrow-stream" else pa.ipc.new_file
        with pa.OSFile(str(path), "wb") as sink, make(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=60)
    texts, lines, problems, _ = read(path, piece_bytes)
    assert (texts, lines, problems) == (TEXTS, list(range(200)), [(200, records.NULL_TEXT)])
    with pytest.raises(DataError, match="no column 'body'; its columns are id, text"):
        read(path, keys=("body",))


def test_a_damaged_table_is_a_problem_with_a_line(tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"PAR1 not really PAR1")
    assert read(tmp_path / "x.parquet")[2] == [(0, records.DAMAGED)]


def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(as_jsonl(TEXTS))
    piece = next(iter(pieces_of(list_sources([path])[0], 0, Layout())))
    path.write_bytes(b"{}\n")
    with pytest.raises(DataError, match="shorter than when it was listed"):
        parse_piece(piece, Layout())
