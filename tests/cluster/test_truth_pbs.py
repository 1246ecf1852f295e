"""What a PBS server was seen to do that is easily misread; each test names the behaviour of the stand-in that it needs."""

import dataclasses
import subprocess
import time
from pathlib import Path

import pytest

from megatron_cpt.errors import LaunchError
from megatron_cpt.launch.scheduler.choice import scheduler_of
from megatron_cpt.launch.scheduler.job import Dependency
from megatron_cpt.launch.scheduler.pbs import Pbs
from megatron_cpt.launch.scheduler.states import job_states
from megatron_cpt.launch.status import job_rows
from megatron_cpt.launch.submission.chain import submit_links
from megatron_cpt.launch.submission.executor import executor_of
from megatron_cpt.launch.submission.work import Link, Work
from megatron_cpt.run.intents import open_intents
from megatron_cpt.run.ledger import append_record
from tests.cluster.conftest import Cluster, submit_chain, submit_stage
from tests.cluster.pbs_stand_in import behave
from tests.cluster.test_pbs_stand_in import pbs_run

__all__ = ["pbs_run"]


def later(run: Cluster):
    """Return the submission of a later command."""
    return dataclasses.replace(run.submission, stamp=f"later{time.monotonic_ns()}")


def server(run: Cluster):
    return run.submission.work_dir.parent / "pbs"


def queued(run: Cluster) -> list[str]:
    """Return every job that the server has taken."""
    return sorted(path.name for path in (server(run) / "jobs").iterdir())


def slow_parent(run: Cluster, seconds: float, code: int = 0) -> str:
    """Queue a stage that takes its time; return its id."""
    python = Path(run.submission.python)
    text = python.read_text().split("\n", 1)
    stand_in = f'[[ "$*" == "-m megatron_cpt data sleep "* ]] && {{ sleep {seconds}; exit {code}; }}'
    python.write_text(f"{text[0]}\n{stand_in}\n{text[1]}")
    return submit_stage(run.submission, "tokenize", ["data", "sleep", "now"])


def test_no_link_of_a_chain_starts_when_a_parent_failed(pbs_run):
    parent = slow_parent(pbs_run, 1, code=1)
    executor = executor_of(later(pbs_run))
    work = Work(name="train", stage="train", words=("train",), on_ranks=True, link=Link(number=1))
    ids = submit_links(executor, work, (), [parent], (), num_links=3, max_failures=2)
    states = pbs_run.wait(parent, *ids)
    assert [state.state for state in states] == ["failed", "cancelled", "cancelled", "cancelled"]
    assert pbs_run.iteration() == 0 and not any("iteration_start" in job for job in pbs_run.jobs().values())
    conditions = [pbs_run.jobs()[job]["dependencies"] for job in ids]
    assert conditions[2] == [f"afterok:{parent}", f"afterany:{ids[0]}:{ids[1]}"]


@pytest.mark.parametrize("history", [True, False])
def test_a_running_job_is_known_whether_or_not_the_server_keeps_a_history(pbs_run, history):
    behave(server(pbs_run), history=history)
    pbs_run.behave(seconds=0.2)
    (job,) = submit_chain(pbs_run.submission)
    pbs_run.until(lambda: pbs_run.iteration() >= 1)
    assert Pbs().states([job])[job].state == "running"
    with pytest.raises(LaunchError, match="is queued or running"):
        submit_chain(later(pbs_run))
    waiting = dataclasses.replace(later(pbs_run), depend=f"afterany:{job}")
    executor_of(waiting).begin()
    assert queued(pbs_run) == [job]
    pbs_run.behave()
    pbs_run.until(lambda: Pbs().states([job])[job].state in ("finished", "gone"))
    pbs_run.until(lambda: pbs_run.jobs()[job]["state"] == "finished")
    assert Pbs().states([job])[job].state == ("finished" if history else "gone")
    assert job_states(pbs_run.run)[job].state == "finished", "the job itself wrote it"
    assert Pbs().states(["99.pbs1", job])["99.pbs1"].state == "gone"


def test_a_stopped_server_says_nothing_about_jobs(pbs_run):
    pbs_run.behave(seconds=0.2)
    (job,) = submit_chain(pbs_run.submission)
    pbs_run.until(lambda: pbs_run.iteration() >= 1)
    behave(server(pbs_run), server="down")
    for _ in range(2):
        assert [(row.job, row.state) for row in job_rows(pbs_run.run)] == [(job, "unknown")]
    assert pbs_run.jobs()[job]["state"] == "running", "no answer is never written down"
    for options in ({}, {"num_links": 3}):
        with pytest.raises(LaunchError, match="pbs does not answer about job"):
            submit_chain(later(pbs_run), **options)
    with pytest.raises(LaunchError, match="does not answer about job 5.pbs1"):
        submit_chain(dataclasses.replace(later(pbs_run), depend="afterok:5.pbs1"))
    behave(server(pbs_run))
    assert queued(pbs_run) == [job]
    assert [row.state for row in job_rows(pbs_run.run)] == ["running"]


