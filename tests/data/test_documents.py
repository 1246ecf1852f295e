"""Sources are found in folders, globs and saved data sets, sorted, filtered, and named when they are unknown."""

import json
import logging
import os
from pathlib import PurePosixPath

import pytest

from megatron_cpt.data.reading.byproducts import write_record
from megatron_cpt.data.reading.documents import file_format, list_sources, plain_name
from megatron_cpt.errors import DataError


def touch(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}\n")


def names(sources):
    return [str(source.relative) for source in sources]


def test_a_folder_gives_its_document_files_sorted_and_leaves_the_rest(tmp_path):
    touch(tmp_path, "b.jsonl", "a/z.txt", "a/b.jsonl.zst", "README.md", ".hidden.jsonl", "c.parquet")
    assert names(list_sources([tmp_path])) == ["a/b.jsonl.zst", "a/z.txt", "b.jsonl", "c.parquet"]


def test_a_glob_is_relative_to_its_fixed_part(tmp_path):
    touch(tmp_path, "en/a.jsonl", "en/deep/b.jsonl", "ja/c.jsonl")
    assert names(list_sources([f"{tmp_path}/en/**/*.jsonl"])) == ["a.jsonl", "deep/b.jsonl"]


def test_include_and_exclude_match_paths_and_names(tmp_path):
    touch(tmp_path, "en/a.jsonl", "en/b.jsonl", "ja/a.jsonl")
    assert names(list_sources([tmp_path], include=["en/*"])) == ["en/a.jsonl", "en/b.jsonl"]
    assert names(list_sources([tmp_path], exclude=["a.jsonl"])) == ["en/b.jsonl"]


def test_inputs_keep_their_order_and_a_file_named_twice_is_taken_once(tmp_path, caplog):
    touch(tmp_path, "a.jsonl", "b.jsonl")
    sources = list_sources([tmp_path / "b.jsonl", tmp_path])
    assert names(sources) == ["b.jsonl", "a.jsonl"]
    assert "taken once" in caplog.text


def test_a_saved_data_set_gives_its_shards_in_order_without_caches(tmp_path):
    touch(tmp_path, "data-00001.arrow", "data-00000.arrow", "cache-123.arrow", "dataset_info.json")
    files = [{"filename": "data-00000.arrow"}, {"filename": "data-00001.arrow"}]
    (tmp_path / "state.json").write_text(json.dumps({"_data_files": files}))
    assert names(list_sources([tmp_path])) == ["data-00000.arrow", "data-00001.arrow"]


def test_a_saved_view_of_a_data_set_is_refused(tmp_path):
    touch(tmp_path, "dataset_info.json")
    (tmp_path / "state.json").write_text(json.dumps({"_data_files": [], "_indices_data_files": [{}]}))
    with pytest.raises(DataError, match="flatten_indices"):
        list_sources([tmp_path])


def test_nothing_found_is_an_error_that_names_the_input(tmp_path):
    touch(tmp_path, "README.md")
    with pytest.raises(DataError, match="no document files"):
        list_sources([tmp_path])
    with pytest.raises(DataError, match="no such file or folder"):
        list_sources([tmp_path / "nowhere"])


def test_a_named_file_of_unknown_format_needs_a_format(tmp_path):
    touch(tmp_path, "dump.data", "dump.gz")
    with pytest.raises(DataError, match="--format"):
        list_sources([tmp_path / "dump.data"])
    assert list_sources([tmp_path / "dump.gz"], format="jsonl")[0].compression == "gz"


