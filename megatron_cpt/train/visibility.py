"""Who may see whom in a micro-batch: documents or pieces apart, sliding windows, a context-parallel rank's queries.

The mask `[b, 1, queries, s]` is made when a forward pass asks for it, on the device: a step's micro-batches wait and travel
with `[b, s]` numbers of pieces instead of s x s bytes a sample.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Visibility:
    """What a micro-batch's attention mask follows from."""

    shape: tuple[int, ...]
    """(b, s) of the whole sequence."""
    pieces: Tensor | None = None
    """`[b, s]` int, equal for tokens that may see each other; None: every sample is one piece."""
    window_size: int | None = None
    """Tokens that a query sees, itself included; None: all before it."""
    positions: Tensor | None = None
    """Positions of this context-parallel rank's queries; None: all."""
    device: str = "cpu"
    """Where the mask is made."""

    def cuda(self) -> "Visibility":
        """Return the same with its tensors on the GPU."""
        pieces, positions = (
            None if tensor is None else tensor.pin_memory().cuda(non_blocking=True)
            for tensor in (self.pieces, self.positions)
        )
        return Visibility(self.shape, pieces, self.window_size, positions, device="cuda")

    def mask(self) -> Tensor | None:
        """Return True where a query may see a key, `[b, 1, queries, s]`; None when plain causal is meant.

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
