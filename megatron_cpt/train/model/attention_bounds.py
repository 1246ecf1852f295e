"""Visibility in a micro-batch: isolated documents or pieces, sliding windows, a context-parallel rank's queries.

Attention receives the bounds of the documents (`cu_seqlens`) if `reason_for_mask` returns no reason, otherwise a mask
`[b, 1, queries, s]`, built on demand in a forward pass, on the device: a step's micro-batches wait and travel with `[b,
s]` numbers of pieces instead of s x s bytes a sample.

Bounds reach attention in the place of the mask, as one int32 tensor `[m, n + 1]`: every row has the bounds of the n pieces in
the b x s tokens of the micro-batch, and m, the number of rows (which share their memory), is at least the longest piece's
tokens. megatron recomputes activations with the tensors it was given and nothing else, and a shape is known without asking
the GPU. Under context parallelism a rank's queries see keys of whole sequences: there it is `[m, n + 1, 2 (n + 1) + k]`, every
row the bounds of the pieces of queries, those of the keys they see, and which k of the gathered keys these are.
"""

from bisect import bisect_right
from dataclasses import dataclass, replace
from typing import TypeGuard

import torch
from torch import Tensor

from megatron_cpt.config.settings.derived import kv_channels
from megatron_cpt.config.settings.schema import RunConfig
from megatron_cpt.train.backend import cpu

SHORT_SEQUENCE = 256
"""Below this many tokens a CPU attends faster under a mask than piece by piece: a call for each piece costs 0.1 ms."""

MAX_HEAD_SIZE = 256
"""The widest heads of torch's flash attention."""


