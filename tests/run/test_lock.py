"""One job at a time works on a run, whatever clocks say, whoever was stopped, whatever stands in the lock file."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_cpt.errors import LaunchError
from megatron_cpt.run.lock import HELD, _identity, fence, run_lock

HOLDER = """
import sys, time
from pathlib import Path
from megatron_cpt.run import lock
with lock.run_lock(Path(sys.argv[1]), "first", expiry_seconds=float(sys.argv[2])):
    print("held", flush=True)
    time.sleep(60)
"""


def held_by(path: Path, **fields: object) -> None:
    """Write a lock of another job."""
    lock = {
        "owner": "old",
        "host": "elsewhere",
        "pid": 1,
        "process": "",
        "token": "x",
        "expiry_seconds": 90.0,
        "since": 1,
    }
    path.write_text(json.dumps(lock | fields))


def aged(path: Path, seconds: float) -> None:
    """Let a file have been written `seconds` ago."""
    os.utime(path, (time.time() - seconds,) * 2)


@pytest.mark.parametrize("skew", [-100_000, -95, 95, 100_000])
def test_clocks_that_disagree_neither_take_a_lock_nor_keep_one(skew, tmp_path, monkeypatch):
    path, now = tmp_path / "lock.json", time.time
    held_by(path)
    monkeypatch.setattr(time, "time", lambda: now() + skew)
    with pytest.raises(LaunchError, match="held by old"), run_lock(path, "new"):
        pass
    monkeypatch.undo()
    aged(path, 91)
    monkeypatch.setattr(time, "time", lambda: now() + skew)
    with run_lock(path, "new"):
        pass


def test_the_lock_of_a_dead_process_of_this_system_is_taken_at_once_and_that_of_a_live_one_is_not(tmp_path):
    path = tmp_path / "lock.json"
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        held_by(path, pid=child.pid, process=_identity(child.pid))
        with pytest.raises(LaunchError, match="held by old"), run_lock(path, "new"):
            pass
    with run_lock(path, "new"):
        pass


@pytest.mark.parametrize(
    "process", ["", _identity(os.getpid()).replace(" ", " other", 1), "f00 " + _identity(os.getpid()).partition(" ")[2]]
)
def test_a_process_of_another_container_or_boot_is_not_taken_for_dead(process, tmp_path):
    held_by(tmp_path / "lock.json", pid=2**22 - 1, process=process)
    with pytest.raises(LaunchError, match="held by old"), run_lock(tmp_path / "lock.json", "new"):
        pass


def test_a_number_that_came_again_does_not_keep_a_lock(tmp_path):
    system = _identity(os.getpid()).rpartition(" ")[0]
    held_by(tmp_path / "lock.json", pid=os.getpid(), process=f"{system} 1")
    with run_lock(tmp_path / "lock.json", "new"):
        pass


@pytest.mark.parametrize(
    "content", [b"", b"\xff\xfe\x00", b"null", b"[]", b"17", b'"text"', b"{}", b'{"owner": null}', b"[" * 100_000,
                b'{"owner": "a", "pid": "b", "expiry_seconds": "long"}', b'{"expiry_seconds": -1}', b'{"expiry_seconds": 1e300}']
)  # fmt: skip
def test_garbage_needs_no_person(content, tmp_path):
    path = tmp_path / "lock.json"
    path.write_bytes(content)
    with pytest.raises(LaunchError, match="expires in"), run_lock(path, "new"):
        pass
    aged(path, 91)
    with run_lock(path, "new"):
        assert json.loads(path.read_text())["owner"] == "new"
    assert [item.name for item in tmp_path.iterdir()] == ["lock.guard"]


def test_a_holder_that_wakes_after_the_lock_was_taken_ends_and_leaves_the_other_alone(tmp_path):
    path = tmp_path / "lock.json"
    command = [sys.executable, "-c", HOLDER, str(path), "0.6"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None and first.stdout.readline() == "held\n"
        os.kill(first.pid, signal.SIGSTOP)
        with run_lock(path, "second", expiry_seconds=0.6, wait_seconds=10):
            os.kill(first.pid, signal.SIGCONT)
            said = first.communicate(timeout=10)[1]
            assert first.returncode == -signal.SIGTERM and "the lock was lost, it is now held by second" in said
            with fence():
                assert json.loads(path.read_text())["owner"] == "second"


def test_a_lock_whose_file_was_removed_is_lost(tmp_path):
    path = tmp_path / "lock.json"
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(path), "0.6"], stdout=subprocess.PIPE) as first:
        assert first.stdout is not None and first.stdout.readline() == b"held\n"
        path.unlink()
        assert first.wait(timeout=10) == -signal.SIGTERM


def test_the_fence_stops_what_lost_its_lock(tmp_path):
    path = tmp_path / "lock.json"
    with fence():  # no lock, no fence
        pass
    with run_lock(path, "first"):
        with fence():
            pass
        taken = path.read_text()
        held_by(path)
        with pytest.raises(LaunchError, match="the lock was lost, it is now held by old"), fence():
            raise AssertionError("the block ran")
        path.unlink()
        with pytest.raises(LaunchError, match="now held by nobody"), fence():
            raise AssertionError("the block ran")
        path.write_text(taken)
    assert HELD not in os.environ


def test_a_renewal_that_the_disk_refuses_for_long_ends_the_run(tmp_path):
    path = tmp_path / "lock.json"
    program = HOLDER.replace("time.sleep(60)", "lock.write_json = refuse; time.sleep(60)").replace(
        "from megatron_cpt.run import lock",
        "from megatron_cpt.run import lock\ndef refuse(*_): raise OSError(28, 'full')",
    )
    started = time.monotonic()
    command = [sys.executable, "-c", program, str(path), "1.2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None and first.stdout.readline() == "held\n"
        said = first.communicate(timeout=20)[1]
    assert first.returncode == -signal.SIGTERM and "could not be renewed" in said and time.monotonic() - started > 1.2
