"""The replay buffer keeps what stages drew; later stages go on from there."""

import dataclasses
import multiprocessing

import numpy as np
import pytest

from megatron_cpt.config.settings.schema import (
    CorpusConfig,
    DataConfig,
    ModelConfig,
    PathsConfig,
    RunConfig,
    TrainingConfig,
)
from megatron_cpt.data.blend.plan import finish_stage, plan_blend
from megatron_cpt.data.blend.replay import append_stage, read_buffer
from megatron_cpt.data.lists.data_list import DataEntry, read_data_list, write_data_list
from megatron_cpt.data.shards.indexed import bin_path, idx_path, manifest_path, write_index
from megatron_cpt.errors import DataError
from megatron_cpt.files import write_json

_IDENTITY = {"name": "tok", "kind": "huggingface", "hash": "0123456789", "vocab_size": 100, "eod_id": 0}


@pytest.fixture
def data_dir(tmp_path):
    for name, tokens in (("D0", 64 * 200), ("D1", 64 * 100), ("D2", 64 * 90)):
        prefix = tmp_path / f"{name}_text_document"
        lengths = np.full(tokens // 32, 32)
        np.ones(tokens, dtype=np.uint16).tofile(bin_path(prefix))
        write_index(idx_path(prefix), np.dtype(np.uint16), lengths)
        write_json(manifest_path(prefix), {"documents": len(lengths), "tokens": tokens, "tokenizer": _IDENTITY})
    return tmp_path


def stage(data_dir, variant, mix, train_samples=100, seq_length=64, **data):
    return RunConfig(
        task="t",
        params="p",
        size="s",
        variant=variant,
        model=ModelConfig(num_layers=1, hidden_size=8, ffn_hidden_size=8, num_attention_heads=1, vocab_size=100),
        training=TrainingConfig(seq_length=seq_length, global_batch_size=4, train_samples=train_samples),
        data=DataConfig(
            mix=mix,
            corpora={name: CorpusConfig(tokens=(f"{name}_text_document",)) for name in ("D0", "D1", "D2")},
            buffer="buffer.yaml",
            **data,
        ),
        paths=PathsConfig(data_dir=str(data_dir)),
    )


def run_stage(config):
    plan = plan_blend(config)
    assert finish_stage(config, plan.entries)
    return plan


def test_three_stages_replay_through_the_buffer_without_replacement(data_dir):
    run_stage(stage(data_dir, "one", {"D0": 1.0}))
    second = run_stage(stage(data_dir, "two", {"D1": 0.9, "buffer": 0.1}))
    assert [(e.corpus, e.first_sample) for e in second.entries] == [("D1", None), ("buffer", 0)]
    third = run_stage(stage(data_dir, "three", {"D2": 0.52, "buffer": 0.48}))
    buffered = [e for e in third.entries if e.corpus == "buffer"]
    assert [(e.prefix[-16:], e.first_sample) for e in buffered] == [("D0_text_document", 10), ("D1_text_document", 0)]
    assert [e.tokens for e in buffered] == [2048, 1024]  # 0.48 x 6400 in proportion to 200 : 100
    assert "D0_text_document continues after 10 samples (0.05 epochs)" in third.table()
    held = read_buffer(data_dir / "buffer.yaml")
    assert held.stages == ("t/p/s/one", "t/p/s/two", "t/p/s/three")
    assert [s.drawn_tokens // 64 for s in held.shards.values()] == [10 + 32, 16, 0]


def test_a_corpus_that_the_mix_names_is_not_drawn_from_the_buffer_as_well(data_dir):
    run_stage(stage(data_dir, "one", {"D0": 1.0}))
    run_stage(stage(data_dir, "two", {"D1": 0.9, "D0": 0.1}))
    third = plan_blend(stage(data_dir, "three", {"D0": 0.05, "D2": 0.48, "buffer": 0.47}))
    assert [(e.corpus, e.prefix[-16:-14], e.first_sample) for e in third.entries] == [
        ("D0", "D0", 10),
        ("D2", "D2", None),
        ("buffer", "D1", 0),
    ]
    without = plan_blend(stage(data_dir, "three", {"D0": 0.0, "D2": 0.1, "buffer": 0.9}))
    assert [e.prefix[-16:-14] for e in without.entries] == ["D2", "D1"]


def test_a_stage_appended_twice_counts_once(data_dir):
    config = stage(data_dir, "two", {"D1": 0.9, "buffer": 0.1})
    run_stage(stage(data_dir, "one", {"D0": 1.0}))
    plan = run_stage(config)
    before = (data_dir / "buffer.yaml").read_text()
    assert not finish_stage(config, plan.entries)
    assert (data_dir / "buffer.yaml").read_text() == before


def test_a_stage_that_has_begun_keeps_its_place_though_others_append_meanwhile(data_dir):
    run_stage(stage(data_dir, "one", {"D0": 1.0}))
    config = stage(data_dir, "two", {"D1": 0.9, "buffer": 0.1})
    begun = data_dir / "run" / "train_data.yaml"
    plan = plan_blend(config, begun)
    write_data_list(begun, plan.entries)
    run_stage(stage(data_dir, "other", {"D2": 0.5, "buffer": 0.5}))
    assert plan_blend(config).entries != plan.entries
    assert plan_blend(config, begun).entries == plan.entries == read_data_list(begun)


def test_another_sequence_length_goes_on_after_the_tokens_that_were_drawn(data_dir):
    run_stage(stage(data_dir, "one", {"D0": 1.0}))
    run_stage(stage(data_dir, "two", {"D1": 0.9, "buffer": 0.1}))
    plan = plan_blend(stage(data_dir, "three", {"D2": 0.5, "buffer": 0.5}, seq_length=96))
    assert plan.entries[1].first_sample == 7  # 640 tokens drawn, 96 a sample


def test_an_empty_or_unnamed_buffer_is_refused(data_dir):
    with pytest.raises(DataError, match="buffer.yaml holds no shard"):
        plan_blend(stage(data_dir, "one", {"D0": 0.5, "buffer": 0.5}))
    config = stage(data_dir, "one", {"D0": 0.5, "buffer": 0.5})
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, buffer=None))
    with pytest.raises(DataError, match="data.buffer is not set"):
        plan_blend(config)


