"""Bits per byte of a language model on sets of documents, comparable across tokenizers, with confidence intervals.

    bits per byte = (sum of -log2 p(token | context) over all tokens of a set) / (UTF-8 bytes of its documents)

Each document is scored separately: its tokens are preceded by one start token (the tokenizer's BOS if it has one, else
its end-of-document token, which precedes every document in training), which is context and not scored; the end of the
document is not scored. A document longer than the context is cut into windows of `context` tokens that advance by
`stride`; each token is scored once, with at least `context - stride` tokens before it. The default stride is the
context: windows do not overlap, and the first token of a later window sees the token before it.

The interval is a percentile bootstrap over documents (the unit that is independent), 95 %.
"""

import logging
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from megatron_cpt.evaluate.models.language_model import LanguageModel
from megatron_cpt.evaluate.models.measured import Perplexity, ratio_interval
from megatron_cpt.evaluate.models.texts import TextSet
from megatron_cpt.log import Progress

logger = logging.getLogger(__name__)

MAX_WORKERS = 8
# Logits of one batch. On CPU they stay below glibc's threshold for fresh pages, which cost a third of the time.
LOGITS_BYTES = {"cpu": 25_000_000, "cuda": 1_000_000_000}


@dataclass(frozen=True)
class Window:
    """`inputs` predict the next tokens; the last `num_scored` of these predictions count."""

    document: int
    tokens: list[int]
    num_scored: int


def measure_perplexity(
    model: LanguageModel, text_set: TextSet, *, context: int | None = None, stride: int | None = None
) -> Perplexity:
    """Return bits per byte of `model` on `text_set`; `context` in tokens is the model's own unless given."""
    context = context or model.context
    stride = stride or context
    documents = model.encode(text_set.documents)
    nats = document_nats(model, documents, context=context, stride=stride)
    sizes = np.array([len(text.encode()) for text in text_set.documents])
    tokens = sum(map(len, documents))
    low, high = ratio_interval(nats / math.log(2), sizes)
    return Perplexity(
        model=model.name,
        text=text_set.name,
        bits_per_byte=float(nats.sum() / math.log(2) / sizes.sum()),
        low=low,
        high=high,
        perplexity=math.exp(min(nats.sum() / max(tokens, 1), 700.0)),
        documents=len(documents),
        tokens=tokens,
        bytes=int(sizes.sum()),
        context=context,
        stride=stride,
        start_token=model.start_token,
        document_nats=[round(value, 6) for value in nats.tolist()],
        document_bytes=sizes.tolist(),
    )


def document_nats(model: LanguageModel, documents: Sequence[Sequence[int]], *, context: int, stride: int) -> np.ndarray:
    """Return -ln p of each document's tokens, in nats."""
    windows = [
        window
        for index, tokens in enumerate(documents)
        for window in document_windows(index, [model.start_id, *tokens], context, stride)
    ]
    windows.sort(key=lambda window: len(window.tokens), reverse=True)
    nats = np.zeros(len(documents))
    progress = Progress(f"evaluate {model.name}", sum(len(window.tokens) for window in windows), "tokens")
    batch_tokens = LOGITS_BYTES[model.device.type] // (4 * model.model.config.vocab_size)
    groups = batches(windows, batch_tokens)
    # On CPU a batch per core: threads inside one small matrix product wait for one another, badly so on a busy machine.
    workers = min(len(os.sched_getaffinity(0)), MAX_WORKERS) if model.device.type == "cpu" else 1
    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for batch, values in zip(groups, pool.map(lambda batch: window_nats(model, batch), groups), strict=True):
            for window, value in zip(batch, values, strict=True):
                nats[window.document] += value
            progress.add(sum(len(window.tokens) for window in batch))
    return nats


def document_windows(document: int, tokens: list[int], context: int, stride: int) -> list[Window]:
    """Return windows of at most `context` + 1 tokens (`stride` <= `context`) that score every token but the first once.

    The first window scores up to `context` tokens, each later one up to `stride` that no window before it scored.
    """
    windows = []
    scored = 0
    while scored < len(tokens) - 1:
        end = min(scored + (stride if scored else context), len(tokens) - 1)
        start = max(scored + stride - context, 0)
        windows.append(Window(document, tokens[start : end + 1], end - scored))
        scored = end
    return windows


def batches(windows: list[Window], batch_tokens: int) -> list[list[Window]]:
    """Return windows (longest first) in groups of at most `batch_tokens` tokens after padding, at least one each."""
    groups: list[list[Window]] = []
    for window in windows:
        if groups and (len(groups[-1]) + 1) * len(groups[-1][0].tokens) <= batch_tokens:
            groups[-1].append(window)
        else:
            groups.append([window])
    return groups


@torch.inference_mode()
def window_nats(model: LanguageModel, batch: list[Window]) -> list[float]:
    """Return -ln p of the scored tokens of each window. Padding is on the right, where no earlier position sees it."""
    length = max(len(window.tokens) for window in batch)
    padded = torch.full((len(batch), length), model.start_id, dtype=torch.long)
    is_scored = torch.zeros((len(batch), length - 1), dtype=torch.bool)
    for row, window in enumerate(batch):
        padded[row, : len(window.tokens)] = torch.tensor(window.tokens)
        is_scored[row, len(window.tokens) - 1 - window.num_scored : len(window.tokens) - 1] = True
    padded = padded.to(model.device)
    logits = model.logits(padded[:, :-1]).float()
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), padded[:, 1:].flatten(), reduction="none")
    return (losses.view(is_scored.shape).double() * is_scored.to(model.device)).sum(1).tolist()