@dataclass(frozen=True)
class Visibility:
    """Inputs of a micro-batch's attention mask."""

    shape: tuple[int, ...]
    """(b, s) of the whole sequence."""
    pieces: Tensor | None = None
    """`[b, s]` int, equal for tokens that can attend to each other; None: every sample is one piece."""
    window_size: int | None = None
    """Tokens that a query sees, itself included; None: all before it."""
    positions: Tensor | None = None
    """Positions of this context-parallel rank's queries; None: all."""
    device: str = "cpu"
    """Device of the mask."""
    bounds: Tensor | None = None
    """`[n + 1]` int32: starts of the n pieces, and the end of the last, counted over b x s tokens; None: a mask. Under
    context parallelism `[2 (n + 1) + k]`: bounds of queries, bounds of keys, numbers of keys."""
    num_bounds: int = 0
    """n + 1, where keys have bounds of their own."""
    longest: int = 0
    """At least the tokens of the longest piece; of use with `bounds`."""

    def cuda(self) -> "Visibility":
        """Return the same with its tensors on the GPU."""
        pieces, positions, bounds = (
            None if tensor is None else tensor.pin_memory().cuda(non_blocking=True)
            for tensor in (self.pieces, self.positions, self.bounds)
        )
        return replace(self, pieces=pieces, positions=positions, bounds=bounds, device="cuda")

    def with_bounds(self) -> "Visibility":
        """Return the same with the bounds of its pieces; without, where plain causal is meant."""
        if self.pieces is None and self.window_size is None and self.positions is None:
            return self
        # Called while a batch is made on the CPU, in the prefetch thread: max() and tolist() would wait for a GPU.
        batch, length = self.shape
        lengths = torch.full((batch,), length) if self.pieces is None else piece_lengths(self.pieces)
        longest = -(-int(lengths.max()) // 128) * 128  # a kernel's block: few different numbers, and never 1
        bounds = cumulative(lengths)
        if self.positions is None:
            return Visibility(self.shape, None, self.window_size, None, self.device, bounds, longest=longest)
        queries, keys, numbers = seen_by(self.positions, bounds, self.shape, self.window_size)
        return Visibility(
            self.shape,
            None,
            self.window_size,
            None,
            self.device,
            torch.cat([queries, keys, numbers]),
            len(queries),
            longest,
        )

    def for_attention(self) -> Tensor | None:
        """Return what attention takes in the place of a mask: bounds, a mask, or None when plain causal is meant."""
        if self.bounds is None:
            return self.mask()
        return self.bounds.expand(self.longest, *([self.num_bounds] if self.num_bounds else []), -1)

    def mask(self) -> Tensor | None:
        """Return True where a query attends to a key, `[b, 1, queries, s]`; None when plain causal is meant.

        Rotary positions are relative, so isolation alone makes a piece's logits those it has alone. A context-parallel
        rank's queries need a mask also where plain causal is meant.
        """
        if self.pieces is None and self.window_size is None and self.positions is None:
            return None
        keys = torch.arange(self.shape[1], device=self.device)
        queries = keys if self.positions is None else self.positions
        distance = queries.unsqueeze(1) - keys.unsqueeze(0)
        allowed = distance >= 0
        if self.window_size is not None:
            allowed = allowed & (distance < self.window_size)
        allowed = allowed.unsqueeze(0)
        if self.pieces is not None:
            allowed = allowed & (self.pieces[:, queries].unsqueeze(2) == self.pieces.unsqueeze(1))
        return allowed.unsqueeze(1).expand(self.shape[0], 1, -1, -1)


def document_numbers(tokens: Tensor, eod_id: int) -> Tensor:
    """Return the number of each token's document within its sample, `[b, s]` int64, for token ids `[b, s]`."""
    ends = (tokens == eod_id).long()
    return ends.cumsum(1) - ends  # the end-of-document token belongs to the document it ends


def apart(pieces: Tensor) -> Tensor | None:
    """Return the numbers of pieces `[b, s]`, None where every sample is a single piece."""
    return pieces if bool((pieces[:, 1:] != pieces[:, :-1]).any()) else None


def piece_lengths(pieces: Tensor) -> Tensor:
    """Return the tokens of each piece `[n]` int64, in the order of samples and positions, for their numbers `[b, s]`."""
    is_first = torch.ones(pieces.shape, dtype=torch.bool)
    is_first[:, 1:] = pieces[:, 1:] != pieces[:, :-1]
    begins = torch.cat([is_first.flatten().nonzero().squeeze(1), torch.tensor([pieces.numel()])])
    return begins.diff()


def cumulative(lengths: Tensor) -> Tensor:
    """Return `[n + 1]` int32 bounds of pieces from their lengths `[n]`."""
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()


def seen_by(
    positions: Tensor, bounds: Tensor, shape: tuple[int, ...], window_size: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the bounds of the pieces of a rank's queries, the bounds of the keys they see, and those keys' numbers.

    `positions` `[s/cp]` are runs of consecutive positions in every sample of `shape` (b, s); `bounds` are those of
    whole samples. The last query of a piece sees its last key. All int32.
    """
    batch, length = shape
    runs = torch.cat(
        [torch.tensor([0]), (positions.diff() != 1).nonzero().squeeze(1) + 1, torch.tensor([len(positions)])]
    )
    cuts = bounds.tolist()
    num_queries, num_keys, numbers = [], [], []
    for sample in range(batch):
        for begin, end in zip(runs[:-1].tolist(), runs[1:].tolist(), strict=True):
            first, last = (sample * length + int(positions[at]) for at in (begin, end - 1))
            for piece in range(bisect_right(cuts, first) - 1, bisect_right(cuts, last)):
                query, stop = max(cuts[piece], first), min(cuts[piece + 1], last + 1)
                # A run of queries can begin within a piece. It sees the piece from its start, or from one window
                # before the first query.
                key = cuts[piece] if window_size is None else max(cuts[piece], query - window_size + 1)
                num_queries.append(stop - query)
                num_keys.append(stop - key)
                # Keys end where queries end: the last query of a piece must see its last key, because the kernel
                # aligns a causal mask there.
                numbers.append(torch.arange(key, stop, dtype=torch.int32))
    return cumulative(torch.tensor(num_queries)), cumulative(torch.tensor(num_keys)), torch.cat(numbers)


def is_bounds(mask: Tensor | None) -> TypeGuard[Tensor]:
    """Return whether what attention got in the place of a mask are bounds."""
    return mask is not None and mask.dtype == torch.int32


def reason_for_mask(config: RunConfig) -> str | None:
    """Return why this run's attention needs a mask where documents or windows end; None: it works with bounds.

    On a GPU with bounds it is `torch.nn.attention.varlen.varlen_attn`, flash attention over all pieces at once; on a CPU
    it goes from piece to piece.
    """
    model = config.model
    if model.attention_dropout:
        return "attention drops at random, which varlen_attn does not"
    if cpu.is_cpu():
        return "sequences are short" if config.training.seq_length < SHORT_SEQUENCE else None
    if config.training.precision != "bf16":
        return f"varlen_attn has no {config.training.precision}"
    heads = (model.qk_head_dim + model.qk_pos_emb_head_dim, model.v_head_dim)
    size = max(heads) if model.multi_latent_attention else kv_channels(model)
    if size > MAX_HEAD_SIZE:
        return f"heads have {size} channels, varlen_attn at most {MAX_HEAD_SIZE}"
    if torch.cuda.get_device_capability() < (8, 0):
        return "varlen_attn needs a GPU of compute capability 8.0"
    return None
