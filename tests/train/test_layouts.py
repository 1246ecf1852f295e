"""Every layout trains as one rank does, and a checkpoint saved under one continues under any other."""

import numpy as np
import pytest

from tests.train.tiny import run_steps, tiny_config

# fp32: sums in another order differ in the seventh digit; a wrong gradient differs in the third.
TOLERANCE = {"rtol": 5e-6, "atol": 0}

TP, PP, VPP = "tensor_model_parallel_size", "pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size"
CP, EP, ETP = "context_parallel_size", "expert_model_parallel_size", "expert_tensor_parallel_size"


@pytest.mark.parametrize(
    ("kind", "world_size", "layout"),
    [
        ("dense", 2, {TP: 2}),
        ("dense", 2, {PP: 2}),
        ("dense", 2, {}),
        ("dense", 2, {CP: 2}),
        ("dense", 2, {PP: 2, VPP: 2}),
        ("dense", 4, {TP: 2, PP: 2}),
        ("dense", 4, {TP: 2}),
        ("dense", 3, {PP: 3, "num_layers_in_first_pipeline_stage": 1, "num_layers_in_last_pipeline_stage": 1}),
        ("dense", 2, {PP: 2, VPP: 2, "num_layers_in_first_pipeline_stage": 2, "num_layers_in_last_pipeline_stage": 2}),
        ("dense", 2, {PP: 2, VPP: 1}),
        ("dense", 4, {CP: 2, PP: 2}),
        ("dense", 4, {TP: 2, CP: 2}),
        ("dense", 1, {"recompute_granularity": "full"}),
        ("dense", 1, {"recompute_granularity": "selective"}),
        ("dense", 2, {"overlap_grad_reduce": True, "overlap_param_gather": True}),
        ("qwen", 2, {TP: 2}),
        ("qwen", 2, {CP: 2}),
        ("tied", 2, {PP: 2}),
        ("tied", 2, {TP: 2}),
        ("moe", 2, {TP: 2}),
        ("moe", 2, {PP: 2}),
        ("moe", 2, {EP: 2}),
        ("moe", 2, {CP: 2}),
        ("moe", 2, {}),
        ("moe", 2, {TP: 2, EP: 2, ETP: 1}),
        ("moe", 4, {TP: 2, EP: 2, ETP: 2}),
        ("moe", 4, {PP: 2, EP: 2}),
        ("moe", 4, {EP: 4}),
        ("moe", 4, {PP: 2, "num_layers_in_first_pipeline_stage": 1, EP: 2}),  # no expert in the first stage
        ("moe", 4, {TP: 2, CP: 2, EP: 2, ETP: 1}),
        ("mla", 2, {TP: 2}),
        ("mla", 2, {PP: 2}),
        ("mla", 2, {CP: 2}),
        ("mla", 2, {}),
        ("mla", 4, {TP: 2, PP: 2}),
        ("deepseek", 2, {EP: 2}),
        ("deepseek", 4, {PP: 2, EP: 2}),
        ("deepseek", 4, {TP: 2, EP: 2, ETP: 1}),
    ],
    ids=lambda value: (
        "-".join(f"{''.join(w[0] for w in n.split('_'))}{v}" for n, v in value.items())
        if isinstance(value, dict)
        else str(value)
    ),
)
def test_a_layout_continues_as_one_rank_does(ranks, trained, kind, world_size, layout):
    checkpoint, expected = trained(kind)
    results = ranks.run(run_steps, world_size, tiny_config(kind, **layout), 2, 5, checkpoint, None)
    for result in results:
        np.testing.assert_allclose(result, expected, **TOLERANCE)


@pytest.mark.parametrize(
    ("kind", "world_size", "layout"),
    [("dense", 4, {TP: 2, PP: 2}), ("dense", 2, {PP: 2, VPP: 2}), ("moe", 2, {EP: 2}), ("mla", 2, {TP: 2})],
)
def test_one_rank_continues_what_another_layout_saved(ranks, trained, tmp_path, kind, world_size, layout):
    checkpoint, expected = trained(kind)
    ranks.run(run_steps, world_size, tiny_config(kind, **layout), 2, 3, checkpoint, str(tmp_path))
    (result,) = ranks.run(run_steps, 1, tiny_config(kind), 3, 5, str(tmp_path / "iter_0000003"), None)
    np.testing.assert_allclose(result, expected[1:], **TOLERANCE)


def test_weights_alone_start_a_fresh_optimizer(ranks, trained):
    checkpoint, expected = trained("dense")
    (fresh,) = ranks.run(run_steps, 1, tiny_config("dense"), 2, 5, checkpoint, None, False)
    np.testing.assert_allclose(fresh[0], expected[0], **TOLERANCE)  # the same weights
    assert abs(fresh[2][0] - expected[2][0]) > 1e-4  # other moments


def test_bf16_keeps_fp32_weights_and_follows_fp32(ranks, trained):
    checkpoint, expected = trained("dense")
    (result,) = ranks.run(run_steps, 1, tiny_config("dense", precision="bf16"), 2, 5, checkpoint, None)
    np.testing.assert_allclose([loss for loss, _ in result], [loss for loss, _ in expected], rtol=2e-3)
    assert result != expected
