"""Masked shards: a pair of tokens and a pair of masks that fit each other."""

import numpy as np
import pytest

from megatron_cpt.data.shards.discovery import read_shard
from megatron_cpt.data.shards.indexed import idx_path, manifest_path, read_index, read_shard_manifest, write_index
from megatron_cpt.data.shards.masked import (
    MaskedShardWriter,
    has_mask,
    is_mask,
    mask_prefix,
    read_mask,
    write_masked_shard,
)
from megatron_cpt.errors import DataError

TOKENIZER = {"name": "t", "kind": "huggingface", "hash": "0" * 32, "vocab_size": 500, "eod_id": 0}
DOCUMENTS = [([5, 6, 7, 0], [2, 1, 1, 0]), ([8, 0], [3, 1])]


def write(prefix, **more):
    return write_masked_shard(prefix, DOCUMENTS, np.dtype(np.uint16), TOKENIZER, **more)


def test_what_is_written_is_read_again_and_counted(tmp_path):
    prefix = tmp_path / "a_chat_document"
    manifest = write(prefix)
    index = read_index(prefix)
    assert read_mask(index).tolist() == [2, 1, 1, 0, 3, 1]
    assert manifest["mask"] == {"learned": 4, "pieces": 2, "prompt": 0}
    assert read_shard_manifest(prefix) == manifest
    assert has_mask(prefix) and is_mask(mask_prefix(prefix)) and not is_mask(prefix)
    assert read_shard(str(prefix)).tokens == 6


def test_a_pack_of_another_length_is_refused(tmp_path):
    with pytest.raises(ValueError, match="a pack has 2 tokens, not 4"):
        write(tmp_path / "a_chat_document", packed_seq_length=4)
    assert not list(tmp_path.iterdir())


def test_an_interrupted_writer_leaves_what_stood_there(tmp_path):
    prefix = tmp_path / "a_chat_document"
    write(prefix)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(KeyboardInterrupt), MaskedShardWriter(prefix, np.dtype(np.uint16)) as writer:
        writer.add(np.array([1, 2]), np.array([2, 1]), np.array([2]))
        raise KeyboardInterrupt
    with MaskedShardWriter(prefix, np.dtype(np.uint16)):
        pass
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_mask_of_other_lengths_is_refused_by_name(tmp_path):
    prefix = tmp_path / "a_chat_document"
    write(prefix)
    write_index(idx_path(mask_prefix(prefix)), np.dtype(np.uint8), np.array([2, 4]))
    with pytest.raises(DataError, match=r"mask\.idx: has 6 tokens in 2 documents.*other lengths"):
        read_mask(read_index(prefix))
    assert manifest_path(prefix).exists()


def test_two_writers_of_one_shard_are_kept_apart_and_leftovers_go(tmp_path):
    prefix = tmp_path / "a_chat_document"
    for name in ("bin.x", "mask.bin.y", "json.z"):
        (tmp_path / f".a_chat_document.{name}.partial").write_bytes(b"left behind")
    with MaskedShardWriter(prefix, np.dtype(np.uint16)) as writer:
        with pytest.raises(DataError, match="another process is writing this shard"):
            write(prefix)
        writer.add(np.array([1]), np.array([2]), np.array([1]))
        writer.finish({"tokenizer": TOKENIZER})
    assert sorted(path.name.removeprefix("a_chat_document") for path in tmp_path.iterdir()) == [
        ".bin", ".idx", ".json", ".mask.bin", ".mask.idx",
    ]  # fmt: skip
    write(prefix)
