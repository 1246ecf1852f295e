"""Chains on a real Slurm on loopback: crashes, signals, cancelled and failing jobs, dependents, refusals."""

import dataclasses
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from megatron_cpt.errors import LaunchError
from megatron_cpt.launch.scheduler.choice import scheduler_of
from megatron_cpt.launch.scheduler.job import Dependency
from tests.cluster.conftest import submit_chain, submit_stage

pytestmark = pytest.mark.cluster


def test_a_chain_goes_on_after_a_crash_and_ends_when_the_run_is_finished(slurm_run):
    slurm_run.behave(crash_at={"1": 25})
    ids = submit_chain(slurm_run.submission, num_links=3)
    states = slurm_run.wait(*ids)
    assert [state.state for state in states] == ["failed", "finished", "finished"], slurm_run.logs()
    jobs = slurm_run.jobs()
    assert [jobs[job]["state"] for job in ids] == ["failed", "finished", "finished"]
    assert (jobs[ids[0]]["iteration_end"], jobs[ids[1]]["iteration_start"], jobs[ids[1]]["iteration_end"]) == (
        20,
        20,
        40,
    )
    assert jobs[ids[0]]["hosts"] == ["cpt1", "cpt2"]
    assert "iteration_start" not in jobs[ids[2]], "the third link found the run finished and started nothing"
    log = slurm_run.run.logs / ids[1] / "rank_00000.log"
    assert log.read_text() == "start at 20\n"
    assert (log.parent / "rank_00001.log").exists()
    assert submit_chain(slurm_run.submission) == [], "a finished run needs no job"


def test_the_signal_before_the_walltime_saves_and_the_next_link_continues_there(slurm_run):
    slurm_run.behave(seconds=0.1)
    first, second = submit_chain(slurm_run.submission, num_links=2)
    slurm_run.until(lambda: slurm_run.iteration() >= 10)
    subprocess.run(["scancel", "--batch", "--signal=USR1", first], check=True)
    assert [state.state for state in slurm_run.wait(first, second)] == ["finished", "finished"]
    jobs = slurm_run.jobs()
    assert jobs[first]["state"] == "stopped"
    assert 10 <= jobs[first]["iteration_end"] == jobs[second]["iteration_start"] < 40
    assert slurm_run.iteration() == 40


def test_a_cancelled_link_is_repaired_by_the_same_command(slurm_run):
    slurm_run.behave(seconds=0.1)
    first, second = submit_chain(slurm_run.submission, num_links=2)
    slurm_run.until(lambda: slurm_run.iteration() >= 10)
    scheduler_of("slurm").cancel([first, second])
    slurm_run.wait(first, second)
    slurm_run.behave()
    later = dataclasses.replace(slurm_run.submission, stamp="later")
    (third,) = submit_chain(later)
    assert slurm_run.wait(third)[0].state == "finished", slurm_run.logs()
    assert slurm_run.jobs()[third]["iteration_start"] >= 10 and slurm_run.iteration() == 40


def test_links_without_progress_break_the_chain_and_nothing_more_is_trained(slurm_run):
    slurm_run.behave(crash_at={"1": 3, "2": 5, "3": 7, "4": 9})
    ids = submit_chain(slurm_run.submission, num_links=4)
    states = slurm_run.wait(*ids)
    assert [state.state for state in states] == ["failed"] * 4
    jobs = slurm_run.jobs()
    assert [jobs[job]["exit_code"] for job in ids] == [1, 1, 4, 4], slurm_run.logs()
    assert "2 links in a row failed without a new checkpoint" in jobs[ids[2]]["reason"]


def test_a_stop_file_ends_the_chain(slurm_run):
    slurm_run.behave(seconds=0.1)
    first, second = submit_chain(slurm_run.submission, num_links=2)
    slurm_run.until(lambda: slurm_run.iteration() >= 10)
    (slurm_run.run.path / "stop_chain").touch()
    (slurm_run.run.path / "stop_now").touch()
    states = slurm_run.wait(first, second)
    assert [state.exit_code for state in states] == [0, 3]
    assert slurm_run.iteration() < 40


def test_a_second_submission_is_refused_and_a_longer_chain_adds_only_links(slurm_run):
    slurm_run.behave(seconds=0.1)
    first = submit_chain(slurm_run.submission)
    with pytest.raises(LaunchError, match=f"job {first[0]} of this run is queued or running"):
        submit_chain(slurm_run.submission)
    later = dataclasses.replace(slurm_run.submission, stamp="later")
    ids = submit_chain(later, num_links=3)
    assert ids[:1] == first and len(set(ids)) == 3
    assert len({slurm_run.jobs()[job]["chain"] for job in ids}) == 1
    scheduler_of("slurm").cancel(ids)
    slurm_run.wait(*ids)


