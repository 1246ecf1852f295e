"""The samples of one shard through megatron-core's GPTDataset, epoch after epoch, with or without a mask.

A sample is `tokens` and `labels` (int64 [s]) and `loss_mask` (float32 [s]); of a masked shard also `pieces` (int64 [s],
the number of the piece of each token, see `data/shards/masked.py`), read through the very indices that its tokens were read
through.
"""

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.gpt_dataset import GPTDataset
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_cpt.data.shards.masked import LEARNED, PIECE, PROMPT


class ShardSamples:
    """Samples `first_sample, first_sample + 1, ...` of one shard, epoch after epoch; `mask` is its mask's pair."""

    def __init__(
        self,
        epochs: Sequence[GPTDataset],
        samples_per_epoch: int,
        first_sample: int,
        mask: IndexedDataset | None = None,
    ):
        self.epochs = epochs
        self.masks = [] if mask is None else [_over(dataset, mask) for dataset in epochs]
        self.samples_per_epoch = samples_per_epoch
        self.first_epoch = first_sample // samples_per_epoch
        self.first_sample = first_sample
        self.prompt_loss_weight = 0.0
        """Weight of a prompt's labels, if the mask marks them."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        epoch, sample = self._place(index)
        drawn = self.epochs[epoch][sample]
        if not self.masks:
            return drawn
        bits, _, _ = self.masks[epoch]._query_document_sample_shuffle_indices(sample)
        length = len(drawn["tokens"])
        bits = np.append(bits, 0)[: length + 1]  # a pack has no token after its last
        return drawn | {
            "loss_mask": torch.from_numpy(loss_of_bits(bits[1:], self.prompt_loss_weight)),
            "pieces": torch.from_numpy(np.cumsum(bits[:length] & PIECE != 0)),
        }

    def spans(self, index: int) -> list[tuple[int, int, int]]:
        """Return (document, its first token here, tokens) of each document with tokens in a sample, in order."""
        epoch, sample = self._place(index)
        dataset = self.epochs[epoch]
        row = int(dataset.shuffle_index[sample])
        (first, start), (last, end) = (tuple(map(int, dataset.sample_index[row + after])) for after in (0, 1))
        spans = []
        for position in range(first, last + 1):
            document = int(dataset.document_index[position])
            begin = start if position == first else 0
            stop = end if position == last else int(dataset.dataset.sequence_lengths[document])
            if stop > begin:
                spans.append((document, begin, stop - begin))
        return spans

    def _place(self, index: int) -> tuple[int, int]:
        """Return the one of `epochs` that contains a sample, and its number there."""
        epoch, sample = divmod(self.first_sample + index, self.samples_per_epoch)
        return epoch - self.first_epoch, sample


def loss_of_bits(labels: np.ndarray, prompt_weight: float = 0.0) -> np.ndarray:
    """Return the weight of each label, float32 of the same shape, from their mask bytes: 1 where it is learned.

    The first token of a piece never counts: it would be predicted from another piece.
    """
    weights = ((labels & (LEARNED | PIECE)) == LEARNED).astype(np.float32)
    if prompt_weight:
        weights[(labels & (LEARNED | PIECE | PROMPT)) == PROMPT] = prompt_weight
    return weights


def _over(dataset: GPTDataset, pair: IndexedDataset) -> GPTDataset:
    """Return the dataset that reads another pair through the same indices."""
    other = copy.copy(dataset)
    other.dataset = pair
    return other
