"""The checkpoint folder: tracker, manifest, verification, walking back."""

import json
import logging

import pytest

from megatron_cpt.checkpoint.torch_dist import mcore
from megatron_cpt.errors import CheckpointError


def make_checkpoint(root, iteration, *, tracker=True, payload=b"weights"):
    """Write a checkpoint of two small files with a manifest."""
    directory = mcore.checkpoint_dir(root, iteration)
    directory.mkdir(parents=True)
    (directory / "__0_0.distcp").write_bytes(payload * 100)
    (directory / ".metadata").write_bytes(b"index")
    mcore.write_manifest(directory, {"iteration": iteration, "content": "weights"})
    if tracker:
        mcore.write_tracker(root, iteration)
    return directory


def flip_bit(path):
    """Flip one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_folder_names_are_megatrons(tmp_path):
    assert mcore.checkpoint_dir(tmp_path, 100).name == "iter_0000100"
    assert mcore.checkpoint_dir(tmp_path, "release").name == "release"
    assert mcore.iteration_of(tmp_path / "iter_12345678") == 12345678
    assert mcore.iteration_of(tmp_path / ".iter_0000100.deleted") is None


def test_tracker_holds_an_iteration_or_release(tmp_path):
    assert mcore.read_tracker(tmp_path) is None
    for iteration in (100, "release"):
        mcore.write_tracker(tmp_path, iteration)
        assert mcore.read_tracker(tmp_path) == iteration
    (tmp_path / mcore.TRACKER).write_text("ten\n")
    with pytest.raises(CheckpointError, match="'ten'"):
        mcore.read_tracker(tmp_path)


def test_manifest_lists_every_file_and_verifies(tmp_path):
    directory = make_checkpoint(tmp_path, 7)
    manifest = mcore.verify_checkpoint(directory, "full")
    assert set(manifest["files"]) == {"__0_0.distcp", ".metadata"}
    assert manifest["files"]["__0_0.distcp"]["bytes"] == 700
    assert mcore.list_checkpoints(tmp_path) == [7]
    assert mcore.newest_good_checkpoint(tmp_path) == directory


def test_hashes_given_by_the_writer_are_used_and_a_file_that_is_gone_is_an_error(tmp_path):
    directory = mcore.checkpoint_dir(tmp_path, 1)
    directory.mkdir()
    (directory / "a").write_bytes(b"x")
    mcore.write_manifest(directory, {"iteration": 1}, {"a": "0" * 32})
    assert mcore.read_manifest(directory)["files"]["a"]["hash"] == "0" * 32
    with pytest.raises(CheckpointError, match="another hash"):
        mcore.verify_checkpoint(directory)
    with pytest.raises(CheckpointError, match="b was written but is not there"):
        mcore.write_manifest(directory, {"iteration": 1}, {"b": "0" * 32})


def test_truncation_is_found_by_size_and_named(tmp_path):
    directory = make_checkpoint(tmp_path, 1)
    with (directory / "__0_0.distcp").open("r+b") as file:
        file.truncate(699)
    with pytest.raises(CheckpointError, match="__0_0.distcp has 699 bytes instead of 700"):
        mcore.verify_checkpoint(directory, "size")


def test_a_flipped_bit_is_found_by_hash_only(tmp_path):
    directory = make_checkpoint(tmp_path, 1)
    flip_bit(directory / "__0_0.distcp")
    mcore.verify_checkpoint(directory, "size")
    with pytest.raises(CheckpointError, match="__0_0.distcp has another hash"):
        mcore.verify_checkpoint(directory, "full")


def test_a_missing_file_is_named(tmp_path):
    directory = make_checkpoint(tmp_path, 1)
    (directory / ".metadata").unlink()
    with pytest.raises(CheckpointError, match=".metadata is missing"):
        mcore.verify_checkpoint(directory, "size")


def test_a_changed_manifest_is_found(tmp_path):
    directory = make_checkpoint(tmp_path, 1)
    path = directory / mcore.MANIFEST
    path.write_text(path.read_text().replace('"iteration": 1', '"iteration": 2'))
    with pytest.raises(CheckpointError, match="checksum"):
        mcore.verify_checkpoint(directory, "size")
    path.write_text(json.dumps({"a": 1}))
    with pytest.raises(CheckpointError, match="is not a manifest"):
        mcore.read_manifest(directory)


def test_walks_back_over_damaged_checkpoints_and_says_so(tmp_path, caplog):
    good = make_checkpoint(tmp_path, 100)
    (make_checkpoint(tmp_path, 200) / "__0_0.distcp").unlink()
    flip_bit(make_checkpoint(tmp_path, 300) / "__0_0.distcp")
    with caplog.at_level(logging.WARNING):
        assert mcore.newest_good_checkpoint(tmp_path, "full") == good
    assert "WALKED BACK" in caplog.text and "2 newer" in caplog.text and "is missing" in caplog.text


def test_an_unfinished_save_is_passed_over(tmp_path, caplog):
    good = make_checkpoint(tmp_path, 100)
    (tmp_path / "iter_0000050").mkdir()
    assert mcore.newest_good_checkpoint(tmp_path) == good
    (tmp_path / mcore.TRACKER).unlink()
    (tmp_path / "iter_0000200").mkdir()
    assert mcore.newest_good_checkpoint(tmp_path) == good
    assert "unfinished save" in caplog.text
    assert mcore.list_checkpoints(tmp_path) == [100]


def test_editing_the_tracker_rolls_back(tmp_path):
    old = make_checkpoint(tmp_path, 100)
    new = make_checkpoint(tmp_path, 200)
    assert mcore.newest_good_checkpoint(tmp_path) == new
    mcore.write_tracker(tmp_path, 100)
    assert mcore.newest_good_checkpoint(tmp_path) == old


def test_a_garbled_or_missing_tracker_costs_nothing(tmp_path):
    newest = make_checkpoint(tmp_path, 100)
    (tmp_path / mcore.TRACKER).write_bytes(b"\xff\xfe")
    assert mcore.newest_good_checkpoint(tmp_path) == newest
    (tmp_path / mcore.TRACKER).unlink()
    assert mcore.newest_good_checkpoint(tmp_path) == newest


def test_only_damaged_checkpoints_are_an_error_but_none_at_all_is_none(tmp_path):
    assert mcore.newest_good_checkpoint(tmp_path / "nothing") is None
    (tmp_path / "iter_0000010").mkdir()
    assert mcore.newest_good_checkpoint(tmp_path) is None
    (make_checkpoint(tmp_path, 20) / ".metadata").unlink()
    with pytest.raises(CheckpointError, match="no good checkpoint, 1 damaged"):
        mcore.newest_good_checkpoint(tmp_path)


def test_a_lost_manifest_of_the_tracked_checkpoint_is_damage_not_a_fresh_start(tmp_path):
    (make_checkpoint(tmp_path, 20) / mcore.MANIFEST).unlink()
    with pytest.raises(CheckpointError, match="no good checkpoint"):
        mcore.newest_good_checkpoint(tmp_path)


def test_a_tracked_checkpoint_that_is_gone_is_damage_not_a_fresh_start(tmp_path):
    mcore.write_tracker(tmp_path, 20)
    with pytest.raises(CheckpointError, match="iter_0000020: named by"):
        mcore.newest_good_checkpoint(tmp_path)


def test_release_counts_as_older_than_every_iteration(tmp_path):
    release = make_checkpoint(tmp_path, "release")
    assert mcore.newest_good_checkpoint(tmp_path) == release
    newest = make_checkpoint(tmp_path, 1)
    assert mcore.list_checkpoints(tmp_path) == ["release", 1]
    assert mcore.newest_good_checkpoint(tmp_path) == newest


def test_find_checkpoint_takes_a_folder_of_either_kind(tmp_path):
    directory = make_checkpoint(tmp_path, 3)
    assert mcore.find_checkpoint(directory) == mcore.find_checkpoint(tmp_path) == directory
    with pytest.raises(CheckpointError, match="no checkpoint"):
        mcore.find_checkpoint(tmp_path / "nothing")


def test_too_little_free_space_is_refused_with_numbers(tmp_path):
    mcore.check_free_space(tmp_path / "not" / "yet", 1)
    with pytest.raises(CheckpointError, match="TiB are needed"):
        mcore.check_free_space(tmp_path, 1 << 60)
