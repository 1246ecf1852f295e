"""Subsets and held-out sets depend on the documents, not on their files."""

import json
from fractions import Fraction

import pytest
import zstandard

from megatron_cpt import cli
from megatron_cpt.data.cleaning.sample import SampleOptions, parse_condition, sample, split_validation
from megatron_cpt.data.reading.documents import list_sources
from megatron_cpt.data.reading.named_corpora import named_corpora
from megatron_cpt.data.reading.record_files import Reading
from megatron_cpt.errors import DataError


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def rows_below(folder):
    return [json.loads(line) for path in sorted(folder.rglob("*.jsonl")) for line in path.read_text().splitlines()]


@pytest.fixture
def documents(tmp_path):
    rows = [
        {"text": f"document {index}", "id": index, "lang": "ja" if index % 4 else "en", "meta": {"score": index / 10}}
        for index in range(400)
    ]
    write(tmp_path / "in" / "a.jsonl", rows[:150])
    write(tmp_path / "in" / "b" / "c.jsonl", rows[150:])
    return tmp_path


def draw(folder, output="out", inputs="in", **options):
    report = sample(list_sources([folder / inputs]), folder / output, Reading(), SampleOptions(**options))
    return report["buckets"], {row["id"] for row in rows_below(folder / output)}


def test_exactly_n_documents_are_drawn_whatever_the_files(documents):
    counts, drawn = draw(documents, number=57)
    assert counts == {"": {"found": 400, "drawn": 57}} and len(drawn) == 57
    everything = rows_below(documents / "in")
    write(documents / "other" / "z.jsonl", everything[::-1])
    assert draw(documents, "again", "other", number=57)[1] == drawn
    assert draw(documents, "seed", number=57, seed=1)[1] != drawn


def test_a_larger_sample_contains_the_smaller_one(documents):
    assert draw(documents, "small", number=20)[1] < draw(documents, "large", number=80)[1]


def test_more_than_there_are_is_refused(documents):
    with pytest.raises(DataError, match="only 400 documents fit; 401 are wanted"):
        draw(documents, number=401)


def test_conditions_choose_by_field_value(documents):
    _, drawn = draw(documents, conditions=("lang=en", "meta.score>=30"))
    assert drawn == {index for index in range(300, 400) if index % 4 == 0}


@pytest.mark.parametrize(
    ("condition", "record", "holds"),
    [
        ("id^=translation_", {"id": "translation_7"}, True),
        ("id!^=translation_", {"id": "translation_7"}, False),
        ("id!^=translation_", {}, True),
        ("lang!=ja", {"lang": "ja"}, False),
        ("n<3", {"n": "2.5"}, True),
        ("n<3", {"n": None}, False),
        ("n>=3", {"n": True}, False),
        ("a.b=1", {"a": {"b": 1}}, True),
        ("a.b=1", {"a.b": 1}, True),
        ("score=3", {"score": 3.0}, True),
        ("score=3", {"score": "3.0"}, False),
        ("ok=true", {"ok": True}, True),
        ("ok!=true", {"ok": False}, True),
        ('tags~="x"', {"tags": ["x", "y"]}, True),
    ],
)
def test_a_condition_holds(condition, record, holds):
    assert parse_condition(condition)(record) is holds


@pytest.mark.parametrize("text", ["lang", "n>many"])
def test_a_condition_that_cannot_be_read_is_refused(text):
    with pytest.raises(DataError, match=text.split(">")[0]):
        parse_condition(text)


