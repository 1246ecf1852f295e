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
