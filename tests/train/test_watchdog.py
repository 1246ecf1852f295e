"""A rank that hangs says where and ends; one that works is left alone."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_cpt.train.watch.watchdog import HANG_EXIT_CODE
from tests.distributed import RankFailure
from tests.tiers import full_except
from tests.train.test_loop import PP2, run_stage


def run(code: str) -> subprocess.CompletedProcess[str]:
    code = f"import time\nfrom megatron_cpt.train.watch.watchdog import Watchdog\n{code}"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


def test_a_hang_ends_the_rank_with_its_own_exit_code_and_its_stacks():
    result = run("def stuck():\n    time.sleep(50)\nWatchdog(0.5)\nstuck()")
    assert result.returncode == HANG_EXIT_CODE
    assert "has made no step" in result.stderr and "in stuck" in result.stderr


def test_beats_keep_a_rank_alive():
    code = "w = Watchdog(1.0)\nfor _ in range(8):\n    time.sleep(0.25)\n    w.beat()\nw.stop()\nprint('done')"
    assert run(code).stdout == "done\n"


def test_no_time_out_means_no_watch():
    assert run("Watchdog(0)\ntime.sleep(0.3)\nprint('done')").stdout == "done\n"


def stage_that_stalls(task: str, folder: str, rank: str, where: str, overrides: tuple[str, ...]) -> str:
    """Train a stage of which one rank stalls in its third step or while it reads; its stderr goes to a file."""
    from megatron_cpt.train.stage import loop

    log = os.open(Path(folder, f"rank_{os.environ['RANK']}.log"), os.O_WRONLY | os.O_CREAT, 0o644)
    os.dup2(log, 2)
    original, calls = getattr(loop, where), []

    def stuck():
        time.sleep(300)

    def stalling(*arguments, **options):
        calls.append(1)
        if len(calls) == 3 and os.environ["RANK"] == rank:
            stuck()
        return original(*arguments, **options)

    setattr(loop, where, stalling)
    return run_stage(task, "base", ("launch.hang_timeout=3", *overrides))


@pytest.mark.parametrize(
    ("stalled", "where"), full_except([("0", "train_step"), ("1", "microbatches")], ("0", "train_step"))
)
def test_a_stall_in_one_rank_shows_the_stacks_of_all_and_ends_all(ranks, experiment, tmp_path, stalled, where):
    with pytest.raises(RankFailure) as failure:
        ranks.run(stage_that_stalls, 2, str(experiment), str(tmp_path), stalled, where, PP2)
    assert f"died with exit code {HANG_EXIT_CODE}" in str(failure.value)
    for rank in ("0", "1"):
        log = (tmp_path / f"rank_{rank}.log").read_text()
        assert f"watchdog: rank {rank} has made no step for" in log and "_train_stage" in log
        assert ("in stuck" in log) == (rank == stalled)


def stage_with_a_stopped_rank(task: str, folder: str, where: str) -> str:
    """Train a stage of which rank 1 is stopped (SIGSTOP) where it is asked to; the ranks' stderr goes to files."""
    import signal

    from megatron_cpt.train.stage import loop, setup
    from megatron_cpt.train.watch import watchdog

    log = os.open(Path(folder, f"rank_{os.environ['RANK']}.log"), os.O_WRONLY | os.O_CREAT, 0o644)
    os.dup2(log, 2)
    watchdog.Watchdog.listen.__defaults__ = (4.0, 0.5)
    module = loop if hasattr(loop, where) else setup
    original = getattr(module, where)

    def stopped(*arguments, **options):
        if os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGSTOP)
        return original(*arguments, **options)

    setattr(module, where, stopped)
    return run_stage(task, "base", ("launch.hang_timeout=40", "evaluation.eval_interval=4", *PP2))


@pytest.mark.parametrize(
    "where", full_except(["build_train_dataset", "_load_start", "_evaluate", "train_step"], "build_train_dataset")
)
def test_a_stopped_rank_is_named_by_its_neighbour_in_any_stage(ranks, experiment, tmp_path, where):
    started = time.monotonic()
    with pytest.raises(RankFailure):
        ranks.run(stage_with_a_stopped_rank, 2, str(experiment), str(tmp_path), where, timeout=90)
    log = (tmp_path / "rank_0.log").read_text()
    assert "watchdog: rank 0 has heard nothing of rank 1 on " in log and time.monotonic() - started < 90


def test_each_stage_has_a_time_of_its_own():
    code = "w = Watchdog(0.5, 0.1, stage='preparation')\ntime.sleep(1.5)\nw.enter('step')\ntime.sleep(20)"
    started = time.monotonic()
    result = run(code)
    assert result.returncode == HANG_EXIT_CODE and "has made no step" in result.stderr
    assert time.monotonic() - started > 1.5
    result = run("w = Watchdog(0.1, 0.1)\nwith w.during('saving'):\n    time.sleep(20)")
    assert (
        result.returncode == HANG_EXIT_CODE and "is in its saving for" in result.stderr and "times 6" in result.stderr
    )
