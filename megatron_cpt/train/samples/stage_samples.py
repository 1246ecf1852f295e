"""A stage's samples from megatron-core's GPT datasets: exact per shard, without replacement, from a race-free cache.

- Exactly the planned samples of each entry of the data list are drawn in the order of a `StageOrder`.
- A shard is read epoch by epoch, each in an order of its own; no document comes again before the epoch is exhausted.
  `DataEntry.first_sample` continues where earlier stages stopped in the same shard.
- An index is built once per shard, epoch, seed and sequence length, in a folder named after their hash and the shard's
  content; it appears whole under its name, so that two builders at once, or one killed midway, do no harm.
"""

import dataclasses
import errno
import functools
import hashlib
import importlib.metadata
import json
import logging
import os
import resource
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from megatron.core.datasets import gpt_dataset
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.utils import Split

from megatron_cpt.config.settings.schema import RunConfig
from megatron_cpt.data.blend.fim import FillInMiddle
from megatron_cpt.data.blend.stage_order import StageOrder
from megatron_cpt.data.lists.entry import DataEntry
from megatron_cpt.data.shards.form import packing_problem, read_shard_form
from megatron_cpt.data.shards.indexed import bin_path, idx_path, manifest_path, read_index
from megatron_cpt.data.shards.masked import mask_prefix, read_mask
from megatron_cpt.data.shards.skip_list import SkipList, kept_documents, stage_skip_list
from megatron_cpt.errors import CptError, DataError
from megatron_cpt.files import text_hash, whole_dir, write_json
from megatron_cpt.log import Progress
from megatron_cpt.train.samples.open_shards import OpenShards, ShardOnDemand
from megatron_cpt.train.samples.shard_samples import ShardSamples

logger = logging.getLogger(__name__)

_COMPLETE = "complete.json"
_OPEN = OpenShards()
"""One budget for training and validation: the limits are the process's."""
_MOST_FILES = 1 << 20
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES)


class BlendedSamples(torch.utils.data.Dataset):
    """The samples of a stage in training order; `dataset_id` is the index of the entry each came from."""

    def __init__(self, shards: Sequence[ShardOnDemand | None], dataset_index: np.ndarray, sample_index: np.ndarray):
        self.shards = shards
        self.fim: FillInMiddle | None = None
        """How documents of shards without a mask are rearranged."""
        self.fim_prefixes: dict[int, str] = {}
        """The entries whose documents are, and their prefixes."""
        self.dataset_index = dataset_index
        """Entry of each sample, int32 [samples]."""
        self.sample_index = sample_index
        """Which of its entry's samples each is, int64 [samples]."""

    def __len__(self) -> int:
        return len(self.dataset_index)

    def __getitem__(self, index: int) -> dict[str, Any]:
        dataset_id = int(self.dataset_index[index])
        shard = self.shards[dataset_id]
        assert shard is not None, f"entry {dataset_id} gives no sample"
        number = int(self.sample_index[index])
        sample = shard[number]
        if self.fim is not None and dataset_id in self.fim_prefixes and "pieces" not in sample:
            ids = torch.cat([sample["tokens"], sample["labels"][-1:]]).numpy()
            ids = torch.from_numpy(self.fim.rearrange(ids, self.fim_prefixes[dataset_id], shard.first_sample + number))
            sample = sample | {"tokens": ids[:-1], "labels": ids[1:]}
        return {"dataset_id": dataset_id, **sample}


def build_train_samples(
    config: RunConfig,
    order: StageOrder,
    dataset_config: GPTDatasetConfig,
    cache: Path,
    fim: FillInMiddle | None = None,
) -> BlendedSamples:
    """Return the stage's samples in its order, without the documents of `data.skip_list`."""
    samples = build_ordered_samples(order, dataset_config, cache, skip=stage_skip_list(config))
    for shard in samples.shards:
        if shard is not None:
            shard.prompt_loss_weight = config.data.prompt_loss_weight
    if fim is not None:
        samples.fim = fim
        samples.fim_prefixes = {
            number: entry.prefix for number, entry in enumerate(order.stage_entries) if fim.applies_to(entry.corpus)
        }
    return samples


