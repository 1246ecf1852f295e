"""Verbs that are killed at a random moment, at least 20 times each: the same command then gives what an undisturbed run gives."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.faults.test_disk import NAMES, ROOT, content, inputs, run, verbs  # noqa: F401

KILLS = int(os.environ.get("KILLS", "20"))


@pytest.mark.timeout(1500)
@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGHUP, signal.SIGTERM])
@pytest.mark.parametrize("name", NAMES)
def test_a_killed_verb_leaves_nothing_that_the_next_one_minds(name, signal_number, inputs, tmp_path):  # noqa: F811
    whole = tmp_path / "whole"
    started = time.monotonic()
    assert run(verbs(inputs, whole)[name], {}).returncode == 0
    seconds, expected = time.monotonic() - started, content(whole)
    chooser = random.Random(f"{name} {signal_number}")
    times = KILLS if signal_number == signal.SIGKILL else max(KILLS // 5, 1)
    for number in range(times):
        output = tmp_path / f"out{number}"
        command = [sys.executable, "-m", "megatron_cpt", *map(str, verbs(inputs, output)[name])]
        process = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        time.sleep(seconds * chooser.uniform(0.3, 1.0))
        process.send_signal(signal_number)
        process.wait(timeout=60)
        time.sleep(0.2)
        assert not _group(process.pid), f"{name}: processes live on"
        again = run(verbs(inputs, output)[name], {})
        assert again.returncode == 0, again.stderr[-2000:]
        assert content(output) == expected


def _group(group: int) -> list[int]:
    """Return the processes of a process group."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                fields = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[2]) == group and fields[0] != "Z":
                found.append(int(name))
    return found
