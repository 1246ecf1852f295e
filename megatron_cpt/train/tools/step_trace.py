"""Trace of an iteration's data: documents with file and line, from the run directory alone.

The configuration, the data list and the index cache of the run directory give the very samples that training drew, under
every layout. File and line come from the provenance sidecars of the shards (`tokenize --provenance`).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from megatron_cpt.checkpoint.torch_dist.mcore import read_manifest
from megatron_cpt.config.loading.resolve import read_resolved
from megatron_cpt.config.settings.batch_sizes import batch_sizes
from megatron_cpt.config.settings.derived import train_iters, train_samples
from megatron_cpt.config.settings.iteration_ranges import contains
from megatron_cpt.config.settings.schema import RunConfig
from megatron_cpt.data.audit.trace import trace_documents
from megatron_cpt.data.blend.stage_order import StageOrder, read_order
from megatron_cpt.data.lists.data_list import read_data_list
from megatron_cpt.data.shards.form import read_shard_form
from megatron_cpt.data.shards.indexed import read_shard_manifest
from megatron_cpt.data.tokenize.shard_writer import provenance_path
from megatron_cpt.errors import DataError
from megatron_cpt.run.data_history import reading_of
from megatron_cpt.run.directory import RunDir
from megatron_cpt.run.progress import last_checkpoint
from megatron_cpt.train.samples.batches import DatasetTokenizer, stage_dataset_config
from megatron_cpt.train.samples.skipped_iterations import skipped_ranges
from megatron_cpt.train.samples.stage_samples import BlendedSamples, build_train_samples


@dataclass(frozen=True, kw_only=True)
class DocumentPart:
    """The part of a document that a sample holds."""

    document: int
    """Counted from 0 in its shard; a pack, where the shard is packed."""
    first_token: int
    """Of the document, counted from 0."""
    num_tokens: int
    origin: str | None
    """`file:line`, None without a provenance sidecar."""

    def __str__(self) -> str:
        last = self.first_token + self.num_tokens - 1
        return (
            f"document {self.document}, tokens {self.first_token} to {last}: {self.origin or 'no provenance sidecar'}"
        )


@dataclass(frozen=True, kw_only=True)
class SampleTrace:
    """Origin of one sample of an iteration."""

    iteration: int
    sample: int
    """Its number in the stage's order, counted from 0."""
    corpus: str | None
    prefix: str
    parts: list[DocumentPart]

    def __str__(self) -> str:
        head = f"iteration {self.iteration}, sample {self.sample}: {self.corpus or 'no corpus'}, {self.prefix}"
        return "\n".join([head, *(f"  {part}" for part in self.parts)])


class _Reading:
    """The samples that a configuration, a data list and an order give."""

    def __init__(self, folder: RunDir, cache: Path):
        self.config = read_resolved(folder.config_path)
        self.entries = read_data_list(folder.data_list_path)
        self.dataset = _samples(self.config, self._order(folder), cache)
        self.sizes = batch_sizes(self.config.training)

    def _order(self, folder: RunDir) -> StageOrder:
        training = self.config.training
        if folder.data_order_path.exists():
            return read_order(folder.data_order_path, training)
        return StageOrder(
            entries=tuple(self.entries),
            num_samples=train_samples(training),
            count=train_samples(training),
            seq_length=training.seq_length,
            seed=training.seed,
            shuffle_in_corpus=self.config.data.shuffle_in_corpus,
        )


class RunTrace:
    """A run's samples, as training drew them, also where its data were changed on the way."""

    def __init__(self, path: Path):
        """Open a run directory.

        Raises: DataError when it is none; ConfigError when its configuration cannot be read.
        """
        self.run = RunDir(path)
        for needed in (self.run.config_path, self.run.data_list_path):
            if not needed.is_file():
                raise DataError(f"{needed}: no such file. A run that has begun has one. Name its directory with --run.")
        self.config = read_resolved(self.run.config_path)
        self._readings: dict[Path, _Reading] = {}
        newest = last_checkpoint(self.run)
        manifest = read_manifest(self.run.checkpoints / f"iter_{newest:07d}") if newest else None
        self.skipped = skipped_ranges(self.config.data, self.run, manifest)

    def is_skipped(self, iteration: int) -> bool:
        """Return whether the run passes an iteration without a step."""
        return contains(self.skipped, iteration)

    def samples(self, iteration: int) -> Iterator[SampleTrace]:
        """Yield the samples of an iteration, counted from 1 as the log counts.

        Raises: DataError when the run has no such iteration, or a shard has changed.
        """
        last = train_iters(self.config.training)
        if not 1 <= iteration <= last:
            raise DataError(f"--iteration {iteration}: {self.run.path} has the iterations 1 to {last}.")
        reading = self._reading(iteration)
        for sample in range(reading.sizes.samples(iteration - 1), reading.sizes.samples(iteration)):
            number = int(reading.dataset.dataset_index[sample])
            shard = reading.dataset.shards[number]
            assert shard is not None, f"entry {number} gives no sample"
            entry = reading.entries[number]
            yield SampleTrace(
                iteration=iteration,
                sample=sample,
                corpus=entry.corpus,
                prefix=entry.prefix,
                parts=[
                    part
                    for span in shard.spans(int(reading.dataset.sample_index[sample]))
                    for part in _parts(Path(entry.prefix), *span)
                ],
            )

    def _reading(self, iteration: int) -> _Reading:
        folder = reading_of(self.run, iteration)
        if folder.path not in self._readings:
            self._readings[folder.path] = _Reading(folder, self.run.cache)
        return self._readings[folder.path]


def _samples(config: RunConfig, order: StageOrder, cache: Path) -> BlendedSamples:
    identity = read_shard_manifest(Path(order.entries[0].prefix))["tokenizer"]  # the blend has one tokenizer
    tokenizer = DatasetTokenizer(identity["eod_id"], identity["vocab_size"], identity)
    return build_train_samples(config, order, stage_dataset_config(config, order, tokenizer), cache)


def _parts(prefix: Path, document: int, first: int, count: int) -> list[DocumentPart]:
    if not provenance_path(prefix).is_file():
        return [DocumentPart(document=document, first_token=first, num_tokens=count, origin=None)]
    if not _is_packed(prefix):
        source, line = _provenance(prefix)[0][document].tolist()
        origin = f"{_provenance(prefix)[1][source]['path']}:{line}"
        return [DocumentPart(document=document, first_token=first, num_tokens=count, origin=origin)]
    return [
        DocumentPart(
            document=document,
            first_token=piece.position or 0,
            num_tokens=piece.num_tokens,
            origin=f"{piece.path}:{piece.line}",
        )
        for piece in trace_documents(prefix, document)
    ]


@cache
def _is_packed(prefix: Path) -> bool:
    return read_shard_form(prefix).packed_seq_length is not None


@cache
def _provenance(prefix: Path) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Return (source and line of each document, int [documents, 2]; the sources)."""
    return np.load(provenance_path(prefix), mmap_mode="r"), read_shard_manifest(prefix)["sources"]