def build_train_indexes(
    config: RunConfig, order: StageOrder, dataset_config: GPTDatasetConfig, cache: Path, workers: int
) -> None:
    """Build the shards' indexes that `build_train_samples` will read, in `workers` processes.

    Raises: the exception of a worker.
    """
    skip, dataset_config = stage_skip_list(config), dataclasses.replace(dataset_config, random_seed=order.seed)
    # fork: a process of its own would spend longer on importing torch and megatron than on a shard
    with ProcessPoolExecutor(workers, mp_context=get_context("fork")) as pool:
        jobs = [
            pool.submit(_build_indexes_of, entry, count, part, dataset_config, cache, skip)
            for entry, count, part in zip(order.entries, order.samples_per_round, order.drawn, strict=True)
            if part
        ]
        progress = Progress("indexes", len(jobs), "shards")
        for job in jobs:
            job.result()
            progress.add(1)


def build_epoch_samples(prefixes: Sequence[str], dataset_config: GPTDatasetConfig, cache: Path) -> BlendedSamples:
    """Return every sample of some shards once, in an order that follows from the seed of `dataset_config`.

    Raises: DataError when there is not one.
    """
    entries = []
    for prefix in prefixes:
        form = read_shard_form(Path(prefix))
        config = dataclasses.replace(dataset_config, add_extra_token_to_sequence=form.packed_seq_length is None)
        count = samples_per_epoch(read_index(Path(prefix)).sequence_lengths, config)
        entries.append(DataEntry(prefix=prefix, tokens=count * config.sequence_length))
    num_tokens = sum(entry.tokens or 0 for entry in entries)
    if not num_tokens:
        raise DataError(
            f"{', '.join(prefixes)}: not one sequence of {dataset_config.sequence_length:,} tokens and the token after "
            "it. Hold out more documents."
        )
    return build_blended_samples(entries, num_tokens // dataset_config.sequence_length, dataset_config, cache)


def build_blended_samples(
    entries: Sequence[DataEntry],
    num_samples: int,
    dataset_config: GPTDatasetConfig,
    cache: Path,
    *,
    skip: SkipList | None = None,
    shuffle_in_corpus: bool = False,
) -> BlendedSamples:
    """Return `num_samples` samples of a data list in an order of their own."""
    order = StageOrder(
        entries=tuple(entries),
        num_samples=num_samples,
        count=num_samples,
        seq_length=dataset_config.sequence_length,
        seed=dataset_config.random_seed,
        shuffle_in_corpus=shuffle_in_corpus,
    )
    return build_ordered_samples(order, dataset_config, cache, skip=skip)


def build_ordered_samples(
    order: StageOrder, dataset_config: GPTDatasetConfig, cache: Path, *, skip: SkipList | None = None
) -> BlendedSamples:
    """Return the samples of an order; index caches are written by rank 0 and read by the others.

    `dataset_config` states sequence length and masks; its blend is not used, and its seed is the order's.
    """
    dataset_config = dataclasses.replace(dataset_config, random_seed=order.seed)
    is_distributed = torch.distributed.is_initialized()
    # The only barrier: rank 0 meets the others at the end of this function, once the caches are complete, and they
    # then only read.
    if is_distributed and torch.distributed.get_rank() > 0:
        torch.distributed.barrier()
    _allow_open_files()
    progress = Progress("indexes", len(order.entries), "shards")
    shards: list[ShardOnDemand | None] = []
    for number, (entry, count, part) in enumerate(
        zip(order.entries, order.samples_per_round, order.drawn, strict=True)
    ):
        try:
            if order.is_listed(number):
                opened = functools.partial(_shard_samples, entry, count, part, dataset_config, cache, skip or {})
                # An entry without samples keeps its place: `dataset_id` is the place in this list.
                shards.append(ShardOnDemand(opened, _OPEN) if part else None)
        except OSError as problem:
            if problem.errno != errno.EMFILE:
                raise
            raise DataError(
                f"open files: {resource.getrlimit(resource.RLIMIT_NOFILE)[1]:,} are allowed, too few to have even some of the blend's "
                "shards open. Raise `ulimit -Hn`."
            ) from None
        progress.add(1)
    indices = _cached_indices(order, cache)
    if is_distributed and torch.distributed.get_rank() == 0:
        torch.distributed.barrier()
    return BlendedSamples(shards, *indices)


def _build_indexes_of(
    entry: DataEntry, num_samples: int, drawn: range, config: GPTDatasetConfig, cache: Path, skip: SkipList
) -> None:
    _shard_samples(entry, num_samples, drawn, config, cache, skip)


def _shard_samples(
    entry: DataEntry, num_samples: int, drawn: range, config: GPTDatasetConfig, cache: Path, skip: SkipList
) -> ShardSamples:
    """Return the samples `drawn` of an entry with `num_samples` in a round of its order."""
    form = read_shard_form(Path(entry.prefix))
    if problem := packing_problem(form.packed_seq_length, config.sequence_length):
        raise DataError(f"{entry.prefix}: {problem}")
    indexed = GPTDataset.build_low_level_dataset(entry.prefix, config)
    mask = None
    if form.is_masked:
        read_mask(read_index(Path(entry.prefix)))  # raises unless the mask fits the tokens
        mask = GPTDataset.build_low_level_dataset(os.fspath(mask_prefix(Path(entry.prefix))), config)
    documents = kept_documents(len(indexed.sequence_lengths), skip.get(entry.prefix, ()))
    # A pack is one sample, and the token after its last belongs to another pack.
    config = dataclasses.replace(config, add_extra_token_to_sequence=form.packed_seq_length is None)
    lengths = indexed.sequence_lengths
    # Without a skip list the array is used as it is: indexing copies 4 bytes per document.
    lengths = lengths[documents] if len(documents) < len(lengths) else lengths
    num_tokens = int(lengths.sum(dtype=np.int64))
    per_epoch = samples_per_epoch(lengths, config)
    # A shard smaller than one sequence is left to megatron-core, which joins its epochs; a round is its epoch.
    in_round = (entry.first_sample or 0) + num_samples
    first_sample, last_sample = ((entry.first_sample or 0) + place for place in (drawn.start, drawn.stop))
    length = per_epoch or in_round
    epochs = range(first_sample // length, -(-last_sample // length))
    key = {
        "shard": _content(Path(entry.prefix)),
        "skip": [list(span) for span in skip.get(entry.prefix, ())],
        "sequence_length": config.sequence_length,
        # None makes megatron-core 0.19 plan exactly one epoch. It shuffles the documents of several epochs
        # together, and a document could come twice before another came once.
        "num_samples": None if per_epoch else in_round,
        "megatron": importlib.metadata.version("megatron-core"),
        "tokenizer": config.tokenizer.unique_identifiers,
    }
    datasets = []
    for epoch in epochs:
        # A buffer's order is its own, so that stages with other seeds go on in it without replacement.
        seed = _epoch_seed(config.random_seed if entry.first_sample is None else 0, entry.prefix, epoch)
        folder = cache / _hash({**key, "seed": seed})
        blend = ([entry.prefix], None)
        epoch_config = dataclasses.replace(
            config, random_seed=seed, path_to_cache=os.fspath(folder), blend=blend, blend_per_split=None, split="1,0,0"
        )

        def build(to: Path, config: GPTDatasetConfig = epoch_config) -> GPTDataset:
            built = dataclasses.replace(config, path_to_cache=os.fspath(to))
            # megatron-core 0.19.2 has no parameters for these: loading without pickle, an index without 16 bytes
            # per document, and a token count that copies no lengths.
            with (
                mock.patch.object(gpt_dataset, "safe_numpy_load", _plain_array),
                mock.patch.object(gpt_dataset, "_build_document_index", document_index),
                mock.patch.object(GPTDataset, "_get_num_tokens_per_epoch", lambda _: num_tokens),
            ):
                return GPTDataset(indexed, entry.prefix, documents, key["num_samples"], Split.train, built)

        # megatron-core writes its cache in place, so the first call builds in a temporary folder. The second call
        # finds the cache under its final name.
        _build_once(folder, build, key)
        datasets.append(build(folder))
    return ShardSamples(datasets, length, first_sample, mask)


def document_index(
    documents: np.ndarray, num_epochs: int, random_state: np.random.RandomState, separate_final_epoch: bool
) -> np.ndarray:
    """Return the documents of all epochs in their order, int32 [epochs * documents]; the last epoch can be shuffled
    separately.

    The same as megatron-core's function of this purpose, without its 16 bytes per document on the way and a third faster.
    """
    parts = [num_epochs - 1, 1] if separate_final_epoch and num_epochs > 1 else [num_epochs]
    shuffled = []
    for epochs in parts:
        part = np.tile(documents.astype(np.int32, copy=False), epochs)
        random_state.shuffle(part)
        shuffled.append(part)
    return shuffled[0] if len(shuffled) == 1 else np.concatenate(shuffled)


def samples_per_epoch(sequence_lengths: np.ndarray, config: GPTDatasetConfig) -> int:
    """Return the whole samples that documents of these lengths give."""
    num_tokens = int(sequence_lengths.sum(dtype=np.int64))
    return max(num_tokens - config.add_extra_token_to_sequence, 0) // config.sequence_length


def _cached_indices(order: StageOrder, cache: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return `order.indices()`, computed once for all ranks and later runs."""
    samples = order.samples_per_round
    key: dict[str, Any] = {"samples": samples, "corpora": order.corpora, "shuffle_seed": order.shuffle_seed}
    if order.is_continued:
        key |= {"position": order.position, "num_samples": order.count}
    folder = cache / _hash(key)

    def build(to: Path) -> None:
        dataset_index, sample_index = order.indices()
        np.save(to / "dataset_index.npy", dataset_index)
        np.save(to / "sample_index.npy", sample_index)

    _build_once(folder, build, {"samples": sum(samples), "entries": len(order.entries)})
    dataset_index, sample_index = (folder / f"{name}_index.npy" for name in ("dataset", "sample"))
    return _plain_array(dataset_index, mmap_mode="r"), _plain_array(sample_index, mmap_mode="r")


def _plain_array(path: str | Path, *, mmap_mode: Any = None, **_: Any) -> np.ndarray:
    """Return a cached array without unpickling: megatron-core's own list of safe names holds one that unpickles anything.

    Raises: DataError when the file holds something else or is damaged.
    """
    try:
        array: np.ndarray = np.load(path, mmap_mode=mmap_mode, allow_pickle=False)
    except (ValueError, EOFError) as problem:
        raise DataError(
            f"{path}: cannot be read ({problem}). It is part of an index cache. Remove its folder; it is built anew."
        ) from None
    return array


def _build_once(folder: Path, build: Any, description: dict[str, Any]) -> None:
    """Fill `folder` unless it is complete. Of two builders the first to finish wins; the other's work is dropped."""
    if (folder / _COMPLETE).exists():
        return
    try:
        with whole_dir(folder) as temporary:
            build(temporary)
            write_json(temporary / _COMPLETE, description)
    except (OSError, CptError) as problem:
        if not (folder / _COMPLETE).exists():
            # numpy's short writes carry no errno
            if isinstance(problem, OSError) and problem.errno in (None, *_NO_ROOM):
                raise DataError(
                    f"{folder}: the index cannot be written ({problem.strerror or problem}). Make room or correct the permissions, then "
                    "give the command again; the indexes that are whole are kept."
                ) from None
            raise
        logger.info("%s: another process built it at the same time", folder)


def _allow_open_files() -> None:
    """Raise this process's limit of open files to the maximum: every memory map of a shard uses one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _MOST_FILES if hard == resource.RLIM_INFINITY else hard
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))


def _content(prefix: Path) -> dict[str, Any]:
    """Return a shard's identity, to detect changes without reading its tokens."""
    manifest = manifest_path(prefix)
    return {
        "prefix": os.fspath(prefix),
        "bin_bytes": bin_path(prefix).stat().st_size,
        "idx_bytes": idx_path(prefix).stat().st_size,
        "manifest": text_hash(manifest.read_text(encoding="utf-8")) if manifest.exists() else None,
    }


def _epoch_seed(seed: int, prefix: str, epoch: int) -> int:
    """Return a seed below 2^32 of its own for each shard and epoch."""
    digest = hashlib.blake2b(f"{seed} {Path(prefix).name} {epoch}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little")


def _hash(key: dict[str, Any]) -> str:
    return text_hash(json.dumps(key, sort_keys=True))
