"""Core attention on `torch.nn.functional.scaled_dot_product_attention`, used if Transformer Engine is missing.

Stands in for megatron's `DotProductAttention`: grouped queries without copies of keys, sliding windows, isolated
documents, context parallelism by gathering keys and values, and value heads of another width (MLA).

The `attention_mask` that reaches it is made by `attention_bounds.py`: None for plain causal attention, the bounds of
documents (varlen attention on a GPU, document by document on a CPU), or `[b, 1, s, s]`, True where a query (row)
attends to a key (column). (megatron's own masks are True where hidden.)

Source: flash attention's limits (bf16 or fp16, one head size for all three, a multiple of 8, at most 256) are those of torch
2.13, `ATen/native/transformers/cuda/flash_attn/flash_api.cpp`, `mha_varlen_fwd`.
"""

import math

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import pad, scaled_dot_product_attention

from megatron_cpt.train.model.attention_bounds import is_bounds


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
        self.window_size: int | None = None if config.window_size is None else config.window_size[0] + 1

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
        dropout = self.dropout if self.training else 0.0
        if is_bounds(attention_mask):
            if dropout:
                raise NotImplementedError("SdpaCoreAttention drops under a mask only")
            return self._attend_pieces(query, key, value, attention_mask)
        query, key, value = (part.permute(1, 2, 0, 3) for part in (query, key, value))  # [b, heads, s, d]
        # As in megatron-core 0.19's DotProductAttention: tensor-parallel ranks hold different heads and must not
        # drop alike.
        if dropout and not self.config.sequence_parallel:
            with tensor_parallel.get_cuda_rng_tracker().fork():
                context = self._attend(query, key, value, attention_mask, dropout)
        else:
            context = self._attend(query, key, value, attention_mask, dropout)
        return context.permute(2, 0, 1, 3).flatten(2)

    def _attend_pieces(self, query: Tensor, key: Tensor, value: Tensor, rows: Tensor) -> Tensor:
        """Return the context `[s/cp, b, n * d_v]` of queries that see their own piece only."""
        length, batch = query.shape[:2]
        # Bounds count tokens sample by sample, so the sample comes first.
        query, key, value = (part.transpose(0, 1).flatten(0, 1) for part in (query, key, value))  # [b s, heads, d]
        # All rows are equal. Their number is at least the longest piece; the kernel needs it as a Python number,
        # and reading it from a tensor would wait for the GPU.
        if rows.dim() == 2:
            of_queries = of_keys = rows[0]
        else:
            count = rows.shape[1]
            of_queries, of_keys, numbers = rows[0, 0].split([count, count, rows.shape[2] - 2 * count])
            # A rank's second chunk sees the keys of its first chunk again, so a key can be selected several times.
            # The backward pass of index_select adds up their gradients.
            key, value = key.index_select(0, numbers), value.index_select(0, numbers)
        attend = attend_varlen if query.is_cuda else attend_each
        context = attend(
            query, key, value, of_queries, of_keys, len(rows), scale=self.softmax_scale, window_size=self.window_size
        )
        return context.reshape(batch, length, -1).transpose(0, 1)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
        if mask is not None and query.is_cuda:  # no fused kernel of torch 2.13 is sure to take both groups and a mask
            key, value = (part.repeat_interleave(query.shape[1] // part.shape[1], dim=1) for part in (key, value))
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


def attend_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    of_queries: Tensor,
    of_keys: Tensor,
    longest: int,
    *,
    scale: float,
    window_size: int | None,
) -> Tensor:
    """Return the context `[t, n, d_v]` of causal attention within pieces by flash attention, for bf16 on a GPU.

    Queries are `[t, n, d]`, keys and values `[k, g, d]`, with bounds as in `attention_bounds.py`; the last query of a piece sees
    its last key. Heads are padded with zeros to the size that the kernel takes, which moves no result.
    """
    width = value.shape[-1]
    size = -(-max(query.shape[-1], width) // 8) * 8
    query, key, value = (
        part if part.shape[-1] == size else pad(part, (0, size - part.shape[-1])) for part in (query, key, value)
    )
    # torch counts the keys to the left of a query, without the query's own.
    window = (-1 if window_size is None else window_size - 1, 0)
    is_grouped = query.shape[1] != key.shape[1]
    context: Tensor = varlen_attn(
        query, key, value, of_queries, of_keys, longest, longest, scale=scale, window_size=window, enable_gqa=is_grouped
    )
    return context[..., :width]


def attend_each(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    of_queries: Tensor,
    of_keys: Tensor,
    longest: int,
    *,
    scale: float,
    window_size: int | None,
) -> Tensor:
    """Return what `attend_varlen` does, one piece after the other, in any precision."""
    num_queries, num_keys = of_queries.diff().tolist(), of_keys.diff().tolist()
    contexts = []
    for parts in zip(query.split(num_queries), key.split(num_keys), value.split(num_keys), strict=True):
        q, k, v = (part.transpose(0, 1).unsqueeze(0) for part in parts)  # [1, heads, s, d]
        before, mask = k.shape[2] - q.shape[2], None  # keys that the first query sees besides its own
        # is_causal aligns query 0 with key 0 (torch 2.13). Here the last query is aligned with the last key, so
        # keys before the first query need a mask.
        if before or (window_size is not None and window_size < k.shape[2]):
            mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(before)
            mask = mask if window_size is None else mask.triu(before + 1 - window_size)
        context = scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        contexts.append(context.squeeze(0).transpose(0, 1))
    return torch.cat(contexts)


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