def test_what_we_write_beside_documents_is_never_read_as_documents(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    touch(tmp_path, "a.jsonl", "report.json", "x.rejects.jsonl", "a.jsonl.rejects", "t_document.json", "t_document.idx")
    write_record(tmp_path / "b.json", "dedup report", {"clusters": 1})
    assert names(list_sources([tmp_path])) == ["a.jsonl", "report.json"]  # the user's own report.json is data
    assert "passed over 5 files that hold no documents: a.jsonl.rejects, b.json, t_document.idx" in caplog.text
    assert names(list_sources([f"{tmp_path}/*.json"])) == ["report.json"]
    assert names(list_sources([tmp_path / "b.json"])) == ["b.json"]  # named outright


def test_a_folder_that_a_glob_matches_is_read_as_a_folder(tmp_path):
    touch(tmp_path, "D0/a.jsonl", "D0/deep/b.jsonl", "D1/a.jsonl", "D2.jsonl", "E/a.jsonl")
    below = ["D0/a.jsonl", "D0/deep/b.jsonl", "D1/a.jsonl", "D2.jsonl"]
    assert names(list_sources([f"{tmp_path}/D*"])) == below
    assert names(list_sources([f"{tmp_path}/**"])) == [*below, "E/a.jsonl"]


def test_a_glob_over_saved_data_sets_leaves_caches_out(tmp_path):
    for split in ("en", "de"):
        touch(tmp_path, f"s/{split}/data-0.arrow", f"s/{split}/cache-1.arrow", f"s/{split}/dataset_info.json")
        (tmp_path / f"s/{split}/state.json").write_text('{"_data_files": [{"filename": "data-0.arrow"}]}')
    (tmp_path / "s/dataset_dict.json").write_text('{"splits": ["en", "de"]}')
    for item, expected in (("s", ""), ("s/*/*.arrow", ""), ("s/**", ""), ("**/*.arrow", "s/"), ("*", "s/")):
        found = names(list_sources([f"{tmp_path}/{item}"]))
        assert found == [f"{expected}de/data-0.arrow", f"{expected}en/data-0.arrow"], item


def test_documents_may_have_the_names_of_saved_data_sets_elsewhere(tmp_path):
    touch(tmp_path, "state.json", "dataset_dict.json")
    assert names(list_sources([tmp_path])) == ["dataset_dict.json", "state.json"]


def test_links_are_followed_but_not_in_circles(tmp_path, caplog):
    touch(tmp_path, "in/a/x.jsonl", "in/b/y.jsonl", "else/z.jsonl")
    (tmp_path / "in/a/up").symlink_to(tmp_path / "in")
    (tmp_path / "in/a/b").symlink_to(tmp_path / "in/b")
    (tmp_path / "in/b/a").symlink_to(tmp_path / "in/a")
    (tmp_path / "in/link").symlink_to(tmp_path / "else")
    expected = ["a/b/y.jsonl", "a/x.jsonl", "b/a/x.jsonl", "b/y.jsonl", "link/z.jsonl"]
    assert names(list_sources([tmp_path / "in"])) == expected
    assert "is a link to a folder that holds it" in caplog.text
    assert names(list_sources([f"{tmp_path}/in/**/*.jsonl"])) == expected


def test_files_that_cannot_be_read_are_named_before_any_work(tmp_path, monkeypatch):
    touch(tmp_path, "in/a.jsonl")
    os.mkfifo(tmp_path / "in/pipe.jsonl")
    with pytest.raises(DataError, match="pipe.jsonl: is not a regular file"):
        list_sources([tmp_path / "in"])
    with pytest.raises(DataError, match="neither a file nor a folder"):
        list_sources([tmp_path / "in/pipe.jsonl"])
    (tmp_path / "in/pipe.jsonl").unlink()
    (tmp_path / "in/gone.jsonl").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match="gone.jsonl: no such file"):
        list_sources([tmp_path / "in"])
    (tmp_path / "in/gone.jsonl").unlink()
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may read everything
    with pytest.raises(DataError, match="a.jsonl: cannot be read"):
        list_sources([tmp_path / "in"])


def test_names_may_hold_spaces_newlines_and_any_script_but_must_be_utf8(tmp_path):
    touch(tmp_path, "a b.jsonl", "c\nd.jsonl", "日本語 [1].jsonl", "é.jsonl")
    assert len(list_sources([tmp_path])) == 4
    assert names(list_sources([tmp_path / "日本語 [1].jsonl"])) == ["日本語 [1].jsonl"]
    (tmp_path / os.fsdecode(b"\xff.jsonl")).write_text("{}")
    with pytest.raises(DataError, match="not UTF-8"):
        list_sources([tmp_path])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.jsonl", ("jsonl", None)),
        ("A.JSON.GZ", ("jsonl", "gz")),
        ("a.txt.xz", ("txt", "xz")),
        ("a.b.jsonl.bz2", ("jsonl", "bz2")),
        ("a.parquet", ("parquet", None)),
        ("a.parquet.gz", (None, "gz")),
        ("a.md", (None, None)),
    ],
)
def test_formats_are_told_by_name(name, expected):
    assert file_format(name) == expected


def test_plain_names_lose_format_and_compression_only():
    assert plain_name("v1.5.jsonl.zst") == "v1.5"
    assert plain_name("a.txt") == "a"
    assert PurePosixPath(plain_name("x/y.json")) == PurePosixPath("x/y")
