"""Training and validation samples from megatron-core's GPT datasets, as micro-batches for one rank.

The samples of iteration i are `[i x global_batch_size, (i + 1) x global_batch_size)` of the stage's order for every
layout, so a run continues exactly under another data-parallel size or micro-batch. Every rank reads its own samples
from the memory-mapped files: ranks of one node share them in the page cache, and nothing is broadcast.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig
from torch import Tensor

from megatron_cpt.config.checks.vocabulary import vocabulary_problem
from megatron_cpt.config.loading.paths import data_path
from megatron_cpt.config.megatron.arguments import megatron_arguments
from megatron_cpt.config.settings.schema import ModelConfig, RunConfig
from megatron_cpt.data.blend.fim import fill_in_middle
from megatron_cpt.data.blend.stage_order import StageOrder
from megatron_cpt.data.tokenizer.interface import load_tokenizer
from megatron_cpt.errors import DataError
from megatron_cpt.train.backend import cpu
from megatron_cpt.train.model.attention import context_parallel_chunks
from megatron_cpt.train.model.attention_bounds import Visibility, apart, document_numbers, reason_for_mask
from megatron_cpt.train.model.layer_spec import uses_transformer_engines_attention
from megatron_cpt.train.samples.stage_samples import BlendedSamples, build_epoch_samples, build_train_samples


@dataclass
class Batch:
    """One micro-batch of this rank; s is the sequence length over the context-parallel size."""

    tokens: Tensor
    """`[b, s]` int64."""
    labels: Tensor
    """`[b, s]` int64, the next token of each position."""
    loss_mask: Tensor
    """`[b, s]` float32, 0 where a prediction does not count."""
    position_ids: Tensor
    """`[b, s]` int64."""
    visibility: Visibility
    """Visibility between tokens."""
    dataset_ids: Tensor
    """`[b]` int64: which entry of the data list each sample came from."""
    sample_ids: Tensor
    """`[b]` int64: the number of each sample in the stage's order."""

    @property
    def attention_mask(self) -> Tensor | None:
        """Input of attention (`attention_bounds.py`): bounds of documents, a mask, or None for plain causal
        attention."""
        return self.visibility.for_attention()


class DatasetTokenizer:
    """Tokenizer attributes that GPTDataset reads: the end-of-document id, the vocabulary, and a name for its cache
    keys."""

    def __init__(self, eod_id: int, vocab_size: int, identity: dict[str, Any] | None):
        self.eod = eod_id
        self.vocab_size: int | None = None  # the type of the ids is read from each index, not guessed from this
        self.unique_identifiers = {"eod": eod_id, "vocab_size": vocab_size, "hash": (identity or {}).get("hash")}


def build_train_dataset(
    config: RunConfig, order: StageOrder, tokenizer: DatasetTokenizer, cache: Path
) -> BlendedSamples:
    """Return the stage's samples in its order; exactly the planned samples of each entry of the data list are drawn.

    Index caches are written by rank 0 into `cache` and read by the others.
    """
    fim = None
    if config.data.fim_rate:
        fim = fill_in_middle(config, load_tokenizer(Path(data_path(config.paths, config.data.tokenizer or ""))))
    return build_train_samples(config, order, stage_dataset_config(config, order, tokenizer), cache, fim)


def build_validation_dataset(
    config: RunConfig, prefixes: Sequence[str], tokenizer: DatasetTokenizer, cache: Path
) -> BlendedSamples:
    """Return one epoch of a corpus's held-out samples, in a fixed order that no training setting moves.

    Raises: DataError when the shards hold no whole sample.
    """
    fixed = dataclasses.replace(config, training=dataclasses.replace(config.training, seed=0))
    settings = dataset_config(fixed, tokenizer, blend=(list(prefixes), None))
    return build_epoch_samples(prefixes, settings, cache)


def stage_dataset_config(config: RunConfig, order: StageOrder, tokenizer: DatasetTokenizer) -> GPTDatasetConfig:
    """Return megatron's configuration of the datasets of a stage's shards."""
    return dataset_config(config, tokenizer, blend=([entry.prefix for entry in order.stage_entries], None))


def dataset_config(config: RunConfig, tokenizer: DatasetTokenizer, **blend: Any) -> GPTDatasetConfig:
    """Return megatron's configuration of a run's datasets."""
    arguments = megatron_arguments(config, "GPTDatasetConfig") | {
        # masks come from attention_bounds.py, once per micro-batch instead of [s, s] per sample
        "reset_attention_mask": False,
        "create_attention_mask": False,
        "split": "1,0,0",
        "tokenizer": tokenizer,
    }
    return GPTDatasetConfig(**arguments, **blend)


