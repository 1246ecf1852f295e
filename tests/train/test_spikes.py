"""Loss spikes: what counts as one, and what a run does about it."""

import random
from dataclasses import replace

from megatron_cpt.checkpoint.torch_dist.mcore import read_manifest
from megatron_cpt.config.settings.schema import TrainingConfig
from megatron_cpt.evaluate.report.stages import read_stage
from megatron_cpt.train.watch.spikes import RECENT, WINDOW, SpikeDetector, may_roll_back, skip_line
from tests.tolerances import assert_estimate, assert_fp32_rounding
from tests.train.test_loop import records, run_path, run_stage

LONG = ("training.train_iters=24", "training.spike_threshold=20", "checkpoint.save_interval=10")
BACK = (*LONG, "training.spike_action=rollback")


def noise(count: int, level: float = 3.0) -> list[float]:
    chooser = random.Random(0)
    return [chooser.gauss(level, 0.05) for _ in range(count)]


def test_a_loss_far_above_the_others_is_a_spike_and_noise_is_none():
    detector = SpikeDetector(6.0)
    assert not any(detector.see(loss) for loss in noise(500))
    spike = detector.see(3.9)
    assert spike is not None
    # for normal noise the error of a median is 1.25 of a mean's, and that of a deviation from medians 1.17 of its value
    assert_estimate(spike.median, 3.0, deviation=1.25 * 0.05, draws=RECENT)
    assert_estimate(spike.deviation, 0.05, deviation=1.17 * 0.05, draws=WINDOW)
    assert detector.see(3.1) is None


def test_nothing_is_judged_before_enough_losses_are_known_or_with_a_threshold_of_0():
    detector = SpikeDetector(5.0)
    assert not any(detector.see(loss) for loss in [*noise(RECENT - 1), 90.0])
    assert not any(SpikeDetector(0.0, noise(100)).see(loss) for loss in (3.0, 900.0))


def test_a_lasting_change_of_level_stops_being_a_spike():
    detector = SpikeDetector(6.0, noise(WINDOW))
    found = [detector.see(loss) is not None for loss in noise(WINDOW, 4.0)]
    assert found[0] and not any(found[RECENT // 2 + 1 :])


def test_a_falling_loss_hides_no_spike():
    falling = [8.0 - 0.1 * step + loss - 3.0 for step, loss in enumerate(noise(40))]
    detector = SpikeDetector(6.0)
    assert not any(detector.see(loss) for loss in falling)
    assert detector.see(6.5) is not None


def test_a_loss_that_does_not_move_tolerates_a_wiggle():
    assert SpikeDetector(5.0, [2.0] * 50).see(2.005) is None


def test_a_roll_back_skips_the_spike_and_what_came_before_it_but_nothing_before_the_checkpoint():
    training = TrainingConfig(spike_skip_iterations=3, spike_action="rollback", spike_max_rollbacks=2)
    spike = SpikeDetector(6.0, noise(50)).see(9.0)
    assert spike is not None
    line = skip_line(spike, 40, 20, training)
    assert line.startswith("38-40  # spike at iteration 40: loss 9.0000")
    assert skip_line(spike, 40, 39, training).startswith("40  #")
    assert may_roll_back(training, line + "7-8  # a person's\n")
    assert not may_roll_back(training, line * 2)
    assert not may_roll_back(replace(training, spike_action="report"), "")


def stage_with_bad_samples(task: str, overrides: tuple[str, ...], bad: tuple[int, int]) -> str:
    """Train a stage in which samples `bad` have labels that no document has."""
    import torch

    from megatron_cpt.train.stage import loop

    original = loop.microbatches

    def microbatches(dataset, first, count, config, eod_id):
        batches = original(dataset, first, count, config, eod_id)
        if bad[0] <= first < bad[1]:
            for batch in batches:
                batch.labels = torch.full_like(batch.labels, 5)
        return batches

    loop.microbatches = microbatches
    try:
        return run_stage(task, "base", overrides)
    finally:
        loop.microbatches = original


def tensorboard_losses(run) -> dict[int, float]:
    """Return what TensorBoard shows of a run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    found = [(event.step, event.value) for event in events.Scalars("loss/loss")]
    assert len(dict(found)) == len(found)
    return dict(found)


def test_a_spike_is_reported_with_samples_and_shards_and_the_run_goes_on(ranks, experiment):
    assert ranks.run(stage_with_bad_samples, 1, str(experiment), LONG, (160, 168)) == ["finished"]
    (spike,) = records(experiment, "base", "spike")
    assert (spike["iteration"], spike["first_sample"], spike["last_sample"]) == (21, 160, 167)
    assert list(spike["shards"].values()) == [8] and next(iter(spike["shards"])).endswith("D0_text_document")
    (documents,) = spike["documents"].values()
    assert len(documents) > 1 and documents == sorted(documents) and documents[-1] < 300
    assert spike["loss"] > spike["median"] and not records(experiment, "base", "rollback")


def test_a_run_rolls_back_over_a_bad_shard_and_skips_it(ranks, experiment):
    overrides = (*BACK, "launch.gpus_per_node=2", "logging.tensorboard=true")
    assert ranks.run(stage_with_bad_samples, 2, str(experiment), overrides, (160, 176)) == ["finished"] * 2
    run = run_path(experiment, "base")
    stored = {r["iteration"]: r["loss"] for r in read_stage(run).train}
    assert_fp32_rounding(tensorboard_losses(run), stored, roundings=1)  # an event holds a float32
    assert [record["iteration"] for record in records(experiment, "base", "spike")] == [21, 22]
    assert [(r["iteration"], r["skipped"]) for r in records(experiment, "base", "rollback")] == [
        (20, "21"),
        (20, "21-22"),
    ]
    assert [record["iteration"] for record in records(experiment, "base", "skip")] == [21, 21, 22]
    manifest = read_manifest(run / "checkpoints" / "iter_0000024")
    assert manifest["skipped_iterations"] == ["21-22"]
    assert manifest["tokens_per_corpus"] == {"D0": 22 * 8 * 32}
    assert len(manifest["recent_losses"]) == 22


def test_roll_backs_end_after_the_most_that_are_allowed(ranks, experiment):
    overrides = (*BACK, "training.spike_max_rollbacks=1")
    assert ranks.run(stage_with_bad_samples, 1, str(experiment), overrides, (160, 999)) == ["finished"]
    assert len(records(experiment, "base", "rollback")) == 1
    assert len(records(experiment, "base", "spike")) >= 2
    assert records(experiment, "base", "end")[-1]["iteration"] == 24


def test_a_run_without_a_checkpoint_only_reports(ranks, experiment):
    overrides = (*BACK, "checkpoint.save_interval=100")
    assert ranks.run(stage_with_bad_samples, 1, str(experiment), overrides, (160, 168)) == ["finished"]
    assert records(experiment, "base", "spike") and not records(experiment, "base", "rollback")
