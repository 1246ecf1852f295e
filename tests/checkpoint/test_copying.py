"""Copies with checksums that go on after an interruption."""

import pytest

from megatron_cpt.checkpoint.torch_dist import copying, mcore
from megatron_cpt.errors import CheckpointError


@pytest.fixture
def checkpoint(tmp_path):
    """Return a checkpoint of three files."""
    directory = mcore.checkpoint_dir(tmp_path / "run", 100)
    directory.mkdir(parents=True)
    for name in ("a", "b", "c"):
        (directory / name).write_bytes(name.encode() * 1000)
    mcore.write_manifest(directory, {"iteration": 100})
    return directory


def test_a_copy_is_verified_and_tracked(checkpoint, tmp_path):
    copy = copying.copy_checkpoint(checkpoint, tmp_path / "archive")
    mcore.verify_checkpoint(copy, "full")
    assert mcore.read_tracker(tmp_path / "archive") == 100
    assert copying.copy_checkpoint(checkpoint, tmp_path / "archive") == copy


def test_an_interrupted_copy_goes_on_with_what_is_missing(checkpoint, tmp_path, monkeypatch):
    original, copied = copying._copy_bytes, []

    def copy(source, target, known_by="", progress=None):
        if source.name == "c" and not copied.count("c"):
            copied.append("c")
            target.write_bytes(b"half")
            raise KeyboardInterrupt
        copied.append(source.name)
        return original(source, target, known_by, progress)

    monkeypatch.setattr(copying, "_copy_bytes", copy)
    with pytest.raises(KeyboardInterrupt):
        copying.copy_checkpoint(checkpoint, tmp_path / "archive")
    assert mcore.list_checkpoints(tmp_path / "archive") == []
    copied[:] = ["c"]
    mcore.verify_checkpoint(copying.copy_checkpoint(checkpoint, tmp_path / "archive"), "full")
    assert copied == ["c", "c", mcore.MANIFEST]


def test_damage_in_the_source_is_found_on_the_way(checkpoint, tmp_path):
    (checkpoint / "b").write_bytes(b"x" * 1000)
    with pytest.raises(CheckpointError, match="b: has another hash than in its manifest"):
        copying.copy_checkpoint(checkpoint, tmp_path / "archive")
    assert mcore.list_checkpoints(tmp_path / "archive") == []


def test_another_checkpoint_in_its_place_is_not_overwritten(checkpoint, tmp_path):
    other = mcore.checkpoint_dir(tmp_path / "archive", 100)
    other.mkdir(parents=True)
    (other / "a").write_bytes(b"other")
    mcore.write_manifest(other, {"iteration": 100})
    with pytest.raises(CheckpointError, match="holds another checkpoint"):
        copying.copy_checkpoint(checkpoint, tmp_path / "archive")
    assert (other / "a").read_bytes() == b"other"


def test_an_older_copy_does_not_move_the_tracker_back(checkpoint, tmp_path):
    mcore.write_tracker(tmp_path / "archive", 200)
    copying.copy_checkpoint(checkpoint, tmp_path / "archive")
    assert mcore.read_tracker(tmp_path / "archive") == 200
