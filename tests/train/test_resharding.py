"""Any layout saves what any other loads: parameters and moments bit by bit, and the next step as one rank's.

`RESHARDING_EXAMPLES` sets how many pairs of layouts are drawn (4; a release tries 100).
"""

import dataclasses
import itertools
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.tiers import full_except
from tests.tolerances import STEP_TOKENS, assert_bf16_rounding, assert_fp32_rounding, assert_same_bits
from tests.train.foreign import load_and_save
from tests.train.test_foreign import assert_equal, tensors
from tests.train.tiny import run_steps, tiny_config

TP, PP, VPP = "tensor_model_parallel_size", "pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size"
CP, EP, ETP = "context_parallel_size", "expert_model_parallel_size", "expert_tensor_parallel_size"
FIRST, LAST = "num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage"
UNEVEN = {PP: 3, FIRST: 1, LAST: 1}
STAGES = ({}, {PP: 2}, UNEVEN, {PP: 4}, {PP: 2, VPP: 2}, {PP: 2, FIRST: 3}, {PP: 2, FIRST: 1})
MOST_RANKS = 4


def layouts(kind):
    """Return (ranks, settings) of every layout of a kind of model that fits `MOST_RANKS`."""
    found = []
    for stages, tp, cp, dp, ep in itertools.product(STAGES, (1, 2), (1, 2), (1, 2, 3, 4), (1, 2)):
        world = stages.get(PP, 1) * tp * cp * dp
        if world > MOST_RANKS or (ep > 1 and (kind != "moe" or (tp * cp * dp) % ep)):
            continue
        layout = {**stages, **({TP: tp} if tp > 1 else {}), **({CP: cp} if cp > 1 else {})}
        layout |= {EP: ep, ETP: 1} if ep > 1 else {}
        found.append((world, layout))
    return found


def trains(world, layout):
    """Return whether the tests' global batch divides over the layout: three data-parallel ranks only hold it."""
    model_ranks = layout.get(PP, 1) * layout.get(TP, 1) * layout.get(CP, 1)
    return world // model_ranks != 3


CASES = st.sampled_from(["dense", "moe", "mla"]).flatmap(
    lambda kind: st.tuples(
        st.just(kind),
        st.sampled_from(layouts(kind)),
        st.sampled_from([layout for layout in layouts(kind) if trains(*layout)]),
    )
)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("resharded")


@pytest.mark.full
@given(CASES)
@settings(
    max_examples=int(os.environ.get("RESHARDING_EXAMPLES", "4")),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_what_one_layout_saves_any_other_loads(ranks, trained, scratch, case):
    kind, (left_ranks, left), (right_ranks, right) = case
    path, (expected, *_) = trained(kind)
    checkpoint = Path(path)
    for part in scratch.iterdir():
        shutil.rmtree(part)
    holder = tiny_config(kind, **left)
    if not trains(left_ranks, left):  # also where no step follows, megatron-core wants a batch that three divide
        holder = dataclasses.replace(holder, training=dataclasses.replace(holder.training, global_batch_size=12))
    ranks.run(load_and_save, left_ranks, holder, str(checkpoint), str(scratch / "left"))
    assert_equal(scratch / "left" / "iter_0000001", checkpoint)
    results = ranks.run(
        load_and_save,
        right_ranks,
        tiny_config(kind, **right),
        str(scratch / "left" / "iter_0000001"),
        str(scratch / "right"),
        2,
    )
    assert_equal(scratch / "right" / "iter_0000001", checkpoint)
    for result in results:
        assert_fp32_rounding(result, expected)


def weights_and_moments(checkpoint):
    """Return name -> tensor of a checkpoint, the fp32 weights under the name that the distributed optimizer has for them."""
    found = {name.replace(".fp32_param.", ".param."): tensor for name, tensor in tensors(checkpoint).items()}
    if not any(name.startswith("optimizer.state.param.") for name in found):  # plain and fp32: the model's own
        weights = {name for name in found if not name.startswith("optimizer.")}
        found |= {f"optimizer.state.param.{name}": found[name] for name in weights}
    return found


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("saved", "loaded"), full_except([(False, False), (True, False), (False, True)], (True, False))
)
def test_the_plain_and_the_distributed_optimizer_load_each_others_state(ranks, tmp_path, precision, saved, loaded):
    """Weights and moments bit by bit; the next step by rounding: the two keep their tensors in other places of memory."""
    first = tiny_config("dense", precision, use_distributed_optimizer=saved)
    (whole,) = ranks.run(run_steps, 1, first, 0, 3, None, None)
    ranks.run(run_steps, 1, first, 0, 2, None, str(tmp_path))
    then = tiny_config("dense", precision, use_distributed_optimizer=loaded)
    source = tmp_path / "iter_0000002"
    (step,) = ranks.run(load_and_save, 1, then, str(source), str(tmp_path / "again"), 2)
    assert_same_bits(weights_and_moments(tmp_path / "again" / "iter_0000001"), weights_and_moments(source))
    if precision == "fp32":
        assert_fp32_rounding(step, whole[2])
    else:
        assert_bf16_rounding(step, whole[2], averaged=STEP_TOKENS)
