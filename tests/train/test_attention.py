"""Who sees whom: documents stay apart, windows end, by a mask and by the documents' bounds alike."""

import dataclasses
import math
import random

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from megatron_cpt.train.model import attention
from megatron_cpt.train.model import attention_bounds as visibility
from megatron_cpt.train.model.attention import SdpaCoreAttention, attend_each, attend_varlen
from megatron_cpt.train.model.attention_bounds import Visibility, apart, document_numbers, is_bounds, reason_for_mask
from tests.tiers import full_except
from tests.tolerances import assert_fp32_rounding
from tests.train.tiny import EOD, SEQ, batches, logits, run_steps, tiny_config

CHUNKED, GROUPED, LATENT = (4, 4, 16, 16), (4, 2, 12, 12), (4, 4, 24, 12)
"""Heads of queries, of keys and values, channels of queries and keys, of values."""


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


def test_bounds_are_where_documents_begin_in_all_samples():
    tokens = torch.tensor([[1, EOD, 3, 4], [5, 6, 8, 9], [1, 2, 3, EOD]])
    pieces = apart(document_numbers(tokens, EOD))
    made = Visibility(tokens.shape, pieces).with_bounds().for_attention()
    assert is_bounds(made) and made[0].tolist() == [0, 2, 4, 8, 12]
    assert made.shape[0] == 128, "at least the longest piece"
    assert made.untyped_storage().nbytes() == 5 * 4, "the rows share their memory"


def test_pieces_may_be_numbered_as_they_like():
    pieces = torch.tensor([[7, 7, 3, 3], [3, 0, 0, 7]])
    assert Visibility(pieces.shape, pieces).with_bounds().bounds.tolist() == [0, 2, 4, 5, 7, 8]


def test_a_window_alone_has_samples_as_pieces_and_nothing_needs_no_bounds():
    assert Visibility((2, 4), None, 2).with_bounds().bounds.tolist() == [0, 4, 8]
    assert Visibility((2, 4)).with_bounds().for_attention() is None


def attended(heads, window_size, attend, positions=None):
    """Return the context of random documents by `attend` and by a mask, and the gradients of both."""
    n, g, d, d_v = heads
    generator, chooser = torch.Generator().manual_seed(n + d), random.Random(5)
    tokens = torch.randint(EOD + 1, 400, (3, 160), generator=generator)
    tokens[torch.tensor([[chooser.random() < 0.06 for _ in range(160)] for _ in range(3)])] = EOD
    seen = Visibility(tokens.shape, apart(document_numbers(tokens, EOD)), window_size, positions)
    length = 160 if positions is None else len(positions)
    results = []
    for with_bounds in (True, False):
        generator.manual_seed(1)
        query, key, value = (
            torch.randn(s, 3, count, size, generator=generator).requires_grad_()
            for s, count, size in ((length, n, d), (160, g, d), (160, g, d_v))
        )
        module = object.__new__(SdpaCoreAttention)
        torch.nn.Module.__init__(module)
        module.softmax_scale, module.window_size = 0.3, window_size
        if with_bounds:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(attention, "attend_each", attend)
                context = module._attend_pieces(query, key, value, seen.with_bounds().for_attention())
        else:
            parts = (part.permute(1, 2, 0, 3) for part in (query, key, value))
            context = module._attend(*parts, seen.mask(), 0.0).permute(2, 0, 1, 3).flatten(2)
        context.square().sum().backward()
        results.append([context.detach(), query.grad, key.grad, value.grad])
    return results


def assert_attended_alike(found, expected):
    """Compare context and gradients; gradients of scores are differences of terms that are as large as the values' gradient."""
    terms = float(expected[-1].abs().max())
    assert_fp32_rounding(found, expected, of_largest=True, terms=terms)


RANKS_POSITIONS = {
    "all": None,
    "first of two": [*range(40), *range(120, 160)],
    "second of two": [*range(40, 120)],
    "second of four": [*range(20, 40), *range(120, 140)],
}


@pytest.mark.parametrize("positions", RANKS_POSITIONS.values(), ids=RANKS_POSITIONS)
@pytest.mark.parametrize("window_size", [None, 1, 7])
@pytest.mark.parametrize("heads", [CHUNKED, GROUPED, LATENT])
def test_document_by_document_is_what_a_mask_gives(heads, window_size, positions):
    positions = None if positions is None else torch.tensor(positions)
    assert_attended_alike(*attended(heads, window_size, attend_each, positions))


