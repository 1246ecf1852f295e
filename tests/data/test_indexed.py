"""Token files equal megatron-core's, in both directions, and damaged ones are refused by name."""

import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_cpt.data.shards.indexed import (
    bin_path,
    document_bounds,
    idx_path,
    read_index,
    read_shard_manifest,
    read_tokens,
    token_dtype,
    write_index,
)
from megatron_cpt.errors import DataError


def write_shard(prefix, documents, dtype=np.uint16):
    dtype = np.dtype(dtype)
    bin_path(prefix).write_bytes(b"".join(np.array(ids, dtype=dtype).tobytes() for ids in documents))
    write_index(idx_path(prefix), dtype, np.array([len(ids) for ids in documents], dtype=np.int32))


def build_with_megatron(prefix, documents, dtype):
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(bin_path(prefix)), dtype=dtype)
    for sequences in documents:
        for ids in sequences:
            builder.add_item(torch.tensor(ids, dtype=torch.int64))
        builder.end_document()
    builder.finalize(str(idx_path(prefix)))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(st.integers(0, 65000), max_size=20), max_size=12), st.sampled_from([np.uint16, np.int32]))
def test_the_pair_equals_what_megatron_core_writes_byte_for_byte(tmp_path_factory, documents, dtype):
    folder = tmp_path_factory.mktemp("shard")
    write_shard(folder / "ours", documents, dtype)
    build_with_megatron(folder / "theirs", [[ids] for ids in documents], dtype)
    assert bin_path(folder / "ours").read_bytes() == bin_path(folder / "theirs").read_bytes()
    assert idx_path(folder / "ours").read_bytes() == idx_path(folder / "theirs").read_bytes()


def test_megatron_core_reads_what_is_written_here(tmp_path):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    documents = [[1, 2, 3], [4], [5, 6]]
    write_shard(tmp_path / "x", documents)
    dataset = IndexedDataset(str(tmp_path / "x"))
    assert [dataset[i].tolist() for i in range(len(dataset))] == documents
    assert dataset.document_indices.tolist() == [0, 1, 2, 3]


def test_documents_of_several_sequences_are_read(tmp_path):
    build_with_megatron(tmp_path / "x", [[[1, 2], [3]], [[4, 5, 6]]], np.int32)
    index = read_index(tmp_path / "x")
    assert (index.num_documents, index.num_tokens, index.dtype) == (2, 6, np.dtype(np.int32))
    assert index.sequence_lengths.tolist() == [2, 1, 3]
    assert index.document_indices.tolist() == [0, 2, 3]
    assert document_bounds(index).tolist() == [0, 3, 6]
    assert read_tokens(index).tolist() == [1, 2, 3, 4, 5, 6]


def test_an_empty_shard_has_no_documents_and_no_tokens(tmp_path):
    write_shard(tmp_path / "x", [])
    index = read_index(tmp_path / "x")
    assert (index.num_documents, index.num_tokens, len(read_tokens(index))) == (0, 0, 0)


def test_dots_in_a_prefix_stay(tmp_path):
    write_shard(tmp_path / "v1.5_text_document", [[1]])
    assert (tmp_path / "v1.5_text_document.idx").exists()
    assert read_index(tmp_path / "v1.5_text_document").num_tokens == 1


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: b"MMIDIDY" + data[7:], "starts with"),
        (lambda data: data[:9] + struct.pack("<Q", 2) + data[17:], "version 2"),
        (lambda data: data[:17] + b"\x63" + data[18:], "dtype code 99"),
        (lambda data: data[:20], "within its header"),
        (lambda data: data[:-5], "its header promises"),
        (lambda data: data[:34] + struct.pack("<i", -3) + data[38:], "negative"),
        (lambda data: data[:-8] + struct.pack("<q", 9), "end at sequence 9"),
    ],
)
def test_a_damaged_index_is_one_clear_error(tmp_path, damage, message):
    write_shard(tmp_path / "x", [[1, 2, 3], [4]])
    idx_path(tmp_path / "x").write_bytes(damage(idx_path(tmp_path / "x").read_bytes()))
    with pytest.raises(DataError, match=message) as caught:
        read_index(tmp_path / "x")
    assert "x.idx" in str(caught.value)


def test_a_bin_file_shorter_than_its_index_is_refused(tmp_path):
    write_shard(tmp_path / "x", [[1, 2, 3], [4]])
    bin_path(tmp_path / "x").write_bytes(b"\x00" * 6)
    with pytest.raises(DataError, match=r"x\.bin: holds 6 bytes; its index promises 8"):
        read_index(tmp_path / "x")


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_half_a_shard_is_refused_by_name(tmp_path, suffix):
    write_shard(tmp_path / "x", [[1]])
    (tmp_path / f"x{suffix}").unlink()
    with pytest.raises(DataError, match=rf"x\{suffix}: no such file"):
        read_index(tmp_path / "x")


def test_a_manifest_that_is_none_is_refused(tmp_path):
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(DataError, match="not a shard manifest"):
        read_shard_manifest(tmp_path / "x")


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65499, np.uint16), (65500, np.int32)])
def test_the_type_on_disk_follows_megatron_cores_rule(vocab_size, dtype):
    from megatron.core.datasets.indexed_dataset import DType

    assert token_dtype(vocab_size) == np.dtype(dtype)
    assert DType.optimal_dtype(vocab_size) is dtype
