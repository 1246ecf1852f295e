"""What training draws equals the plan, without replacement, from a cache that two builders can share."""

import dataclasses
import multiprocessing
import resource
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

from megatron_cpt.data.lists.budget import apportion, spread_samples
from megatron_cpt.data.lists.entry import DataEntry
from megatron_cpt.data.shards.indexed import bin_path, idx_path, manifest_path, write_index
from megatron_cpt.errors import DataError
from megatron_cpt.files import write_json
from megatron_cpt.train.samples import open_shards, stage_samples
from megatron_cpt.train.samples.stage_samples import build_blended_samples
from tests.tiers import full_except

SEQ = 16


class Tokenizer:
    eod = 0
    vocab_size = None
    unique_identifiers = "test"


def dataset_config(seed=1, cache=None):
    return GPTDatasetConfig(
        random_seed=seed,
        sequence_length=SEQ,
        blend=(["unused"], None),
        split="1,0,0",
        path_to_cache=cache,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        tokenizer=Tokenizer(),
    )


def write_shard(prefix: Path, lengths, first_token=0):
    """Write a shard whose tokens count upwards, so that a sample tells where it came from."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    tokens = np.arange(first_token, first_token + sum(lengths), dtype=np.int32)
    tokens.tofile(bin_path(prefix))
    write_index(idx_path(prefix), np.dtype(np.int32), np.array(lengths))
    write_json(manifest_path(prefix), {"documents": len(lengths), "tokens": len(tokens), "tokenizer": {}})


@pytest.fixture
def shards(tmp_path):
    """Nineteen small shards of one corpus and a large one of another; tokens of shard i start at i million."""
    rng = np.random.default_rng(0)
    sizes = [6000, *rng.integers(40, 400, 19).tolist()]
    for index, size in enumerate(sizes):
        lengths = [20] * (size // 20) + ([size % 20] if size % 20 else [])
        write_shard(tmp_path / f"s{index}", lengths, index * 10**6)
    return [str(tmp_path / f"s{index}") for index in range(len(sizes))], sizes


def planned(prefixes, sizes, num_samples, replay=0.1):
    total = num_samples * SEQ
    corpus_tokens = apportion(total, [1 - int(replay * 100) / 100, int(replay * 100) / 100])
    small = apportion(corpus_tokens[1], sizes[1:])
    return [DataEntry(prefix=prefixes[0], tokens=corpus_tokens[0], corpus="new")] + [
        DataEntry(prefix=prefix, tokens=tokens, corpus="replay")
        for prefix, tokens in zip(prefixes[1:], small, strict=True)
    ]


def drawn_per_entry(dataset, num_samples):
    """Return (samples per entry, samples per shard by their content) of the first `num_samples`."""
    ids, shards = [], []
    for index in range(num_samples):
        sample = dataset[index]
        ids.append(int(sample["dataset_id"]))
        shards.append(int(sample["tokens"][0]) // 10**6)
    return np.bincount(ids), np.bincount(shards)


@pytest.mark.parametrize("num_samples", [100, 777])
def test_a_run_draws_exactly_the_planned_samples_of_every_shard(tmp_path, shards, num_samples):
    prefixes, sizes = shards
    entries = planned(prefixes, sizes, num_samples)
    plan = spread_samples([entry.tokens for entry in entries], num_samples)
    dataset = build_blended_samples(entries, num_samples, dataset_config(), tmp_path / "cache")
    assert len(dataset) == num_samples
    by_id, by_content = drawn_per_entry(dataset, num_samples)
    assert by_id.tolist() == by_content.tolist() == plan
    assert all(abs(n - entry.tokens / SEQ) < 1 for n, entry in zip(plan, entries, strict=True))
    assert abs(sum(plan[1:]) - sum(entry.tokens for entry in entries[1:]) / SEQ) < 1


def test_shuffling_within_corpora_keeps_the_counts(tmp_path, shards):
    prefixes, sizes = shards
    entries = planned(prefixes, sizes, 200)
    plain = build_blended_samples(entries, 200, dataset_config(), tmp_path / "cache")
    shuffled = build_blended_samples(entries, 200, dataset_config(), tmp_path / "cache", shuffle_in_corpus=True)
    assert np.array_equal(np.bincount(plain.dataset_index), np.bincount(shuffled.dataset_index))
    assert not np.array_equal(plain.dataset_index, shuffled.dataset_index)
    assert np.array_equal(plain.dataset_index == 0, shuffled.dataset_index == 0)


def test_megatrons_own_blend_of_the_same_entries_keeps_corpora_near_the_plan(tmp_path, shards):
    prefixes, sizes = shards
    entries = planned(prefixes, sizes, 777)
    config = dataset_config(cache=str(tmp_path / "megatron"))
    config.blend = ([entry.prefix for entry in entries], [float(entry.tokens) for entry in entries])
    (dataset, *_) = BlendedMegatronDatasetBuilder(GPTDataset, [777, 0, 0], lambda: True, config).build()
    by_id, _ = drawn_per_entry(dataset, 777)
    deviation = [abs(n - entry.tokens / SEQ) for n, entry in zip(by_id, entries, strict=True)]
    assert max(deviation) < 2


def test_no_token_comes_again_before_its_epoch_is_exhausted(tmp_path):
    write_shard(tmp_path / "s0", [20] * 40)
    entry = DataEntry(prefix=str(tmp_path / "s0"), tokens=3 * 800, corpus="c")
    dataset = build_blended_samples([entry], 150, dataset_config(), tmp_path / "cache")
    samples = [dataset[index]["tokens"].numpy() for index in range(147)]  # 49 samples an epoch
    for epoch in range(3):
        tokens = np.concatenate(samples[49 * epoch : 49 * (epoch + 1)])
        assert len(np.unique(tokens)) == 49 * SEQ
    assert not np.array_equal(np.concatenate(samples[:49]), np.concatenate(samples[49:98]))


def test_a_later_stage_goes_on_where_an_earlier_one_stopped(tmp_path):
    write_shard(tmp_path / "s0", [20] * 40)
    first = DataEntry(prefix=str(tmp_path / "s0"), tokens=20 * SEQ, corpus="buffer", first_sample=0)
    second = DataEntry(prefix=str(tmp_path / "s0"), tokens=29 * SEQ, corpus="buffer", first_sample=20)
    seen = [
        np.concatenate([dataset[index]["tokens"].numpy() for index in range(len(dataset))])
        for dataset in (
            build_blended_samples([first], 20, dataset_config(), tmp_path / "cache"),
            build_blended_samples([second], 29, dataset_config(seed=2), tmp_path / "cache"),
        )
    ]
    assert len(np.unique(np.concatenate(seen))) == 49 * SEQ


def test_skipped_documents_never_appear(tmp_path):
    write_shard(tmp_path / "s0", [20] * 40)
    entry = DataEntry(prefix=str(tmp_path / "s0"), tokens=800, corpus="c")
    skip = {str(tmp_path / "s0"): [(0, 0), (10, 19)]}
    dataset = build_blended_samples([entry], 50, dataset_config(), tmp_path / "cache", skip=skip)
    documents = {int(token) // 20 for index in range(50) for token in dataset[index]["tokens"]}
    assert documents == set(range(1, 10)) | set(range(20, 40))


def test_a_shard_smaller_than_a_sequence_still_gives_its_samples(tmp_path):
    write_shard(tmp_path / "s0", [5, 5])
    entry = DataEntry(prefix=str(tmp_path / "s0"), tokens=3 * SEQ, corpus="c")
    dataset = build_blended_samples([entry], 3, dataset_config(), tmp_path / "cache")
    assert all(len(dataset[index]["tokens"]) == SEQ for index in range(3))


def test_a_second_build_changes_nothing_and_changed_data_gets_its_own_cache(tmp_path):
    write_shard(tmp_path / "s0", [20] * 40)
    entry = DataEntry(prefix=str(tmp_path / "s0"), tokens=800, corpus="c")
    cache = tmp_path / "cache"
    first = build_blended_samples([entry], 50, dataset_config(), cache)
    times = {path: path.stat().st_mtime_ns for path in cache.rglob("*")}
    second = build_blended_samples([entry], 50, dataset_config(), cache)
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*")} == times
    assert all(np.array_equal(first[i]["tokens"], second[i]["tokens"]) for i in range(50))
    write_shard(tmp_path / "s0", [25] * 40)
    third = build_blended_samples([entry], 50, dataset_config(), cache)
    assert max(int(third[i]["tokens"].max()) for i in range(50)) >= 800


def _build_with_few_files(folder, hard):
    resource.setrlimit(resource.RLIMIT_NOFILE, (60, hard))
    entries = [DataEntry(prefix=f"{folder}/s{index}", tokens=200, corpus="c") for index in range(80)]
    build_blended_samples(entries, 1000, dataset_config(), folder / "cache")


@pytest.mark.parametrize(("hard", "exitcode"), full_except([(4096, 0), (300, 0), (90, 1)], (90, 1)))
def test_many_shards_raise_the_limit_of_open_files_or_say_that_it_is_too_low(tmp_path, hard, exitcode, capfd):
    for index in range(80):
        write_shard(tmp_path / f"s{index}", [20] * 10)
    process = multiprocessing.get_context("fork").Process(target=_build_with_few_files, args=(tmp_path, hard))
    process.start()
    process.join(60)
    assert process.exitcode == exitcode
    said = capfd.readouterr().err
    # which file is the first beyond the limit depends on those that the test process has open already
    assert exitcode == 0 or "90 are allowed" in said or "Too many open files" in said


def _build(prefix, cache, barrier):
    barrier.wait()
    entry = DataEntry(prefix=prefix, tokens=4000 * SEQ, corpus="c")
    dataset = build_blended_samples([entry], 4000, dataset_config(), Path(cache))
    assert len(dataset[3999]["tokens"]) == SEQ


def test_two_builders_at_once_leave_one_whole_cache(tmp_path):
    write_shard(tmp_path / "s0", [20] * 4000)
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)
    arguments = (str(tmp_path / "s0"), str(tmp_path / "cache"), barrier)
    processes = [context.Process(target=_build, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert not list((tmp_path / "cache").glob(".*.partial"))
    assert all((folder / "complete.json").exists() for folder in (tmp_path / "cache").iterdir())


def test_what_follows_a_documents_end_is_left_out_wherever_the_end_stands_in_a_sample(tmp_path):
    """Documents of 17 tokens against samples of 16 put an end at every place, the first and the last too; one has no other."""
    from megatron_cpt.train.model.attention_bounds import document_numbers

    lengths = [17] * 34 + [1] * 6 + [100]
    write_shard(tmp_path / "s", lengths, first_token=1)
    tokens = np.fromfile(bin_path(tmp_path / "s"), dtype=np.int32)
    ends = np.cumsum(lengths) - 1
    tokens[ends] = 0
    tokens.tofile(bin_path(tmp_path / "s"))
    config = dataclasses.replace(dataset_config(), eod_mask_loss=True)
    count = (sum(lengths) - 1) // SEQ
    entry = DataEntry(prefix=str(tmp_path / "s"), tokens=count * SEQ, corpus="c")
    dataset = build_blended_samples([entry], count, config, tmp_path / "cache")
    places = set()
    for index in range(count):
        sample = dataset[index]
        ids = sample["tokens"]
        assert sample["loss_mask"].tolist() == (ids != 0).float().tolist()
        places |= set(np.flatnonzero(ids.numpy() == 0).tolist())
        numbers = document_numbers(ids[None], 0)[0].tolist()
        spans = dataset.shards[0].spans(int(dataset.sample_index[index]))
        expected = [number for number, (_, _, length) in enumerate(spans) for _ in range(length)]
        assert numbers == expected and sum(length for _, _, length in spans) == SEQ
        assert sample["labels"][:-1].tolist() == ids[1:].tolist()
    assert places == set(range(SEQ))


def test_an_index_that_finds_the_disk_full_says_so_and_leaves_nothing(tmp_path):
    write_shard(tmp_path / "s0", [20] * 500)
    entry = DataEntry(prefix=str(tmp_path / "s0"), tokens=100 * SEQ, corpus="c")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(DataError, match="the index cannot be written"):
            build_blended_samples([entry], 100, dataset_config(), tmp_path / "cache")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list((tmp_path / "cache").iterdir())
    assert len(build_blended_samples([entry], 100, dataset_config(), tmp_path / "cache")) == 100


def _maps() -> int:
    return Path("/proc/self/maps").read_text().count("\n")


@pytest.mark.parametrize("most_maps", [5, 12, 10_000])
def test_shards_beyond_the_systems_limit_are_opened_when_they_are_read(tmp_path, shards, monkeypatch, most_maps):
    entries = planned(*shards, 200)
    expected = [
        sample["tokens"].tolist() for sample in build_blended_samples(entries, 200, dataset_config(), tmp_path / "c")
    ]
    pool = open_shards.OpenShards(most_maps)
    monkeypatch.setattr(stage_samples, "_OPEN", pool)
    before = _maps()
    dataset = build_blended_samples(entries, 200, dataset_config(), tmp_path / "c")
    assert [dataset[index]["tokens"].tolist() for index in range(200)] == expected
    assert most_maps == 10_000 or _maps() - before <= most_maps + 12  # a large shard alone may take more
    assert [shard.spans(0) for shard in dataset.shards if shard is not None]
    del dataset
    assert pool._num_maps == 0 and not pool._open


def test_several_threads_read_from_few_open_shards(tmp_path, shards, monkeypatch):
    entries = planned(*shards, 200)
    monkeypatch.setattr(stage_samples, "_OPEN", open_shards.OpenShards(12))
    dataset = build_blended_samples(entries, 200, dataset_config(), tmp_path / "cache")
    expected = [dataset[index]["tokens"].tolist() for index in range(200)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda index: dataset[index]["tokens"].tolist(), [*range(200)] * 3))
    assert found == expected * 3


@pytest.mark.parametrize(("epochs", "separate"), [(1, False), (1, True), (3, False), (3, True)])
def test_the_order_of_documents_is_megatron_cores(epochs, separate):
    from megatron.core.datasets.gpt_dataset import _build_document_index

    from megatron_cpt.train.samples.stage_samples import document_index

    for documents in (np.arange(1000, dtype=np.int32), np.array([3, 1, 9], dtype=np.int64)):
        ours, theirs = np.random.RandomState(7), np.random.RandomState(7)
        found = document_index(documents, epochs, ours, separate)
        expected = _build_document_index(documents, epochs, theirs, separate)
        assert found.dtype == expected.dtype and np.array_equal(found, expected)
        assert ours.randint(1 << 30) == theirs.randint(1 << 30)
