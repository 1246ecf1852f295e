"""Muon: it learns, layouts agree, a checkpoint continues exactly; without its package, the name of the extra is said."""

import dataclasses
import sys

import pytest

from megatron_cpt.config.settings.schema import OptimizerConfig
from tests.distributed import RankFailure
from tests.tiers import full_except
from tests.tolerances import assert_bf16_rounding
from tests.train.tiny import run_steps, tiny_config


def muon(kind: str = "dense", **layout):
    config = tiny_config(kind, use_distributed_optimizer=False, **layout)
    return dataclasses.replace(config, optimizer=OptimizerConfig(name="muon", clip_grad=0.3))


def assert_muon_steps(found, expected):
    """Its iteration runs in bf16: 5 times 3 products, of matrices of 64 x 64 and more, which move the loss as their mean."""
    assert_bf16_rounding(found, expected, roundings=15, averaged=64 * 64)


def without_the_package(config):
    import megatron.core.optimizer  # noqa: F401 - looks at installed distributions when it is imported

    sys.modules["emerging_optimizers"] = None  # as where it is not installed
    return run_steps(config, 0, 1, None, None)


def test_the_extra_with_a_missing_package_is_named(ranks):
    with pytest.raises(RankFailure, match=r"Install the extra muon \(pip install -e '.\[muon\]'"):
        ranks.run(without_the_package, 1, muon())


@pytest.mark.parametrize("kind", full_except(["dense", "moe", "mla"], "dense"))
def test_a_checkpoint_continues_under_other_layouts_as_one_rank_does(ranks, tmp_path, kind):
    ranks.run(run_steps, 1, muon(kind), 0, 2, None, str(tmp_path))
    checkpoint = str(tmp_path / "iter_0000002")
    (expected,) = ranks.run(run_steps, 1, muon(kind), 2, 5, checkpoint, None)
    for layout in ({"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}, {}):
        for result in ranks.run(run_steps, 2, muon(kind, **layout), 2, 5, checkpoint, None):
            assert_muon_steps(result, expected)


def test_moments_follow_a_change_of_the_expert_parallel_size(ranks, tmp_path):
    ranks.run(run_steps, 1, muon("moe"), 0, 2, None, str(tmp_path / "one"))
    checkpoint = str(tmp_path / "one" / "iter_0000002")
    (expected,) = ranks.run(run_steps, 1, muon("moe"), 2, 5, checkpoint, None)
    expert = muon("moe", expert_model_parallel_size=2)
    for result in ranks.run(run_steps, 2, expert, 2, 5, checkpoint, None):
        assert_muon_steps(result, expected)
    ranks.run(run_steps, 2, expert, 2, 3, checkpoint, str(tmp_path / "expert"))
    (back,) = ranks.run(run_steps, 1, muon("moe"), 3, 5, str(tmp_path / "expert" / "iter_0000003"), None)
    assert_muon_steps(back, expected[1:])