@pytest.mark.parametrize("text", ["", "format: 2\nstages: []\nshards: []\n", "shards: {", "format: 1\nstages: []\n"])
def test_a_damaged_buffer_is_refused_not_started_afresh(data_dir, text):
    (data_dir / "buffer.yaml").write_text(text)
    with pytest.raises(DataError, match="not a replay buffer"):
        plan_blend(stage(data_dir, "one", {"D0": 1.0}))


def _append(path, name):
    append_stage(path, name, [DataEntry(prefix=name, tokens=64, corpus=name)], [1], 64)


def test_stages_that_end_at_once_are_all_entered(tmp_path):
    path = tmp_path / "buffer.yaml"
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_append, args=(path, f"s{index}")) for index in range(8)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    assert sorted(read_buffer(path).stages) == [f"s{index}" for index in range(8)]
    assert len(read_buffer(path).shards) == 8


def test_skipped_documents_count_as_not_available(data_dir):
    (data_dir / "skip.txt").write_text("# bad scans\nD1_text_document 0 99\nD1_text_document 50 149\n")
    plan = plan_blend(stage(data_dir, "one", {"D0": 0.9, "D1": 0.1}, skip_list="skip.txt"))
    assert [row.available for row in plan.corpora] == [64 * 200, 32 * 50]
    (data_dir / "skip.txt").write_text("./D1_text_document 0 149\r\nD2_text_document 0 0\n")
    plan = plan_blend(stage(data_dir, "one", {"D0": 0.9, "D1": 0.1}, skip_list="skip.txt"))
    assert [row.available for row in plan.corpora] == [64 * 200, 32 * 50]
    assert "the skip list names 1 shards that this stage does not read: D2_text_document" in plan.table()
    (data_dir / "skip.txt").write_text("D7_text_document 0 9\n")
    with pytest.raises(DataError, match="skip.txt: D7_text_document is no shard"):
        plan_blend(stage(data_dir, "one", {"D0": 0.9, "D1": 0.1}, skip_list="skip.txt"))
    (data_dir / "skip.txt").write_text("D1_text_document 199 200\n")
    with pytest.raises(DataError, match="documents 199 to 200 of a shard that has 200"):
        plan_blend(stage(data_dir, "one", {"D0": 0.9, "D1": 0.1}, skip_list="skip.txt"))
    (data_dir / "skip.txt").write_text("D1_text_document 3\n")
    with pytest.raises(DataError, match="skip.txt:1: 'D1_text_document 3'"):
        plan_blend(stage(data_dir, "one", {"D0": 0.9, "D1": 0.1}, skip_list="skip.txt"))
