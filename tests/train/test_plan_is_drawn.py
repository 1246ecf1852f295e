"""Whatever the blend, training draws what its plan says: every shard its samples, nothing skipped, nothing twice in an epoch."""

import dataclasses
import math
import tempfile
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_cpt.config.settings.schema import (
    CorpusConfig,
    DataConfig,
    ModelConfig,
    PathsConfig,
    RunConfig,
    TrainingConfig,
)
from megatron_cpt.data.blend.plan import finish_stage, plan_blend
from megatron_cpt.data.shards.indexed import bin_path, idx_path, manifest_path, write_index
from megatron_cpt.data.shards.skip_list import stage_skip_list
from megatron_cpt.errors import DataError
from megatron_cpt.files import write_json
from megatron_cpt.train.samples.stage_samples import build_blended_samples
from tests.train.test_samples import dataset_config

SEQ = 16
_SHARDS = st.lists(st.lists(st.integers(0, 60), min_size=1, max_size=12).filter(any), min_size=1, max_size=4)
_WEIGHTS = st.one_of(st.floats(1e-6, 1e-3), st.floats(0.05, 1))


def write_shard(prefix: Path, lengths: list[int], first_token: int) -> None:
    """Write a shard whose tokens count upwards, so that a sample tells where each of its tokens comes from."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    np.arange(first_token, first_token + sum(lengths), dtype=np.int32).tofile(bin_path(prefix))
    write_index(idx_path(prefix), np.dtype(np.int32), np.array(lengths))
    write_json(manifest_path(prefix), {"documents": len(lengths), "tokens": sum(lengths), "tokenizer": {}})


def stage(folder: Path, mix: dict[str, float], train_iters: int, **data) -> RunConfig:
    return RunConfig(
        task="t",
        params="p",
        size="s",
        model=ModelConfig(num_layers=1, hidden_size=8, ffn_hidden_size=8, num_attention_heads=1, vocab_size=100),
        training=TrainingConfig(seq_length=SEQ, global_batch_size=4, train_iters=train_iters),
        data=DataConfig(mix=mix, corpora={name: CorpusConfig(tokens=(name,)) for name in mix}, max_epochs=1e9, **data),
        paths=PathsConfig(data_dir=str(folder)),
    )


@settings(max_examples=15, deadline=None)
@given(
    corpora=st.lists(_SHARDS, min_size=1, max_size=3),
    weights=st.lists(_WEIGHTS, min_size=3, max_size=3),
    train_iters=st.integers(1, 60),
    shuffles=st.booleans(),
    skipped=st.booleans(),
)
def test_every_shard_gives_its_planned_samples_of_its_own_tokens(corpora, weights, train_iters, shuffles, skipped):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        spans, lines = {}, []
        for number, shards in enumerate(corpora):
            for index, lengths in enumerate(shards):
                prefix = folder / f"C{number}" / f"s{index}"  # the same names in every corpus
                write_shard(prefix, lengths, (number * 10 + index) * 10**4)
                spans[str(prefix)] = ((number * 10 + index) * 10**4, sum(lengths))
        if skipped and len(corpora[0][0]) > 1:
            lines = ["C0/s0 0 0"]
        (folder / "skip.txt").write_text("\n".join(lines))
        total = sum(weights[: len(corpora)])
        mix = {f"C{number}": weight / total for number, weight in zip(range(len(corpora)), weights, strict=False)}
        mix["C0"] += 1 - sum(mix.values())
        config = stage(folder, mix, train_iters, skip_list="skip.txt", shuffle_in_corpus=shuffles)
        try:
            plan = plan_blend(config)
        except DataError as problem:
            assert "not one sequence" in str(problem) or "no token" in str(problem)
            return
        skip = stage_skip_list(config)
        dataset = build_blended_samples(
            plan.entries, plan.train_samples, dataset_config(), folder / "cache", skip=skip, shuffle_in_corpus=shuffles
        )
        drawn = [0] * len(plan.entries)
        starts: dict[int, list[int]] = {}
        for index in range(plan.train_samples):
            sample = dataset[index]
            entry = int(sample["dataset_id"])
            first, size = spans[plan.entries[entry].prefix]
            tokens = sample["tokens"].numpy()
            assert first <= tokens.min() and tokens.max() < first + size
            if plan.entries[entry].prefix in skip:
                assert tokens.min() >= first + corpora[0][0][0]
            drawn[entry] += 1
            starts.setdefault(entry, []).append(int(tokens[0]))
        assert drawn == plan.num_samples
        assert sum(drawn) == plan.train_samples
        for entry, count in zip(plan.entries, drawn, strict=True):
            assert abs(count - entry.tokens / SEQ) < 1
        for row in plan.corpora:
            assert abs(row.num_samples - row.taken / SEQ) < 1
            assert math.floor(row.requested) <= row.taken <= math.ceil(row.requested)
        for number, found in starts.items():
            size = spans[plan.entries[number].prefix][1]
            if plan.entries[number].prefix in skip:
                size -= corpora[0][0][0]
            per_epoch = (size - 1) // SEQ
            for epoch in range(0, len(found), per_epoch or len(found)):
                part = found[epoch : epoch + per_epoch] if per_epoch else []
                assert len(set(part)) == len(part)


def test_the_plan_of_many_tiny_shards_is_drawn_to_the_sample(tmp_path):
    rng = np.random.default_rng(0)
    for index in range(300):
        write_shard(tmp_path / "C0" / f"{index:03d}", [int(rng.integers(20, 40))], index * 10**4)
    write_shard(tmp_path / "C1" / "large", [5000], 10**7)
    config = stage(tmp_path, {"C0": 0.3, "C1": 0.7}, 100)
    plan = plan_blend(config)
    dataset = build_blended_samples(plan.entries, plan.train_samples, dataset_config(), tmp_path / "cache")
    ids = np.bincount([int(dataset[index]["dataset_id"]) for index in range(400)], minlength=301)
    assert ids.tolist() == plan.num_samples
    assert abs(sum(plan.num_samples[:300]) - 120) < 1 and max(plan.num_samples[:300]) <= 2
    assert dataclasses.replace(plan, entries=[]).train_samples == 400


@settings(max_examples=6, deadline=None)
@given(
    sizes=st.lists(st.integers(40, 400), min_size=4, max_size=4),
    replays=st.lists(st.floats(0.05, 0.9), min_size=3, max_size=3),
    iterations=st.lists(st.integers(1, 12), min_size=4, max_size=4),
    seeds=st.lists(st.integers(0, 99), min_size=4, max_size=4),
)
def test_stages_replay_every_sample_of_the_buffer_once_before_any_comes_again(sizes, replays, iterations, seeds):
    """D0 to D3, each stage replaying all before it, with seeds of their own; a stage is planned again and changes nothing."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for number, size in enumerate(sizes):
            write_shard(folder / f"D{number}", [size // 3, size - size // 3], number * 10**4)
        replayed: dict[str, list[int]] = {}
        for number in range(4):
            share = round(replays[number - 1], 3)
            mix = {f"D{number}": round(1 - share, 3), "buffer": share} if number else {"D0": 1.0}
            corpora = {f"D{other}": CorpusConfig(tokens=(f"D{other}",)) for other in range(4)}
            config = stage(folder, mix, iterations[number], buffer="buffer.yaml")
            data = dataclasses.replace(config.data, corpora=corpora)
            config = dataclasses.replace(config, variant=f"stage{number}", data=data)
            plan = plan_blend(config)
            dataset = build_blended_samples(
                plan.entries, plan.train_samples, dataset_config(seeds[number]), folder / "cache"
            )
            for index in range(plan.train_samples):
                sample = dataset[index]
                entry = plan.entries[int(sample["dataset_id"])]
                if entry.first_sample is not None:
                    replayed.setdefault(entry.prefix, []).append(int(sample["tokens"][0]))
            assert finish_stage(config, plan.entries)
            again = plan_blend(config)
            if number:
                assert [e.prefix for e in again.entries] == [e.prefix for e in plan.entries]
            assert not finish_stage(config, again.entries)
        for prefix, found in replayed.items():
            size = sizes[int(Path(prefix).name[1:])]
            per_epoch = (size - 1) // SEQ
            for epoch in range(0, len(found), per_epoch):
                part = found[epoch : epoch + per_epoch]
                assert len(set(part)) == len(part), (prefix, epoch)
