"""Pure functions between Hugging Face's and Megatron's tensor layouts; each pair inverts the other bit for bit.

Shapes in Megatron's letters: h hidden, d head, g key/value groups, q query heads of one group, f feed-forward width,
v vocabulary. Biases are the same without the last axis.
"""

from collections.abc import Sequence

import torch


def merge_qkv(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, num_query_groups: int) -> torch.Tensor:
    """Return `[g * (q + 2) * d, h]`, per group its queries, its key, its value, from `[g * q * d, h]` and twice `[g * d, h]`."""
    grouped = [part.reshape(num_query_groups, -1, *part.shape[1:]) for part in (query, key, value)]
    return torch.cat(grouped, dim=1).reshape(-1, *query.shape[1:])


def split_qkv(qkv: torch.Tensor, num_query_groups: int, num_attention_heads: int) -> tuple[torch.Tensor, ...]:
    """Return query, key and value of a merged projection."""
    heads_per_group = num_attention_heads // num_query_groups
    grouped = qkv.reshape(num_query_groups, heads_per_group + 2, -1, *qkv.shape[1:])
    parts = grouped.split([heads_per_group, 1, 1], dim=1)
    return tuple(part.reshape(-1, *qkv.shape[1:]).contiguous() for part in parts)


def merge_gate_up(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Return `[2f, h]`, the gate's rows before the up-projection's."""
    return torch.cat((gate, up))


def split_gate_up(gate_up: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return gate and up-projection of a merged projection."""
    return gate_up.chunk(2)


def pad_vocab(weight: torch.Tensor, padded_vocab_size: int) -> torch.Tensor:
    """Return `[v_padded, h]`: zero rows after the vocabulary."""
    padding = padded_vocab_size - weight.shape[0]
    return torch.cat((weight, weight.new_zeros(padding, *weight.shape[1:]))) if padding else weight


def strip_vocab(weight: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Return `[v, h]` without the padding rows."""
    return weight[:vocab_size]


def concatenate_shards(shards: Sequence[torch.Tensor], dim: int, *, is_gate_up: bool = False) -> torch.Tensor:
    """Return the whole tensor of tensor-parallel `shards` along `dim`.

    Each shard of a gate-up projection holds its part of the gate and its part of the up-projection.
    """
    if is_gate_up:
        gates, ups = zip(*(shard.chunk(2, dim=dim) for shard in shards), strict=True)
        return torch.cat((*gates, *ups), dim=dim)
    return torch.cat(tuple(shards), dim=dim)
