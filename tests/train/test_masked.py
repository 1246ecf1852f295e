"""Masked and packed shards: which labels count, who sees whom, and that a pack is a sample."""

import itertools
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megatron_cpt.data.lists.entry import DataEntry
from megatron_cpt.data.shards.masked import LEARNED, PIECE, mask_prefix, write_masked_shard
from megatron_cpt.errors import DataError
from megatron_cpt.train.samples.shard_samples import loss_of_bits
from megatron_cpt.train.samples.stage_samples import build_blended_samples, build_epoch_samples
from tests.train.test_samples import SEQ, dataset_config, write_shard
from tests.train.tiny import EOD

TOKENIZER = {"name": "tiny", "kind": "test", "hash": "0", "vocab_size": 500, "eod_id": EOD}


def conversation(rng, length):
    """Return (ids, mask) of a conversation: roughly half its tokens are learned, the first one never."""
    ids = rng.integers(EOD + 1, 400, length)
    mask = rng.integers(0, 2, length) * LEARNED
    mask[0] = PIECE
    return ids, mask


def write_conversations(prefix: Path, seed=0, count=40):
    rng = np.random.default_rng(seed)
    prefix.parent.mkdir(parents=True, exist_ok=True)
    documents = [conversation(rng, int(rng.integers(5, 30))) for _ in range(count)]
    write_masked_shard(prefix, documents, np.dtype(np.int32), TOKENIZER)
    return documents


def write_packs(prefix: Path, seq_length=SEQ, count=12, seed=0):
    """Write packs of two conversations and filling; return (ids, mask) of each."""
    rng = np.random.default_rng(seed)
    prefix.parent.mkdir(parents=True, exist_ok=True)
    packs = []
    for number in range(count):
        half = seq_length // 2
        (one, one_mask), (two, two_mask) = conversation(rng, half - 2), conversation(rng, half - 1)
        filling = np.full(3, EOD)
        ids, mask = np.concatenate([one, two, filling]), np.concatenate([one_mask, two_mask, [PIECE, 0, 0]])
        ids[0] = 400 + number  # tells the packs apart
        packs.append((ids, mask))
    write_masked_shard(prefix, packs, np.dtype(np.int32), TOKENIZER, packed_seq_length=seq_length)
    return packs


def test_the_first_token_of_a_piece_never_counts():
    assert loss_of_bits(np.array([0, LEARNED, PIECE, LEARNED | PIECE])).tolist() == [0.0, 1.0, 0.0, 0.0]


