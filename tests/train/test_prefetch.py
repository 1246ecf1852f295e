"""Reading ahead changes nothing but when a batch is read: order, bound, mistakes, the end."""

import threading
import time

import pytest

from megatron_cpt.train.samples.prefetch import AHEAD, Prefetch
from tests.train.test_loop import losses, run_stage


def wait_until(condition) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_batches_come_in_their_order_and_are_read_before_they_are_asked_for():
    read = []

    def reader(iteration):
        read.append(iteration)
        return iteration * 10

    with Prefetch(reader, [1, 2, 5, 6, 7, 8, 9]) as ahead:
        wait_until(lambda: len(read) == AHEAD + 1)
        assert ahead.get(1) == 10
        wait_until(lambda: len(read) == AHEAD + 2)
        time.sleep(0.05)
        assert read == [1, 2, 5, 6]
        assert [ahead.get(iteration) for iteration in (2, 5, 6, 7, 8, 9)] == [20, 50, 60, 70, 80, 90]
    with Prefetch(reader, [1, 2]) as ahead, pytest.raises(AssertionError, match="2 was asked for, 1 comes next"):
        ahead.get(2)


def test_a_mistake_is_raised_by_the_step_that_was_to_have_the_batch():
    def reader(iteration):
        if iteration == 3:
            raise OSError("stale file handle")
        return iteration

    with Prefetch(reader, range(1, 9)) as ahead:
        assert [ahead.get(1), ahead.get(2)] == [1, 2]
        with pytest.raises(OSError, match="stale file handle"):
            ahead.get(3)


def test_leaving_it_ends_the_thread_whether_it_waits_or_reads():
    reading, go_on = threading.Event(), threading.Event()

    def slow(iteration):
        reading.set()
        go_on.wait(20)
        return iteration

    full = Prefetch(lambda iteration: iteration, range(100))
    full.close()
    assert not full._thread.is_alive()
    busy = Prefetch(slow, range(100))
    reading.wait(20)
    threading.Timer(0.1, go_on.set).start()
    busy.close()
    busy.close()
    assert not busy._thread.is_alive()


def stage_with_a_bad_read(task: str, first_sample: int) -> tuple[str, bool]:
    """Train with a read that fails; return the error and whether a thread is left."""
    from megatron_cpt.train.stage import loop

    original = loop.microbatches

    def microbatches(dataset, first, *arguments, **options):
        if first == first_sample:
            raise OSError("Input/output error")
        return original(dataset, first, *arguments, **options)

    loop.microbatches = microbatches
    try:
        run_stage(task, "base")
    except OSError as problem:
        return str(problem), any(thread.name in ("prefetch", "watchdog") for thread in threading.enumerate())
    finally:
        loop.microbatches = original
    raise AssertionError("nothing failed")


def test_a_run_trains_up_to_the_batch_that_cannot_be_read(ranks, experiment):
    assert ranks.run(stage_with_a_bad_read, 1, str(experiment), 5 * 8) == [("Input/output error", False)]
    assert list(losses(experiment, "base")) == [1, 2, 3, 4, 5]