def test_a_job_whose_submission_was_not_answered_is_found_and_not_queued_twice(pbs_run):
    pbs_run.behave(seconds=0.2)
    behave(server(pbs_run), qsub="silent")
    (job,) = submit_chain(pbs_run.submission)
    assert job == "0.pbs1" and not open_intents(pbs_run.run.jobs)
    pbs_run.until(lambda: pbs_run.iteration() >= 1)
    scheduler_of("pbs").cancel([job])
    pbs_run.wait(job)
    behave(server(pbs_run), qsub="notice")
    (job,) = submit_chain(later(pbs_run))
    assert job == "1.pbs1"


def test_a_submission_that_nobody_can_ask_about_is_settled_by_the_next_command(pbs_run, monkeypatch):
    pbs_run.behave(seconds=0.2)
    behave(server(pbs_run), qsub="silent")
    named = Pbs.named
    monkeypatch.setattr(Pbs, "named", lambda self, name: None)
    with pytest.raises(LaunchError, match="may have taken the job t-train-.* does not answer now"):
        submit_chain(pbs_run.submission)
    assert queued(pbs_run) == ["0.pbs1"] and len(open_intents(pbs_run.run.jobs)) == 1
    behave(server(pbs_run))
    with pytest.raises(LaunchError, match="does not say whether it has taken the job"):
        submit_chain(later(pbs_run))
    monkeypatch.setattr(Pbs, "named", named)
    with pytest.raises(LaunchError, match="job 0.pbs1 of this run is queued or running"):
        submit_chain(later(pbs_run))
    assert queued(pbs_run) == ["0.pbs1"] and not open_intents(pbs_run.run.jobs)
    assert pbs_run.jobs()["0.pbs1"]["name"] == "train" and pbs_run.jobs()["0.pbs1"]["link"] == 1


def test_a_submission_that_never_arrived_is_forgotten_and_made_again(pbs_run, monkeypatch):
    monkeypatch.setattr("megatron_cpt.launch.submission.executor._SETTLE_SECONDS", 0.1)
    behave(server(pbs_run), qsub="lost")
    with pytest.raises(LaunchError, match="may have taken the job"):
        submit_chain(pbs_run.submission)
    assert queued(pbs_run) == [] and len(open_intents(pbs_run.run.jobs)) == 1
    behave(server(pbs_run))
    (job,) = submit_chain(later(pbs_run))
    assert queued(pbs_run) == [job] and not open_intents(pbs_run.run.jobs)


def test_a_cancelled_middle_link_does_not_let_the_next_one_start_beside_the_running_one(pbs_run):
    pbs_run.behave(seconds=0.15)
    first, second, third = submit_chain(pbs_run.submission, num_links=3)
    pbs_run.until(lambda: pbs_run.iteration() >= 1)
    scheduler_of("pbs").cancel([second])
    time.sleep(1)
    assert Pbs().states([third])[third].state == "held", "it waits for the first one too"
    states = pbs_run.wait(first, second, third)
    assert [state.state for state in states] == ["finished", "cancelled", "finished"], pbs_run.logs()


def test_a_link_that_finds_the_run_held_waits_and_does_not_fail(pbs_run):
    pbs_run.behave(seconds=0.1)
    (first,) = submit_chain(pbs_run.submission)
    pbs_run.until(lambda: pbs_run.iteration() >= 1)
    executor = executor_of(later(pbs_run))
    work = Work(name="train", stage="train", words=("train",), on_ranks=True, link=Link(number=2))
    second = executor.submit(work)
    assert [state.state for state in pbs_run.wait(first, second)] == ["finished", "finished"], pbs_run.logs()
    assert "waiting: " in pbs_run.logs() and pbs_run.iteration() == 40


def test_what_a_job_wrote_of_its_own_end_counts_more_than_a_walltime_kill(pbs_run):
    behave(server(pbs_run), exit_status=-29)
    (job,) = submit_chain(pbs_run.submission)
    assert pbs_run.wait(job)[0].exit_code == -29
    assert [row.state for row in job_rows(pbs_run.run)] == ["finished"]
    append_record(pbs_run.run.jobs, "77.pbs1", stage="train", scheduler="pbs", state="running")
    assert job_states(pbs_run.run)["77.pbs1"].state == "lost"