def test_the_mask_of_a_sample_is_that_of_its_tokens(tmp_path):
    """Every token of this shard differs, so a token tells which byte of the mask is its own."""
    lengths = [20, 7, 33] * 20
    total = sum(lengths)
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 4, total)
    bounds = np.cumsum([0, *lengths])
    documents = [(np.arange(first, last) + 1, bits[first:last]) for first, last in itertools.pairwise(bounds)]
    write_masked_shard(tmp_path / "s", documents, np.dtype(np.int32), TOKENIZER)
    entry = DataEntry(prefix=str(tmp_path / "s"), tokens=3 * total, corpus="chat")
    dataset = build_blended_samples([entry], 3 * total // SEQ, dataset_config(), tmp_path / "cache")
    for index in range(len(dataset)):
        sample = dataset[index]
        labels, tokens = sample["labels"].numpy(), sample["tokens"].numpy()
        assert sample["loss_mask"].numpy().tolist() == loss_of_bits(bits[labels - 1]).tolist()
        assert sample["pieces"].tolist() == np.cumsum(bits[tokens - 1] & PIECE != 0).tolist()


def test_a_pack_is_a_sample_in_every_epoch(tmp_path):
    packs = write_packs(tmp_path / "s")
    known = {int(ids[0]): (ids, mask) for ids, mask in packs}
    entry = DataEntry(prefix=str(tmp_path / "s"), tokens=3 * 12 * SEQ, corpus="chat")
    dataset = build_blended_samples([entry], 36, dataset_config(), tmp_path / "cache")
    orders = []
    for epoch in range(3):
        firsts = []
        for index in range(12 * epoch, 12 * (epoch + 1)):
            sample = dataset[index]
            ids, mask = known[int(sample["tokens"][0])]
            firsts.append(int(ids[0]))
            assert sample["tokens"].tolist() == ids.tolist()
            assert sample["labels"][:-1].tolist() == ids[1:].tolist()
            assert sample["loss_mask"].tolist() == [*loss_of_bits(mask[1:]).tolist(), 0.0]
            assert sample["pieces"].tolist() == np.cumsum(mask & PIECE != 0).tolist()
            assert dataset.shards[0].spans(index) == [(firsts[-1] - 400, 0, SEQ)]
        assert sorted(firsts) == sorted(known)
        orders.append(firsts)
    assert orders[0] != orders[1]


def test_packs_of_another_length_are_refused(tmp_path):
    write_packs(tmp_path / "s", seq_length=2 * SEQ)
    entry = DataEntry(prefix=str(tmp_path / "s"), tokens=SEQ, corpus="chat")
    with pytest.raises(DataError, match=rf"packed for sequences of {2 * SEQ} tokens; training.seq_length is {SEQ}"):
        build_blended_samples([entry], 1, dataset_config(), tmp_path / "cache")


def test_a_mask_of_other_documents_is_refused(tmp_path):
    write_conversations(tmp_path / "s", seed=0)
    write_conversations(tmp_path / "other", seed=1)
    for suffix in (".bin", ".idx"):
        source = mask_prefix(tmp_path / "other")
        source.with_name(source.name + suffix).rename(tmp_path / f"s.mask{suffix}")
    entry = DataEntry(prefix=str(tmp_path / "s"), tokens=SEQ, corpus="chat")
    with pytest.raises(DataError, match="Both must be alike"):
        build_blended_samples([entry], 1, dataset_config(), tmp_path / "cache")


def test_a_blend_mixes_masked_packed_and_plain_shards(tmp_path):
    from megatron_cpt.train.samples.batches import _batch

    write_conversations(tmp_path / "chat")
    write_packs(tmp_path / "packs")
    write_shard(tmp_path / "plain", [20] * 40, first_token=1000)
    entries = [
        DataEntry(prefix=str(tmp_path / name), tokens=12 * SEQ, corpus=name) for name in ("chat", "packs", "plain")
    ]
    dataset = build_blended_samples(entries, 36, dataset_config(), tmp_path / "cache")
    samples = [dataset[index] for index in range(36)]
    assert {sample["dataset_id"]: "pieces" in sample for sample in samples} == {0: True, 1: True, 2: False}
    plain = next(sample for sample in samples if sample["dataset_id"] == 2)
    plain["tokens"][4] = EOD
    chat = next(sample for sample in samples if sample["dataset_id"] == 0)

    class Batches:  # what build_batch would get, without a process group
        def __call__(self, ids, config, eod_id, loss_mask, sources, *, pieces, sample_ids):
            return ids, loss_mask, pieces, sample_ids

    import megatron_cpt.train.samples.batches as batches

    original, batches.build_batch = batches.build_batch, Batches()
    try:
        config = SimpleNamespace(model=SimpleNamespace(vocab_size=10_000))
        _, loss_mask, pieces, sample_ids = _batch([plain, chat], (3, 4), [True, True], config, EOD)
    finally:
        batches.build_batch = original
    assert pieces[0].tolist() == [0] * 5 + [1] * (SEQ - 5)
    assert pieces[1].tolist() == chat["pieces"].tolist()
    assert loss_mask[0].sum() == SEQ and torch.equal(loss_mask[1], chat["loss_mask"])
    assert sample_ids.tolist() == [3, 4]


def test_one_epoch_of_held_out_packs_is_every_pack_once(tmp_path):
    packs = write_packs(tmp_path / "s")
    dataset = build_epoch_samples([str(tmp_path / "s")], dataset_config(), tmp_path / "cache")
    assert sorted(int(dataset[index]["tokens"][0]) for index in range(len(dataset))) == [
        int(ids[0]) for ids, _ in packs
    ]


def test_shards_without_a_whole_sample_cannot_be_held_out(tmp_path):
    write_shard(tmp_path / "s", [SEQ])
    with pytest.raises(DataError, match="not one sequence"):
        build_epoch_samples([str(tmp_path / "s")], dataset_config(), tmp_path / "cache")


def test_documents_are_rearranged_in_shards_without_a_mask_only(tmp_path):
    from megatron_cpt.data.blend.fim import FillInMiddle

    class NoText:  # these ids mean nothing, so that cuts fall between them
        def decode(self, ids):
            return "\ufffd" * len(ids)

        def encode_batch(self, texts):
            return [[0] * len(text) for text in texts]

    write_conversations(tmp_path / "chat")
    write_shard(tmp_path / "code", [20] * 40, first_token=1000)
    write_shard(tmp_path / "text", [20] * 40, first_token=5000)
    entries = [
        DataEntry(prefix=str(tmp_path / name), tokens=12 * SEQ, corpus=name) for name in ("chat", "code", "text")
    ]
    plain, changed = (build_blended_samples(entries, 36, dataset_config(), tmp_path / "cache") for _ in range(2))
    changed.fim = FillInMiddle(
        rate=1.0,
        spm_rate=0.5,
        prefix=1,
        middle=2,
        suffix=3,
        eod=EOD,
        seed=1,
        corpora=("chat", "code"),
        tokenizer=NoText(),
    )
    changed.fim_prefixes = {
        number: entry.prefix for number, entry in enumerate(entries) if changed.fim.applies_to(entry.corpus)
    }
    for index in range(36):
        before, after, again = plain[index], changed[index], changed[index]
        is_code = before["dataset_id"] == 1
        assert torch.equal(before["tokens"], after["tokens"]) != is_code
        assert torch.equal(after["tokens"], again["tokens"]) and after["tokens"].shape == before["tokens"].shape
        assert torch.equal(after["tokens"][1:], after["labels"][:-1])
        assert torch.equal(after["loss_mask"], before["loss_mask"])
        assert not is_code or {1, 2, 3} <= set(after["tokens"].tolist()) | set(after["labels"].tolist())
