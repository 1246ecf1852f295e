"""The order in which a run draws its samples: shards into corpora, corpora into the run, exact at the end and smooth on the way.

Sample j of a shard with n samples is placed at (j + u) / n of its corpus, and sample j of a corpus likewise in the run;
sorting the places gives the order. So every shard gives exactly its number of samples, and at every point of the run
corpora and shards have given their part up to rounding. The phase u of a shard follows the golden ratio, so that shards
of one sample spread over the run instead of meeting in its middle.

Megatron-Core's own blending places each sample by the largest error so far: at the end a shard is up to 1.1 samples
off (measured: one large and 19 or 499 small shards), and the errors of a corpus's shards add up.
"""

from collections.abc import Hashable, Sequence

import numpy as np

_GOLDEN = 0.6180339887498949


def blend_order(
    num_samples: Sequence[int], corpora: Sequence[Hashable], *, shuffle_seed: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return (entry index int32 [n], sample of that entry int64 [n]) of each of the run's samples in order.

    `num_samples` and `corpora` are per entry of the data list. With `shuffle_seed` a corpus's samples are shuffled among
    its shards instead of spread evenly.
    """
    names = list(dict.fromkeys(corpora))
    members = [np.array([i for i, corpus in enumerate(corpora) if corpus == name]) for name in names]
    counts = np.array(num_samples, dtype=np.int64)
    corpus_order = _spread(np.array([counts[group].sum() for group in members]), np.full(len(names), 0.5))
    entry_index = np.empty(len(corpus_order), dtype=np.int32)
    for number, group in enumerate(members):
        if shuffle_seed is None:
            inside = _spread(counts[group], (np.arange(1, len(group) + 1) * _GOLDEN) % 1.0)
        else:
            inside = np.repeat(np.arange(len(group)), counts[group])
            # RandomState's stream never changes between numpy versions; Generator's may.
            np.random.RandomState(shuffle_seed + number).shuffle(inside)
        entry_index[corpus_order == number] = group[inside]
    return entry_index, _occurrences(entry_index, counts)


def _spread(counts: np.ndarray, phases: np.ndarray) -> np.ndarray:
    """Return indices, each `counts[i]` times, spread evenly: item j of i stands at (j + phase) / count."""
    ids = np.repeat(np.arange(len(counts)), counts)
    places = (_ramps(counts) + phases[ids]) / counts[ids]
    return ids[np.argsort(places, kind="stable")]


def _occurrences(index: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return for each element how many equal ones precede it."""
    occurrences = np.empty(len(index), dtype=np.int64)
    occurrences[np.argsort(index, kind="stable")] = _ramps(counts)
    return occurrences


def _ramps(counts: np.ndarray) -> np.ndarray:
    """Return 0 .. counts[0] - 1, 0 .. counts[1] - 1, ..."""
    starts = np.cumsum(counts) - counts
    return np.arange(counts.sum()) - np.repeat(starts, counts)
