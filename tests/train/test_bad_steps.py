"""Steps without a finite loss or gradient: nothing changes on any rank, the count, the end, what is written of them."""

import json
from pathlib import Path

import pytest

from megatron_cpt.checkpoint.torch_dist.mcore import list_checkpoints, verify_checkpoint
from megatron_cpt.evaluate.report.markdown import write_report
from tests.distributed import RankFailure
from tests.tiers import full_except
from tests.train.test_loop import losses, records, run_path, run_stage
from tests.train.tiny import batches, tiny_config

NO_NUMBER = float("nan")


def step_with_nan_on_one_rank(config, bad_rank: int) -> tuple[bool, float, float, bool]:
    """Return (whether it updated, loss, gradient norm, whether a parameter changed) of a step with a NaN on one rank."""
    import torch

    from megatron_cpt.train.backend.parallel import finish_parallel, initialize_parallel
    from megatron_cpt.train.model.build import build_training_model
    from megatron_cpt.train.stage.step import train_step

    initialize_parallel(config)
    model, optimizer = build_training_model(config)
    if torch.distributed.get_rank() == bad_rank:
        parameter = next(iter(model[0].parameters()))
        parameter.register_hook(lambda gradient: gradient * NO_NUMBER)

    def state():
        biases = [buffer for name, buffer in model[0].named_buffers() if name.endswith("expert_bias")]
        assert biases or not config.model.moe_router_enable_expert_bias
        return [tensor.detach().clone() for tensor in [*model[0].parameters(), *biases]]

    before = state()
    result = train_step(model, optimizer, batches(config, 0), config, 1e-3)
    changed = any(not torch.equal(old, new) for old, new in zip(before, state(), strict=True))
    finish_parallel()
    return result.is_updated, result.loss, result.grad_norm, changed


@pytest.mark.parametrize(
    ("parallel", "bad_rank"),
    full_except(
        [
            ({"use_distributed_optimizer": True}, 1),
            ({"use_distributed_optimizer": False}, 1),
            ({"pipeline_model_parallel_size": 2}, 0),
            ({"pipeline_model_parallel_size": 2}, 1),
            ({"tensor_model_parallel_size": 2}, 1),
            ({"context_parallel_size": 2}, 1),
        ],
        ({"use_distributed_optimizer": True}, 1),
        ({"pipeline_model_parallel_size": 2}, 0),
    ),
    ids=str,
)
def test_a_gradient_without_a_number_on_one_rank_stops_the_update_on_every_rank(ranks, parallel, bad_rank):
    for updated, loss, norm, changed in ranks.run(step_with_nan_on_one_rank, 2, tiny_config(**parallel), bad_rank):
        assert not updated and not changed and loss > 0 and norm != norm


@pytest.mark.parametrize("kind", full_except(["moe", "deepseek"], "moe"))
def test_a_gradient_without_a_number_in_one_ranks_experts_stops_the_update_on_every_rank(ranks, kind):
    config = tiny_config(kind, expert_model_parallel_size=2)
    for updated, _, norm, changed in ranks.run(step_with_nan_on_one_rank, 2, config, 1):
        assert not updated and not changed and norm != norm


def stage_with_nan(task: str, first: int, last: int, overrides: tuple[str, ...] = (), slow_writer: bool = False) -> str:
    """Train a stage whose iterations `first` to `last` have a loss that is no number."""
    import time

    import torch

    from megatron_cpt.train.stage import loop
    from megatron_cpt.train.state import checkpointing

    original, write = loop.microbatches, checkpointing._write_and_hash

    def microbatches(dataset, sample, *arguments, **options):
        found = original(dataset, sample, *arguments, **options)
        if first <= sample // 8 + 1 <= last and arguments[0] == 8:
            for batch in found:
                batch.loss_mask = torch.full_like(batch.loss_mask, NO_NUMBER)
        return found

    def slow(*arguments, **options):
        time.sleep(2)
        write(*arguments, **options)

    loop.microbatches = microbatches
    checkpointing._write_and_hash = slow if slow_writer else write
    try:
        return run_stage(task, "base", overrides)
    finally:
        loop.microbatches, checkpointing._write_and_hash = original, write


def test_a_step_without_a_number_is_skipped_and_written_as_json(ranks, experiment, tmp_path):
    assert ranks.run(stage_with_nan, 1, str(experiment), 3, 4, ("logging.tensorboard=true",)) == ["finished"]
    text = (run_path(experiment, "base") / "metrics.jsonl").read_text()
    assert "NaN" not in text
    found = losses(experiment, "base")
    assert [iteration for iteration, loss in found.items() if loss is None] == [3, 4]
    assert found[5] is not None and [r["grad_norm"] for r in records(experiment, "base", "train")][2:4] == [None, None]
    page = write_report([run_path(experiment, "base")], tmp_path / "report").read_text()
    assert "nan" not in page and "2 logged steps of `base` had no finite loss" in page


def test_many_in_a_row_end_the_run_with_a_checkpoint_from_before(ranks, experiment):
    longer = ("training.train_iters=24", "checkpoint.async_save=true", "checkpoint.save_interval=3")
    with pytest.raises(RankFailure, match="10 steps in a row without a finite loss"):
        ranks.run(stage_with_nan, 1, str(experiment), 4, 99, longer, True)
    root = run_path(experiment, "base") / "checkpoints"
    assert list_checkpoints(root)[0] == 3
    for iteration in list_checkpoints(root):
        verify_checkpoint(root / f"iter_{iteration:07d}", "full")
    assert not [path for path in Path(root).iterdir() if path.is_dir() and not (path / "manifest.json").exists()]


def test_the_count_starts_again_after_a_good_step(ranks, experiment):
    longer = ("training.train_iters=26", "checkpoint.save_interval=100")
    assert ranks.run(stage_with_nan, 1, str(experiment), 2, 10, longer) == ["finished"]
    assert sum(loss is None for loss in losses(experiment, "base").values()) == 9
    kinds = [
        json.loads(line)["kind"] for line in (run_path(experiment, "base") / "metrics.jsonl").read_text().splitlines()
    ]
    assert kinds[-1] == "end"
