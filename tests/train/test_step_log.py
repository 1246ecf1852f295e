"""What a record says of time: the parts of a step, and what is left of the stage."""

from types import SimpleNamespace

import pytest

from megatron_cpt.train.stage import step_log
from megatron_cpt.train.stage.step import StepResult
from tests.train.tiny import tiny_config


class Clock:
    """A clock that stands still until it is told."""

    def __init__(self):
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    found = Clock()
    monkeypatch.setattr(step_log, "time", found)
    monkeypatch.setattr(step_log.torch.distributed, "get_world_size", lambda: 4)
    return found


def stage_of(iterations: int, *, eval_interval: int, save_interval: int):
    config = tiny_config()
    return SimpleNamespace(
        config=SimpleNamespace(
            model=config.model,
            training=config.training,
            evaluation=SimpleNamespace(eval_interval=eval_interval),
            checkpoint=SimpleNamespace(save_interval=save_interval),
        ),
        iterations=iterations,
        tokens=lambda iteration: iteration * 8 * 64,
        sizes=SimpleNamespace(samples=lambda iteration: iteration * 8, size=lambda iteration: 8),
    )


def stepped(log, clock, seconds: float, wait: float = 0.0) -> None:
    with log.data():
        clock.now += wait
    clock.now += seconds
    log.add(StepResult(3.0, 1.0, True, seconds * 0.75, seconds * 0.25), 8)


def test_parts_of_a_step_are_means_and_pauses_are_no_part(clock):
    log = step_log.StepLog(
        stage_of(100, eval_interval=10, save_interval=25), SimpleNamespace(seconds_left=lambda: None)
    )
    stepped(log, clock, 2.0, wait=0.5)
    with log.evaluation():
        clock.now += 30
    with log.save(is_new=True):
        clock.now += 7
    stepped(log, clock, 4.0, wait=1.5)
    record = log.record(2, StepResult(3.0, 1.0, True, 0, 0), 1e-3, 0.1)
    assert (record["step_seconds"], record["data_seconds"], record["checkpoint_seconds"]) == (4.0, 1.0, 7.0)
    assert (record["forward_backward_seconds"], record["optimizer_seconds"]) == (2.25, 0.75)
    assert record["tokens_per_second"] == 2 * 8 * 64 / 8.0
    assert record["tokens_per_second_per_gpu"] == record["tokens_per_second"] / 4


def test_the_eta_is_the_steps_evaluations_and_saves_to_come(clock):
    log = step_log.StepLog(
        stage_of(105, eval_interval=10, save_interval=25), SimpleNamespace(seconds_left=lambda: None)
    )
    stepped(log, clock, 2.0)
    assert log.record(1, StepResult(3.0, 1.0, True, 0, 0), 1e-3, 0.1)["eta_seconds"] == 104 * 2.0
    with log.evaluation():
        clock.now += 30
    with log.save(is_new=True):
        clock.now += 7
    with log.save(is_new=False):
        clock.now += 1
    for iteration in range(2, 51):
        stepped(log, clock, 2.0)
        record = log.record(iteration, StepResult(3.0, 1.0, True, 0, 0), 1e-3, 0.1)
    # written before the evaluation and the save of iteration 50; they come again at 60 to 100 and 75, 100, and at the end
    assert record["eta_seconds"] == 55 * 2.0 + (6 + 1) * 30 + (3 + 1) * 7


def test_steps_that_were_undone_are_forgotten(clock):
    log = step_log.StepLog(stage_of(100, eval_interval=0, save_interval=25), SimpleNamespace(seconds_left=lambda: None))
    stepped(log, clock, 50.0)
    log.restart()
    stepped(log, clock, 2.0)
    assert log.record(5, StepResult(3.0, 1.0, True, 0, 0), 1e-3, 0.1)["step_seconds"] == 2.0