@pytest.mark.parametrize("positions", RANKS_POSITIONS.values(), ids=RANKS_POSITIONS)
@pytest.mark.parametrize("window_size", [None, 1, 7])
@pytest.mark.parametrize("heads", [CHUNKED, GROUPED, LATENT])
def test_varlen_attention_is_asked_for_what_a_mask_gives(monkeypatch, heads, window_size, positions):
    """varlen_attn runs on GPUs only: what stands for it holds the call to its rules and computes what it documents."""

    def stand_in(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa):
        assert k.shape == v.shape and q.shape[2] == k.shape[2]
        assert q.shape[2] % 8 == 0 and q.shape[2] <= 256 and all(part.stride(-1) == 1 for part in (q, k, v))
        assert enable_gqa == (q.shape[1] != k.shape[1]) and q.shape[1] % k.shape[1] == 0
        for part, cu in ((q, cu_q), (k, cu_k)):
            assert cu.dtype == torch.int32 and cu.dim() == 1 and cu.is_contiguous()
            assert cu[0] == 0 and cu[-1] == len(part) and max_q == max_k >= int(cu.diff().max())
        assert cu_q.shape == cu_k.shape and (cu_q.diff() > 0).all() and (cu_k.diff() >= cu_q.diff()).all()
        of_query = torch.searchsorted(cu_q[1:].long(), torch.arange(len(q)), right=True)
        of_key = torch.searchsorted(cu_k[1:].long(), torch.arange(len(k)), right=True)
        from_end_of_query = cu_q[of_query + 1] - torch.arange(len(q))  # flash attention aligns the ends
        from_end_of_key = cu_k[of_key + 1] - torch.arange(len(k))
        distance = from_end_of_key - from_end_of_query[:, None]
        left, right = window_size
        assert right == 0
        mask = (distance >= 0) & (of_query[:, None] == of_key)
        if left >= 0:
            mask &= distance <= left
        parts = (part.transpose(0, 1).unsqueeze(0) for part in (q, k, v))
        context = scaled_dot_product_attention(*parts, attn_mask=mask, scale=scale, enable_gqa=enable_gqa)
        return context.squeeze(0).transpose(0, 1)

    monkeypatch.setattr(attention, "varlen_attn", stand_in)
    positions = None if positions is None else torch.tensor(positions)
    assert_attended_alike(*attended(heads, window_size, attend_varlen, positions))


def test_a_rank_of_a_context_parallel_group_attends_causally_by_bounds():
    made = Visibility((2, 8), positions=torch.tensor([2, 3, 4, 5])).with_bounds()
    count = made.num_bounds
    queries, keys, numbers = made.bounds.split([count, count, len(made.bounds) - 2 * count])
    assert queries.tolist() == [0, 4, 8] and keys.tolist() == [0, 6, 12]
    assert numbers.tolist() == [*range(6), *range(8, 14)]
    assert made.for_attention().shape == (128, 3, 18)


def test_the_call_of_varlen_attention_fits_the_installed_torch():
    import inspect

    from torch.nn.attention.varlen import varlen_attn

    parameters = inspect.signature(varlen_attn).parameters
    positional = [name for name, it in parameters.items() if it.kind is it.POSITIONAL_OR_KEYWORD]
    assert positional == ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]
    assert {"scale", "window_size", "enable_gqa"} <= set(parameters)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"parallel": {"context_parallel_size": 2}}, None),
        ({"model": {"attention_dropout": 0.1}}, "drops"),
        ({"training": {"seq_length": SEQ}}, "short"),
    ],
)
def test_what_needs_a_mask_on_cpu(changes, reason):
    given = reason_for_mask(changed(changes))
    assert given is None if reason is None else reason in given


