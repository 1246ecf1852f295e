"""A rank that hangs says where and ends; one that works is left alone."""

import subprocess
import sys

from megatron_cpt.train.watchdog import HANG_EXIT_CODE


def run(code: str) -> subprocess.CompletedProcess[str]:
    code = f"import time\nfrom megatron_cpt.train.watchdog import Watchdog\n{code}"
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
