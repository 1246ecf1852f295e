"""Fill in the middle: documents of a sample rearranged so that a model learns to complete what lies between two parts.

A document's tokens within a sample (without its end-of-document token) are cut at two random places and become

    PSM:  <prefix> prefix <suffix> suffix <middle> middle
    SPM:  <prefix> <suffix> suffix <middle> prefix middle

A sample keeps its length: the sentinels and the cuts displace tokens at the document's end. Cuts fall between
characters, and each part is tokenized separately, like a prompt: users request completions in the middle of a word. If
the parts' tokens do not decode to the document's text (a sample that begins within a character, a SentencePiece model,
which puts a space before every part), cuts fall between tokens.

Source: arXiv:2207.14255, section 3 (context-level, SPM as its variant 2, joint training) and its ablation of spans chosen by
lines, tokens or characters; characters and truncation of the suffix as in bigcode-project/Megatron-LM,
`megatron/data/gpt_dataset.py`, `permute`.
"""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_cpt.config.settings.schema import RunConfig
from megatron_cpt.data.tokenizer.interface import Tokenizer, token_id
from megatron_cpt.errors import DataError

_REPLACEMENT = "\ufffd"
"""Replacement character that decoding writes for a part of a character."""
SHORTEST = 6
"""Tokens below which a document is left alone: the sentinels would be half of it."""


@dataclass(frozen=True, kw_only=True)
class FillInMiddle:
    """How documents are rearranged."""

    rate: float
    """Share of the documents."""
    spm_rate: float
    """Share of these in the order suffix, prefix, middle."""
    prefix: int
    """Id of the token before a prefix."""
    middle: int
    """Id of the token before a middle."""
    suffix: int
    """Id of the token before a suffix."""
    eod: int
    """Id of the token that ends a document; it keeps its place."""
    bos: tuple[int, ...] = ()
    """Ids that begin a document, where it has them (`tokenize --bos`); they keep their place."""
    seed: int
    """The run's seed."""
    corpora: tuple[str, ...]
    """Corpora whose documents are rearranged; empty: all."""
    tokenizer: Tokenizer
    """Tokenizer of the tokens."""

    def applies_to(self, corpus: str | None) -> bool:
        """Return whether a corpus's documents are rearranged."""
        return not self.corpora or corpus in self.corpora

    def rearrange(self, ids: np.ndarray, prefix: str, sample: int) -> np.ndarray:
        """Return the ids of a sample, int64 [s + 1], its documents rearranged.

        Random draws depend on the seed, the shard's name and the sample's number within the shard over all epochs.
        """
        digest = hashlib.blake2b(f"fim {self.seed} {Path(prefix).name} {sample}".encode(), digest_size=4).digest()
        # RandomState's stream never changes between numpy versions; Generator's may.
        random = np.random.RandomState(int.from_bytes(digest, "little"))
        parts = []
        for fragment in np.split(ids, np.flatnonzero(ids == self.eod) + 1):
            ends = len(fragment) > 0 and fragment[-1] == self.eod
            document, end = (fragment[:-1], fragment[-1:]) if ends else (fragment, fragment[:0])
            begins = bool(self.bos) and tuple(document[: len(self.bos)]) == self.bos
            start, document = np.split(document, [len(self.bos) if begins else 0])
            parts += [start, self._rearranged(document, random), end]
        return np.concatenate(parts)

    def _rearranged(self, document: np.ndarray, random: np.random.RandomState) -> np.ndarray:
        is_chosen, is_spm = random.random_sample() < self.rate, random.random_sample() < self.spm_rate
        if not is_chosen or len(document) < SHORTEST:
            return document
        prefix, middle, suffix = self._cut_text(document, random) or self._cut_tokens(document, random)
        if is_spm:
            order: tuple[Any, ...] = ([self.prefix, self.suffix], suffix, [self.middle], prefix, middle)
        else:
            order = ([self.prefix], prefix, [self.suffix], suffix, [self.middle], middle)
        return np.concatenate([np.asarray(part, dtype=document.dtype) for part in order])

    def _cut_text(self, document: np.ndarray, random: np.random.RandomState) -> list[list[int]] | None:
        """Return the tokens of prefix, middle and suffix, three less than the document's; None where that loses text."""
        text = self.tokenizer.decode(document)
        first, last = np.sort(random.randint(0, len(text) + 1, 2))
        parts = self.tokenizer.encode_batch([text[:first], text[first:last], text[last:]])
        excess = sum(map(len, parts)) - (len(document) - 3)
        if excess < 0 or _REPLACEMENT in text or self.tokenizer.decode([id for part in parts for id in part]) != text:
            return None
        for number in (2, 1, 0):
            kept = max(len(parts[number]) - excess, 0)
            excess -= len(parts[number]) - kept
            parts[number] = parts[number][:kept]
        return parts

    def _cut_tokens(self, document: np.ndarray, random: np.random.RandomState) -> list[np.ndarray]:
        kept = document[:-3]
        return np.split(kept, np.sort(random.randint(0, len(kept) + 1, 2)))


def fill_in_middle(config: RunConfig, tokenizer: Tokenizer) -> FillInMiddle | None:
    """Return how a stage rearranges documents, None where it does not.

    Raises: DataError when the tokenizer lacks a sentinel.
    """
    data = config.data
    if not data.fim_rate:
        return None
    ids = {}
    names = {"prefix": data.fim_prefix_token, "middle": data.fim_middle_token, "suffix": data.fim_suffix_token}
    for part, name in names.items():
        found = None if name is None else token_id(tokenizer, name)
        if found is None:
            raise DataError(
                f"data.fim_{part}_token: {data.tokenizer} has no token {name!r}. Fill in the middle needs three tokens "
                "of its own. Name the tokenizer's, add them to it, or set data.fim_rate to 0."
            )
        ids[part] = found
    # ranks share the cores; and a pool of threads would warn whenever a checkpoint's writer is forked
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    return FillInMiddle(
        tokenizer=tokenizer,
        rate=data.fim_rate,
        spm_rate=data.fim_spm_rate,
        eod=tokenizer.eod_id,
        bos=tuple(tokenizer.prefix_ids()),
        seed=config.training.seed,
        corpora=data.fim_corpora,
        **ids,
    )
