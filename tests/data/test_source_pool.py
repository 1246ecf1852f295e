"""Workers keep the order of the files, fail loudly, and end with their main process."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_cpt.data.reading.file_pool import map_files
from megatron_cpt.errors import DataError


def scaled(factor, number):
    time.sleep(0.05 * (3 - number))
    return factor * number


def refuse(number):
    raise DataError(f"file {number} is bad")


def die(number):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("workers", [1, 3])
def test_results_come_in_the_order_of_the_files(workers):
    assert map_files(scaled, [(0,), (1,), (2,)], [1, 1, 1], workers, "x", (10,)) == [0, 10, 20]


def test_an_error_and_a_dead_worker_end_the_work():
    with pytest.raises(DataError, match="file . is bad"):
        map_files(refuse, [(0,), (1,)], [1, 1], 2, "x")
    with pytest.raises(DataError, match="x: a worker process was killed"):
        map_files(die, [(0,), (1,)], [1, 1], 2, "x")


def runs(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().split(")")[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_workers_end_when_the_main_process_is_killed(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "import os, pathlib, time\n"
        "from megatron_cpt.data.reading.file_pool import map_files\n"
        "def work(number):\n"
        f"    pathlib.Path({str(tmp_path)!r}, f'pid{{number}}').write_text(str(os.getpid()))\n"
        "    time.sleep(60)\n"
        "if __name__ == '__main__':\n"
        "    map_files(work, [(0,), (1,)], [1, 1], 2, 'x')\n"
    )
    process = subprocess.Popen([sys.executable, program], env={**os.environ, "PYTHONPATH": os.getcwd()})
    deadline = time.monotonic() + 60
    files = [tmp_path / "pid0", tmp_path / "pid1"]
    while not all(path.exists() and path.read_text() for path in files) and time.monotonic() < deadline:
        time.sleep(0.05)
    workers = [int(path.read_text()) for path in files]
    process.kill()
    process.wait()
    while any(map(runs, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(runs, workers))
