"""What a terminal is shown, what a pipe is, and when it is told how long something takes."""

import os
import pty
import subprocess
import sys

import pytest

from megatron_cpt.log import Progress

PROGRAM = """
import logging, time
from megatron_cpt.log import Progress, configure_logging
configure_logging()
progress = Progress("work", 10, "files", interval_seconds=0.0)
for _ in range(3): progress.add(1)
logging.warning("careful")
progress.add(1)
"""


def on_a_terminal(**environment: str) -> str:
    """Return what the program writes to stderr on a terminal."""
    main, worker = pty.openpty()
    command = [sys.executable, "-c", PROGRAM]
    plain = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    process = subprocess.Popen(command, stderr=worker, env={**plain, "TERM": "xterm", "COLUMNS": "60", **environment})
    process.wait(timeout=60)
    os.close(worker)
    written = b""
    try:
        while part := os.read(main, 4096):
            written += part
    except OSError:  # the terminal is closed
        pass
    os.close(main)
    return written.decode()


def test_a_terminal_has_one_line_of_progress_that_is_written_over():
    written = on_a_terminal()
    assert written.count("work:") == 4
    assert written.count("\n") == 2  # after the warning, and at the end
    assert written.count("\r\x1b[K") == 3
    assert "\x1b[33m" in written and "careful\x1b[0m" in written


def test_there_is_no_colour_where_nobody_wants_it():
    assert "\x1b[33m" not in on_a_terminal(NO_COLOR="1")
    written = on_a_terminal(TERM="dumb")
    assert "\x1b" not in written and written.count("\n") == 5


def test_a_pipe_has_a_line_for_each_record():
    answer = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60)
    assert "\x1b" not in answer.stderr and "\r" not in answer.stderr
    assert len(answer.stderr.splitlines()) == 5


@pytest.mark.parametrize(
    ("seconds", "done", "is_told"), [(0.5, 50, False), (10.0, 0.1, False), (10.0, 50, True), (2.0, 0.5, True)]
)
def test_the_time_left_waits_until_it_can_be_sensible(monkeypatch, seconds, done, is_told):
    now = iter([0.0, *[seconds] * 9])
    monkeypatch.setattr("megatron_cpt.log.time.monotonic", lambda: next(now))
    progress = Progress("work", 100, "files", interval_seconds=1e9)
    progress.add(done)
    assert ("left" in progress.line()) == is_told