def microbatches(
    dataset: Any, first_sample: int, num_samples: int, config: RunConfig, eod_id: int, *, pad: bool = False
) -> list[Batch]:
    """Return this rank's micro-batches of the samples `[first_sample, first_sample + num_samples)`.

    With `pad`, samples past the dataset's end (a validation set that is no multiple of the batch) repeat its first
    with an empty loss mask; the ranks stay in step and nothing is counted twice.
    """
    size = config.training.micro_batch_size
    dp_rank, dp_size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    batches = []
    for start in range(first_sample + dp_rank * size, first_sample + num_samples, size * dp_size):
        indices = range(start, start + size)
        samples = [dataset[index if not pad or index < len(dataset) else 0] for index in indices]
        is_real = [not pad or index < len(dataset) for index in indices]
        batches.append(_batch(samples, indices, is_real, config, eod_id))
    return batches


def _batch(
    samples: list[dict[str, Any]], numbers: Sequence[int], is_real: list[bool], config: RunConfig, eod_id: int
) -> Batch:
    ids = torch.stack([torch.cat([sample["tokens"], sample["labels"][-1:]]) for sample in samples])
    _check_ids(ids, numbers, config.model)
    loss_mask = torch.stack([sample["loss_mask"] for sample in samples])
    loss_mask = loss_mask * torch.tensor(is_real, dtype=torch.float32).unsqueeze(1)
    pieces = None
    if any("pieces" in sample for sample in samples):
        of_documents = document_numbers(ids[:, :-1], eod_id)
        pieces = torch.stack([sample.get("pieces", row) for sample, row in zip(samples, of_documents, strict=True)])
    sources = torch.tensor([int(sample.get("dataset_id", 0)) for sample in samples])
    return build_batch(ids, config, eod_id, loss_mask, sources, pieces=pieces, sample_ids=torch.tensor(list(numbers)))


def _check_ids(ids: Tensor, numbers: Sequence[int], model: ModelConfig) -> None:
    """Refuse ids without a row of the model: they would train another token, or read past the embedding.

    Raises: DataError naming the sample.
    """
    low, high = int(ids.min()), int(ids.max())
    if low >= 0 and high < model.vocab_size:
        return
    wrong = (ids < 0) | (ids >= model.vocab_size)
    sample = numbers[int(wrong.any(1).nonzero()[0])]
    found = low if low < 0 else high
    problem = vocabulary_problem(f"sample {sample:,}", high + 1, model, "Run `megatron-cpt data audit` on the shards.")
    raise DataError(
        problem or f"sample {sample:,}: holds the id {found:,}. Run `megatron-cpt data audit` on the shards."
    )


def build_batch(
    ids: Tensor,
    config: RunConfig,
    eod_id: int,
    loss_mask: Tensor | None = None,
    dataset_ids: Tensor | None = None,
    *,
    pieces: Tensor | None = None,
    sample_ids: Tensor | None = None,
) -> Batch:
    """Return a micro-batch of this rank, on the training device, from token ids `[b, s + 1]`.

    `pieces` `[b, s]` numbers the isolated pieces; None: documents, separated by their end-of-document ids.
    """
    tokens, labels = ids[:, :-1], ids[:, 1:]
    parts = {
        "tokens": tokens,
        "labels": labels,
        "loss_mask": torch.ones(tokens.shape) if loss_mask is None else loss_mask,
        "position_ids": torch.arange(tokens.shape[1]).expand(tokens.shape),
    }
    positions = context_parallel_positions(tokens.shape[1])
    if config.data.reset_attention_mask:
        pieces = apart(document_numbers(tokens, eod_id) if pieces is None else pieces)
    else:
        pieces = None
    visibility = Visibility(tuple(tokens.shape), pieces, config.model.window_size, positions)
    if uses_transformer_engines_attention(config.data):
        visibility = Visibility(tuple(tokens.shape))  # it knows of windows and of context parallelism
    elif reason_for_mask(config) is None:
        visibility = visibility.with_bounds()
    if positions is not None:
        parts = {name: tensor[:, positions] for name, tensor in parts.items()}
    parts = {name: tensor.contiguous() for name, tensor in parts.items()}
    if not cpu.is_cpu():
        parts = {name: tensor.pin_memory().cuda(non_blocking=True) for name, tensor in parts.items()}
        visibility = visibility.cuda()
    zeros = torch.zeros(tokens.shape[0], dtype=torch.int64)
    return Batch(
        **parts,
        visibility=visibility,
        dataset_ids=zeros if dataset_ids is None else dataset_ids,
        sample_ids=zeros if sample_ids is None else sample_ids,
    )


def context_parallel_positions(seq_length: int) -> Tensor | None:
    """Return the positions of the sequence that this rank works on, None when it works on all of them."""
    size = parallel_state.get_context_parallel_world_size()
    if size == 1:
        return None
    chunks = torch.arange(seq_length).chunk(2 * size)
    first, second = context_parallel_chunks(parallel_state.get_context_parallel_rank(), size)
    return torch.cat([chunks[first], chunks[second]])
