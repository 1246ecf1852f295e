"""A checkpoint that cannot be read is damage: the older good one beside it is used."""

import errno
import os
import shutil

import pytest

from megatron_cpt.checkpoint.torch_dist import mcore
from megatron_cpt.errors import CheckpointError, DamagedError


@pytest.fixture
def root(tmp_path):
    """Return a folder with the good checkpoints 10 and 20."""
    for iteration in (10, 20):
        directory = mcore.checkpoint_dir(tmp_path, iteration)
        directory.mkdir()
        (directory / "__0_0.distcp").write_bytes(b"values" * 100)
        mcore.write_manifest(directory, {"iteration": iteration})
    mcore.write_tracker(tmp_path, 20)
    return tmp_path


def folder_instead(path):
    """Put a folder in a file's place."""
    path.unlink()
    path.mkdir()


def circle_instead(path):
    """Put a link to itself in a file's or a folder's place."""
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    path.symlink_to(path.name)


def null_instead(path):
    """Write JSON of another kind."""
    path.write_text("null")


def deep_instead(path):
    """Write JSON deeper than the parser goes."""
    path.write_text("[" * 100_000)


@pytest.mark.parametrize(
    "damage", [folder_instead, circle_instead, null_instead, deep_instead, lambda path: path.unlink()]
)
@pytest.mark.parametrize("file", ["__0_0.distcp", "manifest.json"])
def test_another_thing_in_a_files_place_is_walked_back_over(file, damage, root):
    damage(root / "iter_0000020" / file)
    assert mcore.newest_good_checkpoint(root).name == "iter_0000010"


def test_a_circle_in_the_folders_place_is_walked_back_over(root):
    circle_instead(root / "iter_0000020")
    assert mcore.newest_good_checkpoint(root).name == "iter_0000010"


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES])
@pytest.mark.parametrize("call", ["stat", "hash", "manifest"])
def test_what_the_disk_refuses_is_walked_back_over(call, number, root, monkeypatch):
    def refusing(original, part):
        def called(path, *arguments, **options):
            if part in str(path):
                raise OSError(number, os.strerror(number), str(path))
            return original(path, *arguments, **options)

        return called

    if call == "hash":
        monkeypatch.setattr(mcore, "has_content", refusing(mcore.has_content, "iter_0000020"))
    elif call == "manifest":
        monkeypatch.setattr(type(root), "read_text", refusing(type(root).read_text, "iter_0000020"))
    else:
        monkeypatch.setattr(type(root), "stat", refusing(type(root).stat, "iter_0000020/"))
    with pytest.raises(DamagedError, match=os.strerror(number)):
        mcore.verify_checkpoint(root / "iter_0000020")
    assert mcore.newest_good_checkpoint(root).name == "iter_0000010"


def test_what_a_rank_found_unreadable_is_passed_over(root):
    unreadable = {root / "iter_0000020"}
    assert mcore.newest_good_checkpoint(root, unreadable=unreadable).name == "iter_0000010"
    with pytest.raises(CheckpointError, match="2 damaged"):
        mcore.newest_good_checkpoint(root, unreadable={*unreadable, root / "iter_0000010"})
