"""Status tables from ledgers, metrics and logs."""

import json
import os
import socket
import time

from megatron_cpt.launch.status import job_rows, status_text
from megatron_cpt.run.directory import RunDir
from megatron_cpt.run.ledger import append_record, read_jobs
from megatron_cpt.run.progress import first_error, read_progress


def write_metrics(run: RunDir, *records: dict) -> None:
    run.path.mkdir(parents=True, exist_ok=True)
    run.metrics_path.write_text("".join(json.dumps(record) + "\n" for record in records) + '{"kind": "tr')


def test_progress_is_what_the_last_start_left(tmp_path):
    run = RunDir(tmp_path)
    write_metrics(
        run,
        {"kind": "start", "iteration": 0, "consumed_tokens": 0, "time": 1.0},
        {"kind": "train", "iteration": 30, "consumed_tokens": 300, "loss": 3.0, "tokens_per_second": 9.0, "time": 2.0},
        {"kind": "start", "iteration": 20, "consumed_tokens": 200, "time": 3.0},
        {"kind": "train", "iteration": 25, "consumed_tokens": 250, "loss": 2.5, "tokens_per_second": 10.0, "time": 4.0},
    )
    progress = read_progress(run)
    assert (progress.iteration, progress.consumed_tokens, progress.loss, progress.num_starts) == (25, 250, 2.5, 2)
    assert read_progress(RunDir(tmp_path / "nothing")).last_time is None


def test_a_local_job_whose_process_is_gone_was_lost_and_the_ledger_learns_it(tmp_path):
    run = RunDir(tmp_path)
    host = socket.gethostname()
    append_record(run.jobs, "a", stage="train", scheduler="local", state="running", pid=os.getpid(), host=host)
    append_record(run.jobs, "b", stage="train", scheduler="local", state="running", pid=2**22 - 3, host=host)
    assert [(row.job, row.state) for row in job_rows(run)] == [("a", "running"), ("b", "lost")]
    assert read_jobs(run.jobs)["b"]["state"] == "lost"


def test_the_table_says_why_a_job_died(tmp_path):
    run = RunDir(tmp_path)
    logs = run.logs / "7"
    logs.mkdir(parents=True)
    (logs / "rank_00000.log").write_text("12:00 step 1\n")
    (logs / "rank_00003.log").write_text(
        "UserWarning: an error may follow\nTraceback (most recent call last):\n"
        '  File "x.py", line 1, in f\n    raise ValueError("cannot")\ntorch.OutOfMemoryError: CUDA out of memory. Tried\n'
    )
    (logs / "launcher.log").write_text("ChildFailedError\nsrun: error: node failed\n")
    append_record(run.jobs, "7", stage="train", scheduler="slurm", state="failed", exit_code=1, log_dir=str(logs))
    write_metrics(run, {"kind": "start", "iteration": 0, "consumed_tokens": 0, "time": time.time()})
    text = status_text(run, None)
    assert "rank_00003.log: torch.OutOfMemoryError: CUDA out of memory. Tried" in text
    assert first_error(tmp_path / "nowhere") is None


def test_a_running_job_that_has_said_nothing_for_long_is_suspected_to_hang(tmp_path):
    run = RunDir(tmp_path)
    append_record(
        run.jobs, "a", stage="train", scheduler="local", state="running", pid=os.getpid(), host=socket.gethostname()
    )
    write_metrics(run, {"kind": "train", "iteration": 5, "consumed_tokens": 9, "loss": 1.0, "time": time.time() - 3600})
    assert "nothing was logged for 1h00m: the job may hang" in status_text(run, None)
