"""Who sees whom: documents stay apart, windows end, and SDPA equals attention written out."""

import numpy as np
import pytest
import torch

from megatron_cpt.train.visibility import Visibility, apart, document_numbers
from tests.train.tiny import EOD, SEQ, logits, tiny_config


def attention_mask(tokens, window_size=None, positions=None):
    return Visibility(tokens.shape, apart(document_numbers(tokens, EOD)), window_size, positions).mask()


def test_no_mask_is_needed_for_one_document():
    assert attention_mask(torch.tensor([[1, 2, 3]])) is None


def test_a_document_end_at_the_last_position_isolates_nothing():
    assert attention_mask(torch.tensor([[1, 2, EOD]])) is None


def test_documents_are_blocks_and_the_end_belongs_to_its_document():
    mask = attention_mask(torch.tensor([[1, EOD, 3, 4]]))
    expected = [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
    assert mask[0, 0].int().tolist() == expected


def test_a_window_of_two_sees_the_token_and_the_one_before():
    mask = attention_mask(torch.tensor([[1, 2, 3]]), window_size=2)
    assert mask[0, 0].int().tolist() == [[1, 0, 0], [1, 1, 0], [0, 1, 1]]


def test_positions_choose_the_queries_of_a_rank():
    tokens = torch.tensor([[1, EOD, 3, 4]])
    whole = attention_mask(tokens)
    part = attention_mask(tokens, positions=torch.tensor([0, 3]))
    assert torch.equal(part, whole[:, :, [0, 3]])


def changed_documents(seed):
    """Two packed sequences that differ only in their first document (the first 21 tokens)."""
    rng = np.random.default_rng(seed)
    one = rng.integers(EOD + 1, 400, SEQ)
    one[20] = EOD
    other = one.copy()
    other[:20] = rng.integers(EOD + 1, 400, 20)
    return [one.tolist(), other.tolist()]


def test_changing_a_document_moves_no_logit_of_another(ranks):
    for kind, model in (("dense", {}), ("mla", {}), ("dense", {"window_size": 16})):
        (result,) = ranks.run(logits, 1, tiny_config(kind, model=model), None, changed_documents(0))
        assert np.array_equal(result[0][21:], result[1][21:])
        assert np.abs(result[0][:21] - result[1][:21]).max() > 1e-2


def test_without_isolation_documents_do_leak(ranks):
    """The leak test above can fail: it sees a leak when there is one."""
    import dataclasses

    config = tiny_config()
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, reset_attention_mask=False))
    (result,) = ranks.run(logits, 1, config, None, changed_documents(0))
    assert np.abs(result[0][21:] - result[1][21:]).max() > 1e-4


def test_a_packed_document_has_the_logits_it_has_alone(ranks):
    packed = changed_documents(1)[0]
    alone = packed[21:] + [EOD + 1] * 21
    (result,) = ranks.run(logits, 1, tiny_config(), None, [packed, alone])
    np.testing.assert_allclose(result[0][21:], result[1][: SEQ - 21], atol=2e-5)


@pytest.mark.parametrize("kind", ["dense", "moe", "mla"])
def test_transformer_engines_layers_attend_with_masks_where_documents_are_isolated(kind, monkeypatch):
    from megatron.core.models.gpt import gpt_layer_specs

    from megatron_cpt.train.attention import SdpaCoreAttention
    from megatron_cpt.train.layer_spec import build_layer_spec
    from megatron_cpt.train.model import transformer_config

    original, asked = gpt_layer_specs.get_gpt_decoder_block_spec, []

    def without_the_package(config, use_transformer_engine, vp_stage=None, pp_rank=0):
        asked.append(use_transformer_engine)
        return original(config, use_transformer_engine=False, vp_stage=vp_stage, normalization="RMSNorm", pp_rank=0)

    monkeypatch.setattr(gpt_layer_specs, "get_gpt_decoder_block_spec", without_the_package)
    config = transformer_config(tiny_config(kind))

    def attention(isolates_documents):
        spec = build_layer_spec(config, None, use_transformer_engine=True, isolates_documents=isolates_documents)
        return {layer.submodules.self_attention.submodules.core_attention for layer in spec.layer_specs}

    assert attention(True) == {SdpaCoreAttention}
    assert SdpaCoreAttention not in attention(False), "and the next caller's spec is left alone"
    assert asked == [True, True]
