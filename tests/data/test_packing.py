"""Packing: no token lost or doubled, no pack too long, every piece's start flagged."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_cpt.data.joining.packing import PackOptions, pack_shard, plan_packs
from megatron_cpt.data.shards.indexed import (
    bin_path,
    document_bounds,
    idx_path,
    manifest_path,
    read_index,
    read_tokens,
    write_index,
)
from megatron_cpt.data.shards.masked import LEARNED, PIECE, read_mask, write_masked_shard
from megatron_cpt.errors import ConfigError, DataError
from tests.tolerances import assert_fp64_rounding

TOKENIZER = {"name": "t", "kind": "huggingface", "hash": "0" * 32, "vocab_size": 500, "eod_id": 0}


def write_plain(prefix, documents):
    ids = np.concatenate([np.array(document, dtype=np.uint16) for document in documents])
    bin_path(prefix).write_bytes(ids.tobytes())
    write_index(idx_path(prefix), np.dtype(np.uint16), np.array([len(document) for document in documents]))
    manifest = {"documents": len(documents), "tokens": len(ids), "tokenizer": TOKENIZER, "bytes": 10}
    manifest_path(prefix).write_text(json.dumps(manifest))


def packs_of(prefix):
    """Return (ids, mask) of each pack."""
    index = read_index(prefix)
    bounds, ids, mask = document_bounds(index), read_tokens(index), read_mask(index)
    return [(ids[a:b].tolist(), mask[a:b].tolist()) for a, b in itertools.pairwise(bounds)]


@settings(max_examples=80, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), max_size=60),
    size=st.integers(2, 17),
    window=st.integers(1, 70),
    overflow=st.sampled_from(["split", "truncate", "drop"]),
)
def test_pieces_fit_and_cover_the_documents_once(lengths, size, window, overflow):
    plan = plan_packs(np.array(lengths), PackOptions(seq_length=size, overflow=overflow, window=window))
    used = [plan.pieces[a:b, 2].sum() for a, b in itertools.pairwise(plan.starts)]
    assert all(0 < tokens <= size for tokens in used)
    assert plan.starts[-1] == len(plan.pieces)
    found = sorted((d, t) for d, start, n in plan.pieces.tolist() for t in range(start, start + n))
    kept = {"split": lambda n: n, "truncate": lambda n: min(n, size), "drop": lambda n: n if n <= size else 0}[overflow]
    assert found == [(document, token) for document, n in enumerate(lengths) for token in range(kept(n))]
    # best fit: two packs of one window that would fit into one do not both stand half empty
    if window >= len(lengths):
        assert sum(tokens <= size / 2 for tokens in used) <= 1


@settings(max_examples=15, deadline=None)
@given(
    documents=st.lists(st.lists(st.integers(1, 400), min_size=1, max_size=30), min_size=1, max_size=20), data=st.data()
)
def test_packed_shards_hold_every_token_with_its_mask_once(documents, data, tmp_path_factory):
    size = data.draw(st.integers(2, 12))
    folder = tmp_path_factory.mktemp("pack")
    masks = [data.draw(st.lists(st.sampled_from([0, 1]), min_size=len(d), max_size=len(d))) for d in documents]
    masks = [[mask[0] | PIECE, *mask[1:]] for mask in masks]
    write_masked_shard(folder / "a", zip(documents, masks), np.dtype(np.uint16), TOKENIZER)
    manifest, _ = pack_shard(folder / "a", folder / "b", PackOptions(seq_length=size))
    pieces, filling, num_filled = [], 0, 0
    for ids, mask in packs_of(folder / "b"):
        assert len(ids) == size and mask[0] & PIECE
        starts = [i for i, flag in enumerate(mask) if flag & PIECE] + [size]
        for a, b in itertools.pairwise(starts):
            if ids[a] == 0:
                assert b == size and set(ids[a:b]) == {0} and mask[a:b] == [PIECE] + [0] * (b - a - 1)
                filling, num_filled = filling + b - a, num_filled + 1
            else:
                pieces.append((tuple(ids[a:b]), tuple(flag & LEARNED for flag in mask[a:b])))
    expected = [
        (tuple(d[i : i + size]), tuple(flag & LEARNED for flag in m[i : i + size]))
        for d, m in zip(documents, masks)
        for i in range(0, len(d), size)
    ]
    assert sorted(pieces) == sorted(expected)
    assert_fp64_rounding(manifest["packed"]["fill"], 1 - filling / manifest["tokens"])
    assert manifest["mask"]["pieces"] == len(pieces) + num_filled


def test_a_shard_without_a_mask_is_learned_whole(tmp_path):
    write_plain(tmp_path / "a", [[1, 2, 0], [3, 0], [4, 5, 6, 7, 8, 0]])
    manifest, _ = pack_shard(tmp_path / "a", tmp_path / "b", PackOptions(seq_length=5))
    assert sorted(packs_of(tmp_path / "b")) == [
        ([0, 0, 0, 0, 0], [3, 2, 0, 0, 0]),
        ([1, 2, 0, 3, 0], [3, 1, 1, 3, 1]),
        ([4, 5, 6, 7, 8], [3, 1, 1, 1, 1]),
    ]
    assert manifest["packed"] | {"seq_length": 5, "method": "best-fit", "split_documents": 1} == manifest["packed"]
    assert manifest["mask"] == {"learned": 11, "pieces": 5, "prompt": 0}


def test_packing_again_keeps_the_result_and_other_options_are_refused(tmp_path):
    write_plain(tmp_path / "a", [[1, 2, 0], [3, 0]])
    first, is_kept = pack_shard(tmp_path / "a", tmp_path / "b", PackOptions(seq_length=4))
    before = bin_path(tmp_path / "b").stat()
    assert not is_kept
    assert pack_shard(tmp_path / "a", tmp_path / "b", PackOptions(seq_length=4)) == (first, True)
    assert bin_path(tmp_path / "b").stat() == before
    with pytest.raises(DataError, match="was packed with seq_length=4, not 5"):
        pack_shard(tmp_path / "a", tmp_path / "b", PackOptions(seq_length=5))
    with pytest.raises(DataError, match="packed already"):
        pack_shard(tmp_path / "b", tmp_path / "c", PackOptions(seq_length=4))


def test_a_number_of_packs_is_drawn_over_the_whole_shard(tmp_path):
    lengths = np.full(1000, 10)
    plan = plan_packs(lengths, PackOptions(seq_length=10, max_packs=100, window=50))
    assert len(plan.starts) == 101 and np.all(np.diff(plan.starts) == 1)
    documents = plan.pieces[:, 0]
    assert len(set(documents.tolist())) == 100
    assert [np.count_nonzero(documents // 250 == quarter) > 10 for quarter in range(4)] == [True] * 4
    assert len(plan_packs(lengths, PackOptions(seq_length=10, max_packs=2000)).starts) == 1001


def test_too_long_documents_can_be_an_error(tmp_path):
    with pytest.raises(DataError, match="document 1 has 9 tokens, 1 documents more than 8"):
        plan_packs(np.array([3, 9]), PackOptions(seq_length=8, overflow="fail"))
    with pytest.raises(ConfigError, match="overflow is 'wrap'"):
        plan_packs(np.array([3, 9]), PackOptions(seq_length=8, overflow="wrap"))


def test_best_fit_leaves_little_room_on_a_usual_distribution():
    lengths = np.clip(np.random.default_rng(0).lognormal(5.5, 1.0, 20_000).astype(int), 8, 4096)
    plan = plan_packs(lengths, PackOptions(seq_length=4096, window=4096))
    assert lengths.sum() / (4096 * (len(plan.starts) - 1)) > 0.99
