"""The order of samples is exact at the end and smooth on the way."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_cpt.data.blend import order as blend_order


@settings(max_examples=40, deadline=None)
@given(
    counts=st.lists(st.integers(0, 60), min_size=1, max_size=12).filter(any),
    owners=st.lists(st.integers(0, 3), min_size=12, max_size=12),
    seed=st.one_of(st.none(), st.integers(0, 5)),
)
def test_every_entry_gives_exactly_its_samples_each_once_and_in_order(counts, owners, seed):
    entry_index, sample_index = blend_order.blend_order(counts, owners[: len(counts)], shuffle_seed=seed)
    assert np.bincount(entry_index, minlength=len(counts)).tolist() == counts
    for entry, count in enumerate(counts):
        assert sample_index[entry_index == entry].tolist() == list(range(count))


@settings(max_examples=40, deadline=None)
@given(counts=st.lists(st.integers(1, 300), min_size=1, max_size=6))
def test_at_every_point_each_corpus_has_given_its_part(counts):
    entry_index, _ = blend_order.blend_order(counts, range(len(counts)))
    drawn = np.cumsum(entry_index[:, None] == np.arange(len(counts)), axis=0)
    quota = np.arange(1, sum(counts) + 1)[:, None] * np.array(counts) / sum(counts)
    assert np.abs(drawn - quota).max() <= 1 + len(counts) / 2


def test_two_corpora_never_deviate_by_a_whole_sample():
    entry_index, _ = blend_order.blend_order([950, 50], ["new", "replay"])
    replayed = np.cumsum(entry_index == 1)
    assert np.abs(replayed - np.arange(1, 1001) * 0.05).max() <= 1


def test_shards_of_one_sample_spread_over_the_run():
    entry_index, _ = blend_order.blend_order([1000] + [1] * 100, ["c"] * 101)
    small = np.flatnonzero(entry_index > 0)
    per_tenth = np.histogram(small, bins=10, range=(0, 1100))[0]
    assert per_tenth.min() >= 8 and per_tenth.max() <= 12


def test_shuffling_stays_within_the_corpus_and_follows_its_seed():
    counts, owners = [50, 50, 100], ["a", "a", "b"]
    plain, _ = blend_order.blend_order(counts, owners)
    first, _ = blend_order.blend_order(counts, owners, shuffle_seed=1)
    again, _ = blend_order.blend_order(counts, owners, shuffle_seed=1)
    other, _ = blend_order.blend_order(counts, owners, shuffle_seed=2)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert np.array_equal(first == 2, plain == 2)


@pytest.mark.parametrize("window", [1, 3, 50])
@settings(max_examples=40, deadline=None)
@given(
    counts=st.lists(st.integers(0, 90), min_size=1, max_size=12).filter(any),
    owners=st.lists(st.integers(0, 3), min_size=12, max_size=12),
    seed=st.one_of(st.none(), st.integers(0, 5)),
)
def test_an_order_put_together_window_by_window_is_that_of_one_sort(window, counts, owners, seed):
    whole = blend_order.blend_order(counts, owners[: len(counts)], shuffle_seed=seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blend_order, "_WINDOW", window)
        parts = blend_order.blend_order(counts, owners[: len(counts)], shuffle_seed=seed)
    assert np.array_equal(whole[0], parts[0]) and np.array_equal(whole[1], parts[1])


def test_the_order_of_a_seed_never_changes():
    counts, owners = [5, 3, 9, 1], ["a", "a", "b", "b"]
    plain, _ = blend_order.blend_order(counts, owners)
    assert plain.tolist() == [2, 1, 2, 0, 3, 0, 2, 1, 2, 2, 0, 2, 0, 2, 1, 2, 0, 2]
    shuffled, _ = blend_order.blend_order(counts, owners, shuffle_seed=3)
    assert shuffled.tolist() == [2, 1, 2, 1, 2, 0, 3, 1, 2, 2, 0, 2, 0, 2, 0, 2, 0, 2]
