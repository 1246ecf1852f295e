"""Every layout trains as one rank does, and a checkpoint saved under one continues under any other."""

import pytest

from tests.tiers import full_except
from tests.tolerances import STEP_TOKENS, assert_bf16_rounding, assert_fp32_rounding
from tests.train.tiny import run_steps, tiny_config

TP, PP, VPP = "tensor_model_parallel_size", "pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size"
CP, EP, ETP = "context_parallel_size", "expert_model_parallel_size", "expert_tensor_parallel_size"


LAYOUTS = [
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
]


@pytest.mark.parametrize(
    ("kind", "world_size", "layout"),
    full_except(
        LAYOUTS,
        ("dense", 4, {TP: 2, PP: 2}),
        ("dense", 2, {PP: 2, VPP: 2}),
        ("moe", 2, {TP: 2, EP: 2, ETP: 1}),
        ("mla", 2, {CP: 2}),
    ),
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
        assert_fp32_rounding(result, expected)


@pytest.mark.parametrize(
    ("kind", "world_size", "layout"),
    full_except(
        [("dense", 4, {TP: 2, PP: 2}), ("dense", 2, {PP: 2, VPP: 2}), ("moe", 2, {EP: 2}), ("mla", 2, {TP: 2})],
        ("moe", 2, {EP: 2}),
    ),
)
def test_one_rank_continues_what_another_layout_saved(ranks, trained, tmp_path, kind, world_size, layout):
    checkpoint, expected = trained(kind)
    ranks.run(run_steps, world_size, tiny_config(kind, **layout), 2, 3, checkpoint, str(tmp_path))
    (result,) = ranks.run(run_steps, 1, tiny_config(kind), 3, 5, str(tmp_path / "iter_0000003"), None)
    assert_fp32_rounding(result, expected[1:])


def test_weights_alone_start_a_fresh_optimizer(ranks, trained):
    checkpoint, expected = trained("dense")
    (fresh,) = ranks.run(run_steps, 1, tiny_config("dense"), 2, 5, checkpoint, None, False)
    assert_fp32_rounding(fresh[0], expected[0])  # the same weights
    assert abs(fresh[2][0] - expected[2][0]) > 1e-4  # other moments


def test_bf16_keeps_fp32_weights_and_follows_fp32(ranks, trained):
    checkpoint, expected = trained("dense")
    (result,) = ranks.run(run_steps, 1, tiny_config("dense", precision="bf16"), 2, 5, checkpoint, None)
    losses, wanted = ([loss for loss, _ in steps] for steps in (result, expected))
    assert_bf16_rounding(losses, wanted, averaged=STEP_TOKENS)
    assert result != expected
