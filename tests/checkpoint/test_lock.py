"""Two jobs cannot write one run."""

import json
import subprocess
import time

import pytest

from megatron_cpt.checkpoint.lock import LOCK_NAME, run_lock
from megatron_cpt.errors import LaunchError


def write_lock(path, **changes):
    """Write another job's lock."""
    held = {"host": "elsewhere", "pid": 1, "job": "7.pbs1", "token": "t", "renewed": time.time(), "expiry_seconds": 60}
    (path / LOCK_NAME).write_text(json.dumps({**held, **changes}))


def test_a_second_job_is_refused_with_the_owners_name(tmp_path):
    with run_lock(tmp_path), pytest.raises(LaunchError, match="writes this run"), run_lock(tmp_path):
        pass
    write_lock(tmp_path)
    with pytest.raises(LaunchError, match="job 7.pbs1 on elsewhere"), run_lock(tmp_path):
        pass


def test_the_lock_is_free_afterwards_also_after_an_exception(tmp_path):
    with pytest.raises(ValueError), run_lock(tmp_path):
        raise ValueError
    with run_lock(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_an_expired_lock_is_taken_over(tmp_path, caplog):
    write_lock(tmp_path, renewed=time.time() - 61)
    with run_lock(tmp_path):
        assert json.loads((tmp_path / LOCK_NAME).read_text())["host"] != "elsewhere"
    assert "taking over from job 7.pbs1" in caplog.text


def test_a_lock_of_a_dead_process_on_this_host_is_taken_over(tmp_path):
    dead = subprocess.Popen(["true"])
    dead.wait()
    with run_lock(tmp_path):
        host = json.loads((tmp_path / LOCK_NAME).read_text())["host"]
    write_lock(tmp_path, host=host, pid=dead.pid)
    with run_lock(tmp_path):
        assert json.loads((tmp_path / LOCK_NAME).read_text())["pid"] != dead.pid


def test_the_owner_renews_its_lock(tmp_path):
    with run_lock(tmp_path, expiry_seconds=0.2):
        first = json.loads((tmp_path / LOCK_NAME).read_text())["renewed"]
        time.sleep(0.3)
        assert json.loads((tmp_path / LOCK_NAME).read_text())["renewed"] > first
        with pytest.raises(LaunchError), run_lock(tmp_path, expiry_seconds=0.2):
            pass
