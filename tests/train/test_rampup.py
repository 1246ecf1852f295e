"""A batch ramp-up, skipped iterations and a weight-decay schedule in a whole stage: exact samples, exact resumption."""

import shutil

import pytest

from megatron_cpt.checkpoint.torch_dist.mcore import read_manifest
from tests.tolerances import RUN_ROUNDINGS, assert_fp32_rounding, assert_fp64_rounding
from tests.train.test_loop import PP2, losses, records, run_path, run_stage

RAMP = (
    "training.rampup_batch_size=[4,4,24]",
    "training.global_batch_size=16",
    "optimizer.weight_decay_end=0.3",
    "optimizer.weight_decay_incr_style=linear",
    'data.skip_iterations=["3","6-7"]',
    "data.mix={D0: 0.5, D1: 0.5}",
)
SIZES = [4, 4, 8, 12, 16, 16, 16, 16]
"""Samples of each step: the batch grows at 8, 16 and 24 samples."""


def traced_stage(task: str, overrides: tuple[str, ...]) -> list[tuple[int, int]]:
    """Train a stage; return (first sample, samples) of each global batch that was read for training."""
    from megatron_cpt.train.stage import loop

    seen = []
    original = loop.microbatches

    def microbatches(dataset, first, count, config, eod_id):
        seen.append((first, count))
        return original(dataset, first, count, config, eod_id)

    loop.microbatches = microbatches
    try:
        run_stage(task, "base", overrides)
    finally:
        loop.microbatches = original
    return seen


@pytest.fixture
def ramped(ranks, experiment):
    (seen,) = ranks.run(traced_stage, 1, str(experiment), RAMP)
    return experiment, seen


def test_every_step_reads_exactly_its_samples_and_skipped_ones_none(ramped):
    experiment, seen = ramped
    starts = [sum(SIZES[:n]) for n in range(9)]
    assert seen == [(starts[n], SIZES[n]) for n in (0, 1, 3, 4, 7)]
    steps = records(experiment, "base", "train")
    assert [step["iteration"] for step in steps] == [1, 2, 4, 5, 8]
    assert [step["consumed_samples"] for step in steps] == [starts[n] for n in (1, 2, 4, 5, 8)]
    assert [step["global_batch_size"] for step in steps] == [4, 4, 12, 16, 16]
    assert [record["iteration"] for record in records(experiment, "base", "skip")] == [3, 6, 7]
    assert_fp64_rounding(
        [step["weight_decay"] for step in steps], [0.1 + 0.2 * starts[n] / 92 for n in (0, 1, 3, 4, 7)]
    )


def test_the_ledger_counts_what_was_trained_on(ramped):
    experiment, _ = ramped
    checkpoints = run_path(experiment, "base") / "checkpoints"
    half, end = (read_manifest(checkpoints / f"iter_{n:07d}") for n in (4, 8))
    assert (half["consumed_samples"], end["consumed_samples"]) == (28, 92)
    assert (half["skipped_iterations"], end["skipped_iterations"]) == (["3"], ["3", "6-7"])
    assert sum(half["tokens_per_corpus"].values()) == (28 - 8) * 32
    assert sum(end["tokens_per_corpus"].values()) == (92 - 8 - 32) * 32
    assert end["consumed_tokens"] == 92 * 32


def test_a_resume_in_the_ramp_under_another_layout_reads_on_exactly(ranks, ramped):
    experiment, _ = ramped
    whole, run = losses(experiment, "base"), run_path(experiment, "base")
    shutil.rmtree(run / "checkpoints" / "iter_0000008")
    (run / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("4\n")
    first, second = ranks.run(traced_stage, 2, str(experiment), (*RAMP, *PP2))
    assert first == second == [(28, 16), (76, 16)]
    assert_fp32_rounding(losses(experiment, "base"), whole, roundings=RUN_ROUNDINGS)


def test_a_range_added_for_the_past_changes_no_count(ranks, ramped):
    experiment, _ = ramped
    run = run_path(experiment, "base")
    before = read_manifest(run / "checkpoints" / "iter_0000008")
    shutil.rmtree(run / "checkpoints" / "iter_0000008")
    (run / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("4\n")
    (run / "skip_iterations.txt").write_text("1-2  # trained already\n")
    more = [word if not word.startswith("data.skip") else 'data.skip_iterations=["3","5-7"]' for word in RAMP]
    (seen,) = ranks.run(traced_stage, 1, str(experiment), tuple(more))
    assert seen == [(76, 16)]
    after = read_manifest(run / "checkpoints" / "iter_0000008")
    assert after["skipped_iterations"] == ["3", "5-7"]
    lost = sum(before["tokens_per_corpus"].values()) - sum(after["tokens_per_corpus"].values())
    assert lost == 16 * 32


STEPS = 'training.rampup_batch_size=[[4, "256 tokens"], [8, 0.1], [12, 4]]'
"""The sizes of `SIZES`: 4 until 8 samples, 8 until a tenth of the stage (9.2, so one step), 12 until iteration 4."""


def test_a_ramp_in_steps_of_mixed_durations_resumes_exactly(ranks, experiment):
    steps = (STEPS, "training.global_batch_size=16", "data.mix={D0: 0.5, D1: 0.5}")
    (seen,) = ranks.run(traced_stage, 1, str(experiment), steps)
    assert [count for _, count in seen] == SIZES
    whole, run = losses(experiment, "base"), run_path(experiment, "base")
    shutil.rmtree(run / "checkpoints" / "iter_0000008")
    (run / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("4\n")
    (seen,) = ranks.run(traced_stage, 1, str(experiment), steps)
    assert seen == [(28, 16), (44, 16), (60, 16), (76, 16)]
    assert losses(experiment, "base") == whole
