"""What Slurm was seen to do that is easily misread, on a real one; its commands are wrapped where an answer is lost."""

import dataclasses
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from megatron_cpt.errors import LaunchError
from megatron_cpt.launch.scheduler.job import Dependency
from megatron_cpt.launch.scheduler.slurm import Slurm
from megatron_cpt.launch.scheduler.states import job_states
from megatron_cpt.launch.status import job_rows
from megatron_cpt.launch.submission.chain import submit_links
from megatron_cpt.launch.submission.executor import executor_of
from megatron_cpt.launch.submission.work import Link, Work
from megatron_cpt.run.intents import open_intents
from tests.cluster.conftest import Cluster, submit_chain, submit_stage

pytestmark = pytest.mark.cluster


def later(run: Cluster):
    return dataclasses.replace(run.submission, stamp=f"later{time.monotonic_ns()}")


def wrapped(tmp_path: Path, monkeypatch, name: str, body: str) -> Path:
    """Put a wrapper of a command first on PATH; `real` in its body is the command itself. Return the wrapper."""
    folder = tmp_path / "wrapped"
    folder.mkdir(exist_ok=True)
    real = shutil.which(name)
    path = folder / name
    path.write_text(f'#!/bin/bash\nreal() {{ {real} "$@"; }}\n{body}\n')
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return path


def test_no_link_of_a_chain_trains_when_a_parent_failed(slurm_run):
    parent = submit_stage(slurm_run.submission, "tokenize", ["show-config", "--task", "nowhere"])
    executor = executor_of(later(slurm_run))
    work = Work(name="train", stage="train", words=("train",), on_ranks=True, link=Link(number=1))
    ids = submit_links(executor, work, (), [parent], (), num_links=3, max_failures=2)
    states = slurm_run.wait(parent, *ids)
    assert [state.state for state in states] == ["failed", "cancelled", "cancelled", "cancelled"]
    assert slurm_run.iteration() == 0, slurm_run.logs()


def test_a_cancelled_middle_link_does_not_let_the_next_one_start_beside_the_running_one(slurm_run):
    slurm_run.behave(seconds=0.2)
    first, second, third = submit_chain(slurm_run.submission, num_links=3)
    slurm_run.until(lambda: slurm_run.iteration() >= 1)
    Slurm().cancel([second])
    time.sleep(3)
    assert Slurm().states([first, third])[third].state == "queued"
    states = slurm_run.wait(first, second, third)
    assert [state.state for state in states] == ["finished", "cancelled", "finished"], slurm_run.logs()
    assert slurm_run.jobs()[third]["state"] == "finished" and "iteration_start" not in slurm_run.jobs()[third]


def test_a_job_whose_submission_was_not_answered_is_found_by_its_name(slurm_run, tmp_path, monkeypatch):
    slurm_run.behave(seconds=0.2)
    lost = "real \"$@\" >/dev/null; echo 'sbatch: error: Socket timed out on send/recv operation' >&2; exit 1"
    wrapper = wrapped(tmp_path, monkeypatch, "sbatch", lost)
    (job,) = submit_chain(slurm_run.submission)
    assert job.isdigit() and not open_intents(slurm_run.run.jobs)
    wrapper.write_text(wrapper.read_text().replace(lost, 'real "$@"; echo "93.5 hours left"'))
    Slurm().cancel([job])
    slurm_run.wait(job)
    (second,) = submit_chain(later(slurm_run))
    assert int(second) > int(job)
    Slurm().cancel([second])


def test_a_controller_that_does_not_answer_says_nothing_about_jobs(slurm_run, tmp_path, monkeypatch):
    slurm_run.behave(seconds=0.2)
    (job,) = submit_chain(slurm_run.submission)
    slurm_run.until(lambda: slurm_run.iteration() >= 1)
    silent = "echo 'slurm_load_jobs error: Unable to contact slurm controller (connect failure)' >&2; exit 1"
    wrapper = wrapped(tmp_path, monkeypatch, "squeue", silent)
    assert [(row.job, row.state) for row in job_rows(slurm_run.run)] == [(job, "unknown")]
    assert slurm_run.jobs()[job]["state"] == "running"
    with pytest.raises(LaunchError, match="slurm does not answer about job"):
        submit_chain(later(slurm_run), num_links=2)
    wrapper.unlink()
    assert job_states(slurm_run.run)[job].state == "running"
    assert [name for name in slurm_run.jobs() if "/" not in name] == [job]
    assert Slurm().states(["999999"])["999999"].state == "gone"
    assert {state.state for state in Slurm().states(["999999", job]).values()} == {"gone", "running"}
    Slurm().cancel([job])


def test_a_job_submitted_from_inside_an_array_task_has_its_own_id(slurm_run, tmp_path):
    """It inherits SLURM_ARRAY_JOB_ID and SLURM_ARRAY_TASK_ID from the task that submitted it."""
    executor = executor_of(slurm_run.submission)
    job = executor.submit(Work(name="report", stage="report", words=("--version",)))
    slurm_run.wait(job)
    script = slurm_run.jobs()[job]["script"]
    outer = tmp_path / "outer.sh"
    outer.write_text(
        f"#!/bin/bash\n#SBATCH --array=3\n#SBATCH --output=/dev/null\nsbatch --parsable {script} >{tmp_path}/inner\n"
    )
    array = subprocess.run(
        ["sbatch", "--parsable", str(outer)], capture_output=True, text=True, check=True
    ).stdout.strip()
    slurm_run.wait(array)
    inner = (tmp_path / "inner").read_text().strip()
    slurm_run.wait(inner)
    jobs = slurm_run.jobs()
    assert jobs[inner]["state"] == "finished" and array not in jobs and f"{array}/3" not in jobs


def test_an_array_of_which_one_task_failed_lets_nothing_start_that_needs_it(slurm_run):
    executor = executor_of(slurm_run.submission)
    words = ("show-config", "--task", "nowhere-{array_index}")
    array = executor.submit(Work(name="tokenize-D0", stage="tokenize", words=words, num_array_tasks=2))
    after = [Dependency("afterok", (array,))]
    needing = executor_of(later(slurm_run)).submit(
        Work(name="build-index", stage="tokenize", words=("--version",)), after
    )
    assert [state.state for state in slurm_run.wait(array, needing)] == ["failed", "cancelled"]
