"""What TensorBoard is given: groups, an axis of tokens, the settings, marks, and nothing of what a run has undone."""

from pathlib import Path

from megatron_cpt.run.directory import RunDir
from megatron_cpt.train.watch.metrics import MetricsWriter
from tests.train.test_metrics import config


def record(iteration: int) -> dict:
    return {
        "iteration": iteration, "consumed_samples": iteration, "consumed_tokens": iteration * 100, "loss": 3.0 / iteration,
        "lr": 0.1, "grad_norm": 1.0, "tokens_per_second": 5.0, "mfu": None, "step_seconds": 0.2, "eta_seconds": 9.0,
        "walltime_left_seconds": 8.0, "memory_bytes": 7,
    }  # fmt: skip


def steps(folder: Path) -> dict[str, list[int]]:
    """Return tag -> steps that TensorBoard shows of a folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return {tag: [event.step for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]} | {
        tag: [event.step for event in events.Tensors(tag)] for tag in events.Tags()["tensors"]
    }


def write(run: RunDir, iterations: range, iteration: int = 0) -> MetricsWriter:
    writer = MetricsWriter(
        run, is_writer=True, config=config(tensorboard=True), iteration=iteration, consumed_tokens=iteration * 100
    )
    for number in iterations:
        writer.write("train", **record(number))
    return writer


def test_curves_have_groups_and_an_axis_of_tokens_and_there_are_no_countdowns(tmp_path):
    run = RunDir(tmp_path)
    writer = write(run, range(1, 4))
    place = {"iteration": 3, "consumed_tokens": 300}
    writer.write("validation", **place, corpus="D0", loss=1.0, bits_per_byte=0.5)
    writer.write("save", iteration=3, seconds=1.5, stall_seconds=1.0)
    writer.write("spike", **place, loss=9.0, median=1.0)
    writer.close()
    shown = steps(run.tensorboard)
    assert (
        shown["loss/loss"]
        == shown["optim/lr"]
        == shown["speed/tokens_per_second"]
        == shown["time/step_seconds"]
        == [1, 2, 3]
    )
    assert shown["loss/D0"] == shown["bits_per_byte/D0"] == shown["events/save"] == shown["events/spike"] == [3]
    assert shown["config/text_summary"] == [0]
    assert not [tag for tag in shown if "eta" in tag or "walltime" in tag or "consumed" in tag]
    assert steps(run.tensorboard / "tokens") == {
        "loss/loss": [100, 200, 300], "optim/lr": [100, 200, 300], "loss/D0": [300], "bits_per_byte/D0": [300]
    }  # fmt: skip


def test_what_a_roll_back_undoes_is_forgotten_on_both_axes(tmp_path):
    run = RunDir(tmp_path)
    writer = write(run, range(1, 7))
    writer.write("rollback", iteration=2, consumed_tokens=200, skipped="3-6")
    for number in (3, 4):
        writer.write("train", **record(number))
    writer.close()
    assert steps(run.tensorboard)["loss/loss"] == [1, 2, 3, 4]
    assert steps(run.tensorboard / "tokens")["loss/loss"] == [100, 200, 300, 400]


def test_what_a_resumed_run_trains_again_is_shown_once(tmp_path):
    run = RunDir(tmp_path)
    write(run, range(1, 7)).close()
    write(run, range(5, 8), iteration=4).close()
    assert steps(run.tensorboard)["loss/loss"] == [1, 2, 3, 4, 5, 6, 7]
    assert steps(run.tensorboard / "tokens")["loss/loss"] == [100, 200, 300, 400, 500, 600, 700]
