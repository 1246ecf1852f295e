"""The order in which a run draws its samples: shards into corpora, corpora into the run, exact at the end and smooth on the way.

Sample j of a shard with n samples is placed at (j + u) / n of its corpus, and sample j of a corpus likewise in the run;
sorting the places produces the order. So exactly the planned number of samples is drawn from every shard, and at every
point of the run the draws from corpora and shards are proportional up to rounding. The phase u of a shard follows the
golden ratio, so that shards of one sample spread over the run instead of meeting in its middle.

Megatron-Core's own blending places each sample by the largest error so far: at the end a shard is up to 1.1 samples
off (measured: one large and 19 or 499 small shards), and the errors of a corpus's shards add up.
"""

from collections.abc import Hashable, Iterator, Sequence

import numpy as np

_GOLDEN = 0.6180339887498949
_WINDOW = 1 << 21
"""Samples that are put in order at a time."""


def blend_order(
    num_samples: Sequence[int], corpora: Sequence[Hashable], *, shuffle_seed: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return (entry index int32 [n], sample of that entry int64 [n]) of each of the run's samples in order.

    `num_samples` and `corpora` are per entry of the data list. With `shuffle_seed` a corpus's samples are shuffled among
    its shards instead of spread evenly.
    """
    members: dict[Hashable, list[int]] = {}
    for entry, corpus in enumerate(corpora):
        members.setdefault(corpus, []).append(entry)
    groups = [np.array(group, dtype=np.int32) for group in members.values()]
    counts = np.array(num_samples, dtype=np.int64)
    of_corpus = np.array([counts[group].sum() for group in groups])
    total = int(counts.sum())
    inside = np.empty(total, dtype=np.int32)
    """The entries of the first corpus in its order, then those of the second ..."""
    starts = np.cumsum(of_corpus) - of_corpus
    for number, group in enumerate(groups):
        part = inside[starts[number] : starts[number] + of_corpus[number]]
        if shuffle_seed is None:
            _fill(part, _spread(counts[group], (np.arange(1, len(group) + 1) * _GOLDEN) % 1.0), group)
        else:
            part[:] = np.repeat(group, counts[group])
            # RandomState's stream never changes between numpy versions; Generator's may.
            np.random.RandomState(shuffle_seed + number).shuffle(part)
    entry_index = np.empty(total, dtype=np.int32)
    sample_index = np.empty(total, dtype=np.int64)
    # Both count across windows: the k-th draw of a corpus takes the k-th of its own order, and the k-th draw of an
    # entry is that entry's sample k.
    given, drawn = starts.copy(), np.zeros(len(counts), dtype=np.int64)
    done = 0
    # Phase 0.5 puts every draw in the middle of its step: two corpora never deviate by a whole sample
    # (tests/data/test_blend_order.py).
    for order in _spread(of_corpus, np.full(len(groups), 0.5)):
        window = slice(done, done := done + len(order))
        entry_index[window] = inside[_occurrences(order, given)]
        sample_index[window] = _occurrences(entry_index[window], drawn)
    return entry_index, sample_index


def _spread(counts: np.ndarray, phases: np.ndarray) -> Iterator[np.ndarray]:
    """Yield indices, each `counts[i]` times, spread evenly: item j of i is at (j + phase) / count.

    They come in windows of about `_WINDOW` places, so that memory stays bounded; the order is that of one sort of all.
    """
    num_windows = max(1, int(counts.sum()) // _WINDOW)
    divisors = np.maximum(counts, 1)
    first = np.zeros_like(counts)
    for window in range(1, num_windows + 1):
        last = counts
        if window < num_windows:
            bound = window / num_windows
            # ceil(bound x count - phase) items are below the bound. This estimate is never higher and at most 3
            # lower, the rounding of the product included; so three corrections are enough.
            last = np.clip((bound * counts - phases).astype(np.int64) - 1, first, counts)
            for _ in range(3):  # the very comparison that a sort would make, not the rounded bound, says what is below
                last = last + ((last < counts) & ((last + phases) / divisors < bound))
        ids = np.repeat(np.arange(len(counts)), last - first)
        places = (first[ids] + _ramps(last - first) + phases[ids]) / counts[ids]
        # Stable: items at equal places keep the order of their indices, as one sort of all items would. The order
        # of a run that has begun must never change.
        yield ids[np.argsort(places, kind="stable")]
        first = last


def _fill(target: np.ndarray, windows: Iterator[np.ndarray], values: np.ndarray) -> None:
    """Put `values` of the indices of all windows into `target`, one after the other."""
    done = 0
    for window in windows:
        target[done : done + len(window)] = values[window]
        done += len(window)


def _occurrences(index: np.ndarray, before: np.ndarray) -> np.ndarray:
    """Return for each element how many equal ones precede it, plus `before[element]`, which grows by all of them."""
    counts = np.bincount(index, minlength=len(before))
    narrow = index.astype(np.uint16) if len(before) <= 1 << 16 else index  # sorted by radix
    occurrences = np.empty(len(index), dtype=np.int64)
    occurrences[np.argsort(narrow, kind="stable")] = _ramps(counts) + np.repeat(before, counts)
    before += counts
    return occurrences


def _ramps(counts: np.ndarray) -> np.ndarray:
    """Return 0 .. counts[0] - 1, 0 .. counts[1] - 1, ..."""
    starts = np.cumsum(counts) - counts
    return np.arange(counts.sum()) - np.repeat(starts, counts)
