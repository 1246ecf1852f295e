"""Cleaning verbs say what they would write, do their work in parts, and write Parquet where Parquet came in."""

import datetime
import decimal
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_cpt.cli import main

TEXTS = [f"document {number} " + " ".join(f"w{number}x{index}" for index in range(30)) for number in range(10)]


def run(*words: object) -> int:
    with pytest.raises(SystemExit) as left:
        main(["data", *map(str, words)])
    return left.value.code


@pytest.fixture
def table(tmp_path, monkeypatch):
    """A table with types that JSON does not have; the last two documents are copies of the first two."""
    monkeypatch.chdir(tmp_path)
    texts = [*TEXTS, *TEXTS[:2]]
    rows = pa.table(
        {
            "text": texts,
            "raw": pa.array([bytes([255, number]) for number in range(len(texts))], pa.binary()),
            "day": pa.array([datetime.date(2026, 1, 1 + number) for number in range(len(texts))], pa.date32()),
            "at": pa.array([datetime.datetime(2026, 1, 1, 0, number) for number in range(len(texts))], pa.timestamp("us", "UTC")),
            "price": pa.array([decimal.Decimal(f"{number}.50") for number in range(len(texts))], pa.decimal128(9, 2)),
            "vector": pa.array([[0.5, number] for number in range(len(texts))], pa.list_(pa.float32())),
            "number": pa.array([None, *range(1, len(texts))], pa.int16()),
        }
    )  # fmt: skip
    Path("in").mkdir()
    pq.write_table(rows.replace_schema_metadata({"owner": "a user"}), "in/a.parquet", row_group_size=5)
    with pa.OSFile("in/b.arrow", "wb") as file, pa.ipc.new_file(file, rows.schema) as writer:
        writer.write_table(rows.slice(3, 4))
    return rows


def test_parquet_comes_out_where_parquet_came_in_with_its_types_and_schema(table):
    assert run("dedup", "c=in", "--output", "out", "--output-format", "same") == 0
    kept = pq.read_table("out/c/a.parquet")
    assert kept.equals(table.slice(0, 10)) and kept.schema.equals(table.schema)
    assert kept.schema.metadata == {b"owner": b"a user"}
    assert pq.read_table("out/c/b.parquet").schema.equals(table.schema) and not len(pq.read_table("out/c/b.parquet"))
    assert not list(Path("out").rglob("*.jsonl"))
    assert run("dedup", "c=in", "--output", "lines") == 0
    assert len(Path("lines/c/a.jsonl").read_text().splitlines()) == 10


@pytest.mark.parametrize(
    ("words", "outputs"),
    [
        (["sample", "in/a.parquet", "--output", "out", "--where", "number>=7"], {"out/a.parquet": slice(7, 12)}),
        (
            ["decontaminate", "c=in/a.parquet", "--against", "e.jsonl", "--output", "out"],
            {"out/c/a.parquet": slice(1, 12)},
        ),
    ],
)
def test_every_cleaning_verb_keeps_tables(table, words, outputs):
    Path("e.jsonl").write_text(json.dumps({"text": TEXTS[0]}) + "\n")
    assert run(*words, "--output-format", "same") == 0
    for name, rows in outputs.items():
        expected = table.slice(rows.start, rows.stop - rows.start)
        found = pq.read_table(name)
        expected = expected.filter(
            pa.array([text in found["text"].to_pylist() for text in expected["text"].to_pylist()])
        )
        assert found.equals(expected) and len(found) >= 5


def test_both_sides_of_a_split_are_tables_that_make_the_whole(table):
    words = ["--output", "out", "--fraction", "0.5", "--name", "v", "--output-format", "same"]
    assert run("split", "c=in/a.parquet", *words) == 0
    sides = [pq.read_table(f"out/c/{side}/a.parquet") for side in ("train", "v")]
    joined = pa.concat_tables(sides).sort_by("at")
    assert joined.equals(table.combine_chunks()) and all(len(side) for side in sides)


@pytest.mark.parametrize(
    "words",
    [
        ["dedup", "c=in"],
        ["decontaminate", "c=in", "--against", "in/a.parquet"],
        ["sample", "in"],
        ["split", "c=in", "--fraction", "0.5", "--name", "v"],
        ["languages", "c=in"],
    ],
)
def test_a_dry_run_names_every_output_and_writes_nothing(table, words, capsys):
    before = sorted(Path().rglob("*"))
    assert run(*words, "--output", "out", "--dry-run") == 0
    planned = {Path(line.partition(": from ")[0]) for line in capsys.readouterr().out.splitlines() if ": from " in line}
    assert sorted(Path().rglob("*")) == before
    assert run(*words, "--output", "out") == 0
    assert set(Path("out").rglob("*.jsonl")) == planned and planned


def test_the_parts_of_a_job_array_make_the_signatures_and_the_last_call_the_rest(table, capsys):
    for number in range(6):
        Path(f"in/c{number}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[number:]))
    assert run("dedup", "c=in", "--output", "whole") == 0
    capsys.readouterr()
    for number in (2, 0, 1):
        assert run("dedup", "c=in", "--output", "out", "--part", f"{number}/3", "--workers", 1 + number) == 0
        assert capsys.readouterr().out == "the signatures of this part are there\n"
        assert not Path("out/report.json").exists()
    signatures = sorted(Path(".out.work").glob("signatures_*"))
    assert len(signatures) == 8
    stamps = [path.stat().st_mtime_ns for path in signatures]
    assert run("dedup", "c=in", "--output", "out", "--part", "0/3") == 0
    assert [path.stat().st_mtime_ns for path in signatures] == stamps
    assert run("dedup", "c=in", "--output", "out", "--memory-gb", "2") == 0
    for path in Path("whole").rglob("*.jsonl"):
        assert path.read_bytes() == Path("out", path.relative_to("whole")).read_bytes()