def test_buckets_go_to_folders_of_their_own(documents):
    counts, _ = draw(documents, score="meta.score", edges=(0, 10, 20, 39.5), number=30)
    assert {name: row["drawn"] for name, row in counts.items()} == {
        "meta.score_0_10": 30,
        "meta.score_10_20": 30,
        "meta.score_20_39.5": 30,
    }
    assert {row["id"] // 100 for row in rows_below(documents / "out" / "meta.score_10_20")} == {1}
    with pytest.raises(DataError, match="ascending"):
        draw(documents, "bad", score="meta.score", edges=(3, 2))


@pytest.mark.parametrize("seed", range(6))
def test_copies_of_one_text_do_not_push_out_what_is_drawn_before_them(tmp_path, seed):
    write(tmp_path / "in" / "a.jsonl", [{"text": "same", "id": 0}] * 3 + [{"text": "other", "id": 1}])
    ids = {0: 0, 1: 0}
    counts = sample(list_sources([tmp_path / "in"]), tmp_path / "out", Reading(), SampleOptions(number=3, seed=seed))[
        "buckets"
    ]
    for row in rows_below(tmp_path / "out"):
        ids[row["id"]] += 1
    whole = sample(list_sources([tmp_path / "in"]), tmp_path / "one", Reading(), SampleOptions(number=1, seed=seed))[
        "buckets"
    ]
    assert counts[""]["drawn"] == 3 and whole[""]["drawn"] == 1
    assert ids[rows_below(tmp_path / "one")[0]["id"]] > 0


def test_buckets_with_near_bounds_have_folders_of_their_own(tmp_path):
    write(tmp_path / "in" / "a.jsonl", [{"text": f"t{i}", "id": i, "n": 1_000_000 + i} for i in range(4)])
    counts, drawn = draw(tmp_path, score="n", edges=(1_000_000, 1_000_001, 1_000_002, 1_000_004.5))
    assert {name: row["drawn"] for name, row in counts.items()} == {
        "n_1000000_1000001": 1,
        "n_1000001_1000002": 1,
        "n_1000002_1000004.5": 2,
    }
    assert drawn == {0, 1, 2, 3}
    with pytest.raises(DataError, match="Finite numbers"):
        draw(tmp_path, "bad", score="n", edges=(0, float("inf")))


def test_what_no_condition_or_bucket_takes_is_counted(documents):
    sources = list_sources([documents / "in"])
    options = SampleOptions(score="meta.score", edges=(0, 10), conditions=("lang=en",))
    report = sample(sources, documents / "out", Reading(), options)
    assert (report["lines"], report["documents"], report["fit"], report["in_no_bucket"]) == (400, 400, 100, 75)
    assert report["buckets"] == {"meta.score_0_10": {"found": 25, "drawn": 25}}
    assert sample(sources, documents / "out", Reading(), options) == report
    with pytest.raises(DataError, match="exists already, from other inputs or options"):
        sample(sources, documents / "out", Reading(), SampleOptions(number=3))


def test_a_sample_never_replaces_files_of_others(documents):
    write(documents / "out" / "a.jsonl", [{"text": "mine"}])
    with pytest.raises(DataError, match="exists already, from other work"):
        draw(documents, number=3)
    write(documents / "split/D0/train/a.jsonl", [{"text": "mine"}])
    with pytest.raises(DataError, match="exists already, from other work"):
        split(documents, ["in/a.jsonl"])


def test_the_record_of_a_split_counts_and_is_no_document(documents):
    rows = split(documents, ["in"])["D0"]
    assert rows["lines"] == rows["documents"] == rows["train"] + rows["validation"] == 400
    record = json.loads((documents / "split/validation.json").read_text())
    assert record["corpora"]["D0"] == rows
    assert len(list_sources([documents / "split"], mixes_splits=False)) == 4
    assert split(documents, ["in"])["D0"] == rows


def test_the_same_split_again_is_kept_and_one_of_more_documents_or_a_lost_file_is_made_again(documents):
    rows = split(documents, ["in"])
    files = sorted((documents / "split").rglob("*.jsonl"))
    times = [path.stat().st_mtime_ns for path in files]
    assert split(documents, ["in"]) == rows and [path.stat().st_mtime_ns for path in files] == times
    files[0].unlink()
    assert split(documents, ["in"]) == rows and files[0].exists()
    write(documents / "in" / "a.jsonl", [{"text": f"other {index}", "id": index} for index in range(7)])
    assert split(documents, ["in"])["D0"]["documents"] != rows["D0"]["documents"]


def test_duplicates_of_a_text_are_drawn_in_order_up_to_n(tmp_path):
    write(tmp_path / "in" / "a.jsonl", [{"text": "same", "id": index} for index in range(10)])
    assert draw(tmp_path, number=3)[1] == {0, 1, 2}


def split(folder, inputs, output="split", fraction="1/10"):
    corpora = named_corpora([f"D0={folder / item}" for item in inputs])
    return split_validation(corpora, folder / output, Reading(), name="validation", fraction=Fraction(fraction))


def test_the_validation_set_never_moves_when_data_is_added(documents):
    first = split(documents, ["in/a.jsonl"])
    held_out = {row["id"] for row in rows_below(documents / "split/D0/validation")}
    split(documents, ["in/a.jsonl", "in/b"])
    assert {row["id"] for row in rows_below(documents / "split/D0/validation") if row["id"] < 150} == held_out
    both = rows_below(documents / "split/D0/validation") + rows_below(documents / "split/D0/train")
    assert sorted(row["id"] for row in both) == list(range(400))
    assert 20 < 400 * len(held_out) / 150 < 70
    assert {key: first["D0"][key] for key in ("documents", "train", "validation")} == {
        "documents": 150,
        "train": 150 - len(held_out),
        "validation": len(held_out),
    }


def test_a_named_set_keeps_its_fraction(documents):
    split(documents, ["in/a.jsonl"])
    with pytest.raises(DataError, match="was made with the fraction 1/10, not 1/5"):
        split(documents, ["in/a.jsonl"], fraction="1/5")


def test_the_verbs_write_compressed_subsets_and_report(documents, monkeypatch, capsys):
    monkeypatch.chdir(documents)
    for command, expected in (
        (["sample", "in", "--where", "lang=en", "--number", "50", "--output", "s", "--compress"], "s: 50 of 100"),
        (["split", "D0=in", "--fraction", "0.25", "--output", "p"], "of 400 documents held out"),
        (["decontaminate", "D0=in", "--against", "in/a.jsonl", "--min-words", "2", "--output", "d"], "D0: 150 of 400"),
    ):
        with pytest.raises(SystemExit) as left:
            cli.main(["data", *command])
        captured = capsys.readouterr()
        assert left.value.code == 0, captured.err
        assert expected in captured.out
    with zstandard.open(documents / "s" / "a.jsonl.zst", "rt") as file:
        assert all(json.loads(line)["lang"] == "en" for line in file)
