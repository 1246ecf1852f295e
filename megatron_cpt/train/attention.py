"""Core attention on `torch.nn.functional.scaled_dot_product_attention`, for wherever Transformer Engine is missing.

Stands in for megatron's `DotProductAttention`: grouped queries without copies of keys, sliding windows, isolated
documents, context parallelism by gathering keys and values, and value heads of another width (MLA).

The `attention_mask` that reaches it is `[b, 1, s, s]`, True where a query (row) may see a key (column), made by
`visibility.py`; None means plain causal attention. (megatron's own masks are True where hidden.)
"""

import math

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


class SdpaCoreAttention(MegatronModule):
    """Causal attention between local queries `[s/cp, b, n/tp, d]` and keys, values `[s/cp, b, g/tp, d]`."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        k_channels: int | None = None,
        v_channels: int | None = None,
        cp_comm_type: str | None = None,
        pg_collection: object = None,
    ):
        super().__init__(config=config)
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        channels = k_channels or config.kv_channels
        self.softmax_scale = 1 / math.sqrt(channels) if softmax_scale is None else softmax_scale
        self.cp_size = config.context_parallel_size

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: object = None,
    ) -> Tensor:
        """Return the context `[s/cp, b, n/tp * d_v]`."""
        if attention_bias is not None or packed_seq_params is not None:
            raise NotImplementedError("SdpaCoreAttention takes documents as a mask, not as packed sequences or a bias")
        if self.cp_size > 1:
            key, value = gather_sequence(key), gather_sequence(value)
        query, key, value = (part.permute(1, 2, 0, 3) for part in (query, key, value))  # [b, heads, s, d]
        dropout = self.dropout if self.training else 0.0
        if dropout and not self.config.sequence_parallel:
            with tensor_parallel.get_cuda_rng_tracker().fork():
                context = self._attend(query, key, value, attention_mask, dropout)
        else:
            context = self._attend(query, key, value, attention_mask, dropout)
        return context.permute(2, 0, 1, 3).flatten(2)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
        return scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            dropout_p=dropout,
            is_causal=mask is None,
            scale=self.softmax_scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )


def gather_sequence(part: Tensor) -> Tensor:
    """Return keys or values `[s, b, g, d]` of the whole sequence, in order, from this rank's `[s/cp, b, g, d]`.

    A context-parallel rank r holds the chunks r and 2 cp - 1 - r of 2 cp chunks, so that causal work is even. The
    gradient is summed over the ranks that used it.
    """
    group = parallel_state.get_context_parallel_group()
    gathered = tensor_parallel.gather_from_sequence_parallel_region(part.contiguous(), group=group)
    chunks = gathered.chunk(2 * group.size())
    order = [chunk for rank in range(group.size()) for chunk in context_parallel_chunks(rank, group.size())]
    return torch.cat([chunks[order.index(chunk)] for chunk in range(2 * group.size())])


def context_parallel_chunks(rank: int, size: int) -> tuple[int, int]:
    """Return the two of 2 x size sequence chunks that a context-parallel rank works on."""
    return rank, 2 * size - 1 - rank