def test_the_server_is_asked_once_for_all_jobs(pbs_run, monkeypatch):
    for number in range(4):
        append_record(pbs_run.run.jobs, f"{50 + number}.pbs1", stage="train", scheduler="pbs", state="running")
    asked = []
    plain = subprocess.run
    monkeypatch.setattr(
        subprocess, "run", lambda command, **options: (asked.append(command), plain(command, **options))[1]
    )
    job_rows(pbs_run.run)
    assert len([command for command in asked if command[0] == "qstat"]) == 2, "live ones, then the past"


@pytest.mark.parametrize("nodes", [["localhost.domain.example", "node1"], ["localhost", "localhost-ib0.example"]])
def test_preflight_ends_where_the_node_file_has_other_names_than_the_nodes(pbs_run, nodes):
    """1,151 preflights in 600 s were seen: bad nodes were never met again under the names of the node file."""
    behave(server(pbs_run), nodes=nodes)
    python = Path(pbs_run.submission.python)
    excluded = pbs_run.run.jobs / "excluded_nodes.txt"
    counted = pbs_run.run.path / "preflights"
    text = python.read_text().split("\n", 1)
    stand_in = f'[[ "$*" == "-m megatron_cpt preflight "* ]] && {{ echo "other-name slow" >>{excluded}; echo x >>{counted}; sleep 0.3; exit 5; }}'
    python.write_text(f"{text[0]}\n{stand_in}\n{text[1]}")
    site = dataclasses.replace(pbs_run.submission.site, preflight=True)
    (job,) = submit_chain(dataclasses.replace(pbs_run.submission, site=site))
    assert pbs_run.wait(job)[0].exit_code == 5
    assert len(counted.read_text().split()) <= 2 * len(nodes)


def test_printed_ids_are_searched_in_what_else_a_site_prints():
    pbs, slurm = Pbs(), scheduler_of("slurm")
    assert pbs.printed_id("12.pbs1\n") == "12.pbs1"
    assert pbs.printed_id("You have 93.5 of 100 hours.\n12[].pbs1.site\nSee 4.x notes\n") == "12[].pbs1.site"
    assert pbs.printed_id("job 12.pbs1 queued, 3.5 hours left\n") == "12.pbs1"
    assert pbs.printed_id("nothing of use 3.5\n") is None
    assert slurm.printed_id("17\n") == "17" and slurm.printed_id("17;cluster\n") == "17"
    assert slurm.printed_id("sbatch: 3 hours left\n17\nWelcome 2026\n") == "17"
    assert slurm.printed_id("Submitted batch job 17\n") == "17" and slurm.printed_id("hello\n") is None


@pytest.mark.parametrize("wanted", ["ja", "a task", "100B", "日本語", "x" * 300, "-dash", "a/b"])
def test_a_jobs_name_is_one_that_both_schedulers_take(wanted):
    for name in ("pbs", "slurm"):
        made = scheduler_of(name).job_name(f"{wanted}-train", "0a1b2c3d")
        assert made.endswith("-0a1b2c3d") and len(made) <= 64 and made[0].isalpha()
        assert all(letter.isalnum() or letter in "-_." for letter in made) and made.isascii()


def test_dependencies_that_both_hold(pbs_run):
    first, second = (
        slow_parent(pbs_run, 0.2),
        submit_stage(later(pbs_run), "report", ["show-config", "--task", "nowhere"]),
    )
    third = submit_stage(
        later(pbs_run), "convert", ["show-config"], dependencies=[Dependency("afterok", (first, second))]
    )
    assert [state.state for state in pbs_run.wait(first, second, third)] == ["finished", "failed", "cancelled"]


def test_a_pipeline_that_the_scheduler_refuses_in_the_middle_names_what_is_queued(pbs_run, monkeypatch):
    from megatron_cpt.launch.submission import pipeline
    from megatron_cpt.launch.submission.executor import Batch

    stages = [
        Work(name="build-index", stage="build-index", words=("blend", "build-index")),
        Work(name="train", stage="train", words=("train",), on_ranks=True, link=Link(number=1), needs=("build-index",)),
    ]
    monkeypatch.setattr(pipeline, "pipeline_stages", lambda *_, **__: stages)
    monkeypatch.setattr(pipeline, "training_problems", lambda *_, **__: [])
    slow_parent(pbs_run, 0)
    site = dataclasses.replace(later(pbs_run).site, options=("-Z wrong",))
    plain = Batch.submit

    def submit(self, work, after=()):
        if work.link is not None:
            self.submission = dataclasses.replace(self.submission, site=site)
        return plain(self, work, after)

    monkeypatch.setattr(Batch, "submit", submit)
    with pytest.raises(
        LaunchError, match=r"illegal option.*Queued before that and still there: 1.pbs1. Correct the cause"
    ):
        pipeline.submit_pipeline(later(pbs_run))
    assert pbs_run.jobs()["1.pbs1"]["name"] == "build-index" and not open_intents(pbs_run.run.jobs)
