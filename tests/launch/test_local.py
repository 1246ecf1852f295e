"""The local scheduler with stand-in programs: exit codes, logs, signals, restarts, lock and ledger."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_cpt.errors import LaunchError
from megatron_cpt.launch.node.rank import rank_environment
from megatron_cpt.launch.scheduler.local import local_environment, run_local
from megatron_cpt.run.directory import RunDir
from megatron_cpt.run.ledger import read_jobs
from megatron_cpt.run.lock import run_lock


def run_program(tmp_path: Path, source: str, num_ranks: int = 2, **options) -> tuple[int, RunDir]:
    program = tmp_path / "program.py"
    program.write_text("import os, sys, time\nrank = int(os.environ['RANK'])\n" + source)
    run = RunDir(tmp_path / "run")
    return run_local(run, [], num_ranks=num_ranks, program=(str(program),), **options), run


def only_job(run: RunDir) -> dict:
    (job,) = read_jobs(run.jobs).values()
    return job


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state not in "ZX"


def test_each_rank_has_its_log_and_rank_0_is_shown(tmp_path, capfd):
    code, run = run_program(tmp_path, "print('hello from', rank, 'of', os.environ['WORLD_SIZE'])")
    assert code == 0
    job = only_job(run)
    assert (job["state"], job["exit_code"], job["stage"], job["scheduler"]) == ("finished", 0, "train", "local")
    logs = run.logs / job["job"]
    assert (logs / "rank_00000.log").read_text() == "hello from 0 of 2\n"
    assert (logs / "rank_00001.log").read_text() == "hello from 1 of 2\n"
    shown = capfd.readouterr().err
    assert "hello from 0 of 2" in shown and "hello from 1" not in shown


def test_a_users_mistake_exits_2_and_is_not_restarted(tmp_path):
    code, run = run_program(
        tmp_path, "sys.stderr.write('task.yaml: wrong\\n'); sys.exit(2)", num_ranks=1, max_restarts=3
    )
    assert code == 2
    assert only_job(run)["restarts"] == 0 and only_job(run)["state"] == "failed"


def test_a_killed_rank_ends_the_job_within_seconds_and_no_rank_survives(tmp_path, caplog):
    source = f"""
open({str(tmp_path)!r} + f'/pid{{rank}}', 'w').write(str(os.getpid()))
if rank == 1:
    os.kill(os.getpid(), 9)
time.sleep(300)
"""
    started = time.monotonic()
    code, run = run_program(tmp_path, source)
    assert code == 128 + 9
    assert time.monotonic() - started < 40
    assert not is_running(int((tmp_path / "pid0").read_text()))
    assert only_job(run)["exit_code"] == 137
    assert "rank 1 ended first, by SIGKILL" in caplog.text


def test_a_crash_is_continued_up_to_max_restarts(tmp_path):
    source = f"""
marker = {str(tmp_path)!r} + '/crashed'
if not os.path.exists(marker):
    open(marker, 'w').close()
    raise SystemExit(3)
print('continued')
"""
    code, run = run_program(tmp_path, source, num_ranks=1, max_restarts=2)
    assert code == 0
    assert only_job(run)["restarts"] == 1
    assert "continued" in (run.logs / only_job(run)["job"] / "rank_00000.log").read_text()


def test_a_taken_port_is_one_clear_error(tmp_path):
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(LaunchError, match=f"port {port}: in use"):
            run_program(tmp_path, "print('unreachable')", num_ranks=1, port=port)


def test_a_run_that_is_held_is_refused_with_its_holder(tmp_path):
    run = RunDir(tmp_path / "run")
    with run_lock(run.jobs / "lock.json", "job 17"):
        with pytest.raises(LaunchError, match="held by job 17 .process"):
            run_local(run, [], num_ranks=1)
    assert not (run.jobs / "lock.json").exists()


def test_a_lock_is_renewed_while_it_is_held(tmp_path):
    path = tmp_path / "lock.json"
    with run_lock(path, "first", expiry_seconds=0.3):
        time.sleep(0.7)
        with pytest.raises(LaunchError, match="held by first"), run_lock(path, "second"):
            pass


def test_sigterm_reaches_the_ranks_which_may_save_and_end(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "import os, signal, sys, time\n"
        "stop = []\n"
        "signal.signal(signal.SIGTERM, lambda *_: stop.append(1))\n"
        f"open({str(tmp_path)!r} + '/ready', 'w').close()\n"
        "while not stop: time.sleep(0.05)\n"
        "print('saved')\n"
    )
    script = (
        "import sys\nfrom pathlib import Path\nfrom megatron_cpt.launch.scheduler.local import run_local\n"
        "from megatron_cpt.run.directory import RunDir\n"
        f"sys.exit(run_local(RunDir(Path({str(tmp_path)!r}) / 'run'), [], num_ranks=1, program=({str(program)!r},)))\n"
    )
    launcher = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "ready").exists():
            assert time.monotonic() < deadline and launcher.poll() is None
            time.sleep(0.05)
        launcher.send_signal(signal.SIGTERM)
        _, shown = launcher.communicate(timeout=30)
    finally:
        launcher.kill()
    assert launcher.returncode == 0
    assert "saved" in shown
    assert only_job(RunDir(tmp_path / "run"))["state"] == "stopped"


def test_threads_are_shared_out_and_a_users_choice_stands():
    cores = len(os.sched_getaffinity(0))
    assert local_environment({}, 1)["OMP_NUM_THREADS"] == str(cores)
    assert local_environment({}, 10 * cores)["OMP_NUM_THREADS"] == "1"
    assert local_environment({"OMP_NUM_THREADS": "7"}, 1)["OMP_NUM_THREADS"] == "7"


@pytest.mark.parametrize(
    ("environment", "rank"),
    [
        ({"RANK": "3", "SLURM_PROCID": "9"}, "3"),
        ({"OMPI_COMM_WORLD_RANK": "5", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}, "5"),
        ({"PMI_RANK": "2"}, "2"),
        ({"SLURM_PROCID": "7"}, "7"),
    ],
)
def test_the_rank_comes_from_whichever_launcher_started_it(environment, rank):
    assert rank_environment(environment)["RANK"] == rank


def test_a_ledger_line_cut_short_is_skipped_and_the_next_record_stands_alone(tmp_path):
    from megatron_cpt.run.ledger import append_record, ledger_path

    append_record(tmp_path, "a", state="running", stage="train")
    with ledger_path(tmp_path).open("a") as file:
        file.write('{"job": "b", "sta')
    append_record(tmp_path, "a", state="finished")
    assert list(read_jobs(tmp_path)) == ["a"]
    assert read_jobs(tmp_path)["a"]["state"] == "finished" and read_jobs(tmp_path)["a"]["stage"] == "train"
