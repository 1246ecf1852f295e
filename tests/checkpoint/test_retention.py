"""Which checkpoints are deleted, and which never."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_cpt.checkpoint.torch_dist import mcore
from megatron_cpt.checkpoint.torch_dist.retention import prune, read_protected, superseded_iterations, write_protected
from megatron_cpt.errors import CheckpointError


def make_run(root, iterations):
    """Write complete checkpoints of 100 bytes each plus manifest."""
    for iteration in iterations:
        directory = mcore.checkpoint_dir(root, iteration)
        directory.mkdir(parents=True)
        (directory / "data").write_bytes(b"x" * 100)
        mcore.write_manifest(directory, {"iteration": iteration})
        mcore.write_tracker(root, iteration)


def test_keeps_the_last_every_nth_and_protected_ones():
    iterations = list(range(100, 1100, 100))
    doomed = superseded_iterations(iterations, keep_last=2, keep_every=500, protected=[300])
    assert doomed == [100, 200, 400, 600, 700, 800]
    assert superseded_iterations(iterations, keep_last=None) == []


def test_a_quota_deletes_the_oldest_but_never_the_newest_or_a_protected_one():
    sizes = dict.fromkeys([1, 2, 3, 4], 10)
    assert superseded_iterations([1, 2, 3, 4], keep_last=None, sizes=sizes, quota_bytes=25) == [1, 2]
    assert superseded_iterations([1, 2, 3, 4], keep_last=None, protected=[1], sizes=sizes, quota_bytes=0) == [2, 3]


def test_a_quota_takes_multiples_of_keep_every_last():
    sizes = dict.fromkeys([1, 2, 3, 4, 5], 10)
    options = {"keep_last": None, "keep_every": 2, "sizes": sizes, "quota_bytes": 30}
    assert superseded_iterations([1, 2, 3, 4, 5], **options) == [1, 3]


@given(
    st.sets(st.integers(0, 50), min_size=1),
    st.integers(1, 5),
    st.none() | st.integers(1, 10),
    st.none() | st.integers(0, 500),
)
def test_the_newest_is_never_deleted(iterations, keep_last, keep_every, quota_bytes):
    doomed = superseded_iterations(
        list(iterations),
        keep_last=keep_last,
        keep_every=keep_every,
        sizes=dict.fromkeys(iterations, 10),
        quota_bytes=quota_bytes,
    )
    assert max(iterations) not in doomed
    if quota_bytes is None:
        assert not set(sorted(iterations)[-keep_last:]) & set(doomed)


def test_keeping_nothing_is_refused():
    with pytest.raises(CheckpointError, match="keep_last is 0"):
        superseded_iterations([1], keep_last=0)


def test_prune_deletes_whole_folders(tmp_path):
    make_run(tmp_path, [1, 2, 3])
    assert [path.name for path in prune(tmp_path, 1, dry_run=True)] == ["iter_0000001", "iter_0000002"]
    assert mcore.list_checkpoints(tmp_path) == [1, 2, 3]
    prune(tmp_path, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["iter_0000003", mcore.TRACKER]


def test_a_damaged_newer_checkpoint_does_not_cost_the_good_older_one(tmp_path):
    make_run(tmp_path, [1, 2, 3])
    (tmp_path / "iter_0000003" / "data").write_bytes(b"x")
    assert [path.name for path in prune(tmp_path, 1)] == ["iter_0000001"]
    assert (tmp_path / "iter_0000002").exists() and (tmp_path / "iter_0000003").exists()


def test_mode_full_does_not_count_a_checkpoint_with_a_flipped_bit_as_kept(tmp_path):
    make_run(tmp_path, [1, 2])
    (tmp_path / "iter_0000002" / "data").write_bytes(b"y" + b"x" * 99)
    assert prune(tmp_path, 1, mode="full") == []


def test_protected_and_tracked_iterations_and_release_stay(tmp_path):
    make_run(tmp_path, ["release", 1, 2, 3, 4])
    write_protected(tmp_path, {1})
    assert read_protected(tmp_path) == {1}
    mcore.write_tracker(tmp_path, 2)
    assert [path.name for path in prune(tmp_path, 1)] == ["iter_0000003"]
    assert mcore.list_checkpoints(tmp_path) == ["release", 1, 2, 4]
