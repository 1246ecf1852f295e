"""Sources are found in folders, globs and saved data sets, sorted, filtered, and named when they are unknown."""

import json
from pathlib import PurePosixPath

import pytest

from megatron_cpt.data.documents import file_format, list_sources, plain_name
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
