"""Flipped bits of an index are refused when it is opened: what it claims follows from its lengths, and its manifest."""

import numpy as np
import pytest

from megatron_cpt.data.shards.discovery import read_shard
from megatron_cpt.data.shards.indexed import HEADER, bin_path, idx_path, read_index, write_index
from megatron_cpt.errors import DataError
from megatron_cpt.files import write_json

LENGTHS = np.array([3, 1, 4, 1, 5, 9, 2, 6])


@pytest.fixture
def shard(tmp_path):
    prefix = tmp_path / "x_text_document"
    write_index(idx_path(prefix), np.dtype(np.uint16), LENGTHS)
    np.arange(LENGTHS.sum(), dtype=np.uint16).tofile(bin_path(prefix))
    counts = {"documents": len(LENGTHS), "tokens": int(LENGTHS.sum()), "dtype": "uint16"}
    write_json(prefix.with_name(prefix.name + ".json"), counts | {"tokenizer": {"hash": "x"}})
    return prefix


def test_every_flipped_bit_of_an_index_is_noticed(shard):
    data = idx_path(shard).read_bytes()
    read_shard(str(shard))
    for bit in range(8 * len(data)):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        idx_path(shard).write_bytes(changed)
        with pytest.raises(DataError, match="damaged|promises|of the version|no such"):
            read_shard(str(shard))
    idx_path(shard).write_bytes(data)
    assert read_shard(str(shard)).tokens == LENGTHS.sum()


def test_two_changed_lengths_that_cancel_are_noticed(shard):
    lengths = LENGTHS.astype(np.int32)
    lengths[2], lengths[5] = lengths[2] + 1, lengths[5] - 1
    data = bytearray(idx_path(shard).read_bytes())
    data[HEADER.size : HEADER.size + lengths.nbytes] = lengths.tobytes()
    idx_path(shard).write_bytes(data)
    with pytest.raises(DataError, match="the offset of sequence 3 is 16; the lengths before it make 18"):
        read_index(shard)


@pytest.mark.parametrize("ends", [[0, 2, 1, 3], [0, 3, 3, 2], [1, 2, 3, 3]])
def test_documents_out_of_order_are_refused(ends, tmp_path):
    write_index(idx_path(tmp_path / "x"), np.dtype(np.int32), np.array([1, 2, 3]), np.array(ends))
    np.zeros(6, np.int32).tofile(bin_path(tmp_path / "x"))
    with pytest.raises(DataError, match="document|sequence"):
        read_index(tmp_path / "x")


def test_documents_of_several_sequences_and_of_none_are_sound(tmp_path):
    write_index(idx_path(tmp_path / "x"), np.dtype(np.int32), np.array([1, 2, 3]), np.array([0, 2, 2, 3]))
    np.zeros(6, np.int32).tofile(bin_path(tmp_path / "x"))
    index = read_index(tmp_path / "x")
    assert (index.num_documents, index.num_tokens, index.has_one_sequence_each) == (3, 6, False)


def test_a_large_index_is_checked_in_parts_and_once(tmp_path, monkeypatch):
    from megatron_cpt.data.shards import indexed

    monkeypatch.setattr(indexed, "_CHUNK_SEQUENCES", 3)
    lengths = np.arange(1, 12)
    write_index(idx_path(tmp_path / "x"), np.dtype(np.uint16), lengths)
    np.zeros(lengths.sum(), np.uint16).tofile(bin_path(tmp_path / "x"))
    assert read_index(tmp_path / "x").num_tokens == lengths.sum()
    monkeypatch.setattr(indexed.np, "cumsum", lambda *_, **__: pytest.fail("looked at again"))
    assert read_index(tmp_path / "x").has_one_sequence_each