@pytest.mark.parametrize(
    ("changes", "capability", "reason"),
    [
        ({}, (9, 0), None),
        ({"training": {"seq_length": SEQ, "precision": "bf16"}}, (9, 0), None),
        ({"training": {"precision": "fp32"}}, (9, 0), "no fp32"),
        ({"model": {"kv_channels": 264}}, (9, 0), "264 channels"),
        ({"model": {"multi_latent_attention": True, "qk_head_dim": 128, "qk_pos_emb_head_dim": 64}}, (9, 0), None),
        ({"model": {"multi_latent_attention": True, "qk_head_dim": 256, "qk_pos_emb_head_dim": 64}}, (9, 0), "320"),
        ({}, (7, 5), "capability"),
    ],
)
def test_what_needs_a_mask_on_a_gpu(monkeypatch, changes, capability, reason):
    monkeypatch.setattr(visibility.cpu, "is_cpu", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    given = reason_for_mask(changed(changes))
    assert given is None if reason is None else reason in given


def changed(changes):
    """Return a run of 4096 tokens in bf16 with changed sections."""
    config = tiny_config()
    changes = {**changes, "training": {"seq_length": 4096, "precision": "bf16"} | changes.get("training", {})}
    sections = {name: dataclasses.replace(getattr(config, name), **values) for name, values in changes.items()}
    return dataclasses.replace(config, **sections)


def with_bounds(function, *arguments):
    """Call a function of ranks with attention by bounds where the sequences are short too."""
    visibility.SHORT_SEQUENCE = 0
    return function(*arguments)


def gradients(config, is_by_bounds):
    """Return the loss of a step and every gradient after it, and the kinds of what attention got for a mask."""
    from megatron_cpt.train.backend.parallel import finish_parallel, initialize_parallel
    from megatron_cpt.train.model.build import build_training_model
    from megatron_cpt.train.stage.step import train_step

    visibility.SHORT_SEQUENCE = 0 if is_by_bounds else math.inf
    initialize_parallel(config)
    model, optimizer = build_training_model(config)
    given = batches(config, 0)
    kinds = {str(batch.attention_mask.dtype) for batch in given}
    loss = train_step(model, optimizer, given, config, 1e-3).loss
    result = {name: parameter.main_grad.numpy().copy() for name, parameter in model[0].named_parameters()}
    finish_parallel()
    return loss, result, kinds


@pytest.mark.parametrize(
    ("kind", "model", "parallel"),
    full_except(
        [
            ("dense", {}, {}),
            ("qwen", {"window_size": 16}, {}),
            ("mla", {}, {}),
            ("dense", {}, {"recompute_granularity": "full"}),
            ("mla", {}, {"recompute_granularity": "selective"}),
            ("dense", {}, {"tensor_model_parallel_size": 2}),
        ],
        ("qwen", {"window_size": 16}, {}),
        ("dense", {}, {"tensor_model_parallel_size": 2}),
    ),
)
def test_bounds_give_the_loss_and_the_gradients_of_a_mask(ranks, kind, model, parallel):
    world_size = parallel.get("tensor_model_parallel_size", 1)
    config = tiny_config(kind, model=model, **parallel)
    by_bounds, by_mask = (ranks.run(gradients, world_size, config, choice) for choice in (True, False))
    for (loss, found, kinds), (expected_loss, expected, mask_kinds) in zip(by_bounds, by_mask, strict=True):
        assert (kinds, mask_kinds) == ({"torch.int32"}, {"torch.bool"})
        assert_fp32_rounding(loss, expected_loss)
        assert_fp32_rounding(found, expected, of_largest=True)


def test_bounds_train_through_a_pipeline_as_a_mask_on_one_rank(ranks, tmp_path):
    config = tiny_config()
    (expected,) = ranks.run(run_steps, 1, config, 0, 3, None, str(tmp_path))
    checkpoint = str(tmp_path / "iter_0000003")
    (expected,) = ranks.run(run_steps, 1, config, 3, 5, checkpoint, None)
    results = ranks.run(with_bounds, 2, run_steps, tiny_config(pipeline_model_parallel_size=2), 3, 5, checkpoint, None)
    for result in results:
        assert_fp32_rounding(result, expected)


@pytest.mark.parametrize("model", full_except([{}, {"window_size": 16}], {"window_size": 16}))
@pytest.mark.parametrize("kind", full_except(["dense", "mla"], "mla"))
def test_bounds_train_under_context_parallelism_as_a_mask_on_one_rank(ranks, tmp_path, kind, model):
    config = tiny_config(kind, model=model)
    ranks.run(run_steps, 1, config, 0, 1, None, str(tmp_path))
    checkpoint = str(tmp_path / "iter_0000001")
    (expected,) = ranks.run(run_steps, 1, config, 1, 3, checkpoint, None)
    parallel = tiny_config(kind, model=model, context_parallel_size=2)
    for result in ranks.run(with_bounds, 2, run_steps, parallel, 1, 3, checkpoint, None):
        assert_fp32_rounding(result, expected)


def changed_documents(seed):
    """Two packed sequences that differ only in their first document (the first 21 tokens)."""
    rng = np.random.default_rng(seed)
    one = rng.integers(EOD + 1, 400, SEQ)
    one[20] = EOD
    other = one.copy()
    other[:20] = rng.integers(EOD + 1, 400, 20)
    return [one.tolist(), other.tolist()]


@pytest.mark.parametrize("way", [(), (with_bounds,)], ids=["mask", "bounds"])
def test_changing_a_document_moves_no_logit_of_another(ranks, way):
    for kind, model in (("dense", {}), ("mla", {}), ("dense", {"window_size": 16})):
        function, *first = (*way, logits)
        (result,) = ranks.run(function, 1, *first, tiny_config(kind, model=model), None, changed_documents(0))
        assert np.array_equal(result[0][21:], result[1][21:])
        assert np.abs(result[0][:21] - result[1][:21]).max() > 1e-2


def test_without_isolation_documents_do_leak(ranks):
    """The leak test above can fail: it sees a leak when there is one."""
    config = tiny_config()
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, reset_attention_mask=False))
    (result,) = ranks.run(logits, 1, config, None, changed_documents(0))
    assert np.abs(result[0][21:] - result[1][21:]).max() > 1e-4


@pytest.mark.parametrize("way", [(), (with_bounds,)], ids=["mask", "bounds"])
def test_a_packed_document_has_the_logits_it_has_alone(ranks, way):
    packed = changed_documents(1)[0]
    alone = packed[21:] + [EOD + 1] * 21
    function, *first = (*way, logits)
    (result,) = ranks.run(function, 1, *first, tiny_config(), None, [packed, alone])
    assert_fp32_rounding(result[0][21:], result[1][: SEQ - 21], of_largest=True)


@pytest.mark.parametrize("kind", ["dense", "moe", "mla"])
def test_transformer_engines_layers_attend_with_masks_where_documents_are_isolated(kind, monkeypatch):
    from megatron.core.models.gpt import gpt_layer_specs

    from megatron_cpt.train.model.attention import SdpaCoreAttention
    from megatron_cpt.train.model.build import transformer_config
    from megatron_cpt.train.model.layer_spec import build_layer_spec

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