def test_dependents_of_a_failed_job_are_cancelled_and_unknown_parents_refused(slurm_run):
    submission = slurm_run.submission
    parent = submit_stage(submission, "convert", ["show-config", "--task", "nowhere"])
    later = dataclasses.replace(submission, stamp="later")
    child = submit_stage(later, "report", ["show-config"], dependencies=[Dependency("afterok", (parent,))])
    states = slurm_run.wait(parent, child)
    assert [state.state for state in states] == ["failed", "cancelled"], slurm_run.logs()
    for text, message in (("afterok:999999", "knows no job 999999"), (f"afterok:{parent}", "has failed already")):
        with pytest.raises(LaunchError, match=message):
            submit_chain(dataclasses.replace(submission, depend=text))


def test_the_schedulers_own_refusal_is_shown(slurm_run):
    site = dataclasses.replace(slurm_run.submission.site, queue="no-such-partition")
    with pytest.raises(LaunchError, match="invalid partition"):
        submit_chain(dataclasses.replace(slurm_run.submission, site=site))
    assert slurm_run.jobs() == {}


def test_a_node_that_fails_the_preflight_is_avoided_by_the_next_link(slurm_run):
    python = Path(slurm_run.submission.python)
    seen, excluded = python.with_name("preflight_ran"), slurm_run.run.jobs / "excluded_nodes.txt"
    first_line, rest = python.read_text().split("\n", 1)
    stand_in = (
        'if [[ "$*" == "-m megatron_cpt preflight "* ]]; then\n'
        f"  [[ -e {seen} ]] && exit 0\n"
        f'  touch {seen}; echo "$SLURMD_NODENAME too slow" >>{excluded}; exit 5\nfi\n'
    )
    python.write_text(f"{first_line}\n{stand_in}{rest}")
    submission = slurm_run.submission
    launch = dataclasses.replace(submission.loaded.config.launch, nodes=1)
    loaded = dataclasses.replace(submission.loaded, config=dataclasses.replace(submission.loaded.config, launch=launch))
    site = dataclasses.replace(submission.site, preflight=True)
    first, second = submit_chain(dataclasses.replace(submission, loaded=loaded, site=site), num_links=2)
    states = slurm_run.wait(first, second)
    assert [state.exit_code for state in states] == [5, 0], slurm_run.logs()
    jobs = slurm_run.jobs()
    assert jobs[first]["reason"] == f"preflight: bad nodes: {jobs[first]['hosts'][0]}"
    assert excluded.read_text() == f"{jobs[first]['hosts'][0]} too slow\n"
    assert jobs[second]["hosts"] != jobs[first]["hosts"] and slurm_run.iteration() == 40


def test_a_preempted_job_is_queued_again_and_continues(slurm_run):
    slurm_run.behave(seconds=0.1)
    (job,) = submit_chain(slurm_run.submission)
    slurm_run.until(lambda: slurm_run.iteration() >= 10)
    subprocess.run(["scontrol", "requeue", job], check=True)
    slurm_run.until(lambda: scheduler_of("slurm").states([job])[job].state == "queued")
    time.sleep(3)  # in the same second the job's credential still counts as revoked, and the job fails without a word
    slurm_run.behave()
    subprocess.run(["scontrol", "update", f"jobid={job}", "starttime=now"], check=True)  # Slurm would wait 2 minutes
    assert slurm_run.wait(job)[0].state == "finished", slurm_run.logs()
    record = slurm_run.jobs()[job]
    assert record["restarts"] == 1 and record["iteration_start"] >= 10 and slurm_run.iteration() == 40


def test_a_killed_rank_ends_the_job_on_every_node_within_seconds(slurm_run):
    slurm_run.behave(seconds=30)
    (job,) = submit_chain(slurm_run.submission)
    slurm_run.until(lambda: "start at" in slurm_run.logs())
    ranks = subprocess.run(
        ["pgrep", "-f", f"{slurm_run.run.path.parents[4]}/stand_in.py"], capture_output=True, text=True
    )
    pids = [int(pid) for pid in ranks.stdout.split()]
    assert len(pids) == 2
    os.kill(pids[0], signal.SIGKILL)
    (state,) = slurm_run.wait(job, seconds=30)
    assert state.state == "failed"
    slurm_run.until(lambda: not any(is_running(pid) for pid in pids), seconds=10)


def is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] not in "ZX"
    except FileNotFoundError:
        return False
