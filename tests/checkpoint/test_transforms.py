"""Layout changes between Hugging Face and Megatron, against their definition."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_cpt.checkpoint.mapping import transforms


@settings(max_examples=30, deadline=None)
@given(groups=st.integers(1, 4), heads=st.integers(1, 4), head=st.integers(1, 5), has_columns=st.booleans())
def test_qkv_holds_each_groups_queries_key_and_value_and_splits_back(groups, heads, head, has_columns):
    columns = (3,) if has_columns else ()
    query = torch.randn(groups * heads * head, *columns)
    key, value = torch.randn(groups * head, *columns), torch.randn(groups * head, *columns)
    merged = transforms.merge_qkv(query, key, value, groups)
    expected = []
    for group in range(groups):
        expected += query[group * heads * head : (group + 1) * heads * head]
        expected += key[group * head : (group + 1) * head]
        expected += value[group * head : (group + 1) * head]
    assert torch.equal(merged, torch.stack(expected))
    for part, original in zip(transforms.split_qkv(merged, groups, groups * heads), (query, key, value), strict=True):
        assert torch.equal(part, original)


def test_gate_comes_before_up():
    gate, up = torch.zeros(2, 3), torch.ones(2, 3)
    merged = transforms.merge_gate_up(gate, up)
    assert merged[:2].sum() == 0 and merged[2:].sum() == 6
    assert all(torch.equal(*pair) for pair in zip(transforms.split_gate_up(merged), (gate, up), strict=True))


def test_vocabulary_padding_is_zero_and_comes_off():
    weight = torch.randn(5, 2)
    padded = transforms.pad_vocab(weight, 8)
    assert padded.shape == (8, 2) and not padded[5:].any()
    assert torch.equal(transforms.strip_vocab(padded, 5), weight)
    assert transforms.pad_vocab(weight, 5) is weight
