"""Chains through a stand-in for PBS that follows what was seen on OpenPBS 23.06, its failure modes included."""

import dataclasses
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_cpt.errors import LaunchError
from megatron_cpt.launch.scheduler.choice import scheduler_of
from megatron_cpt.launch.scheduler.job import Dependency
from tests.cluster import pbs_stand_in
from tests.cluster.conftest import Cluster, stand_in_cluster, submit_chain, submit_stage

MPIRUN = f"""#!{sys.executable}
# Starts processes as mpirun does, all on this machine: mpirun -n N [options] --hostfile FILE PROGRAM ...
import os, subprocess, sys, time
words = sys.argv[1:]
count = int(words[words.index("-n") + 1])
hosts = open(words[words.index("--hostfile") + 1]).read().split()
assert len(set(hosts)) == 2, hosts
program = words[words.index("env"):]
kept = {{name: os.environ[name] for name in ("PATH", "HOME")}}  # as over ssh: nothing else gets there
ranks = [
    subprocess.Popen(program, env={{**kept, "OMPI_COMM_WORLD_RANK": str(rank), "OMPI_COMM_WORLD_SIZE": str(count),
                                   "OMPI_COMM_WORLD_LOCAL_RANK": str(rank)}})
    for rank in range(count)
]
while any(rank.poll() is None for rank in ranks):
    if any(rank.poll() for rank in ranks):
        [rank.terminate() for rank in ranks]
    time.sleep(0.05)
sys.exit(max(rank.wait() for rank in ranks))
"""
SITE = {
    "launch": {"scheduler": "pbs", "nodes": 2, "gpus_per_node": 1, "walltime": 300},
    "site": {
        "queue": "workq",
        "account": "group",
        "processes": "rank",
        "launcher": "mpirun -n {processes} --npernode {processes_per_node} --hostfile {hostfile}",
        "environment": {"FABRIC": "on"},
    },
}


@pytest.fixture
def pbs_run(tmp_path, monkeypatch) -> Iterator[Cluster]:
    """A run on the stand-in, two nodes, a rank each."""
    directory = tmp_path / "pbs"
    commands = pbs_stand_in.install(directory)
    (commands / "mpirun").write_text(MPIRUN)
    (commands / "mpirun").chmod(0o755)
    monkeypatch.setattr(pbs_stand_in, "ROOT", directory)
    monkeypatch.setenv("PBS_STAND_IN", str(directory))
    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
    yield stand_in_cluster(tmp_path / "cpt", monkeypatch, SITE)
    scheduler_of("pbs").cancel([path.name for path in (directory / "jobs").iterdir()])


def test_a_chain_goes_on_after_a_crash_and_ends_when_the_run_is_finished(pbs_run):
    pbs_run.behave(crash_at={"1": 25})
    python = Path(pbs_run.submission.python)
    first_line, rest = python.read_text().split("\n", 1)
    note = '[[ "$*" == "-m megatron_cpt train "* ]] && echo "$RANK $FABRIC $OMP_NUM_THREADS" >>"$0.seen"'
    python.write_text(f"{first_line}\n{note}\n{rest}")
    ids = submit_chain(pbs_run.submission, num_links=3)
    assert ids == ["0.pbs1", "1.pbs1", "2.pbs1"]
    states = pbs_run.wait(*ids)
    assert [state.state for state in states] == ["failed", "finished", "finished"], pbs_run.logs()
    jobs = pbs_run.jobs()
    assert jobs["0.pbs1"]["hosts"] == ["localhost", "node1"], "each host once"
    assert (jobs["1.pbs1"]["iteration_start"], jobs["1.pbs1"]["iteration_end"]) == (20, 40)
    assert (pbs_run.run.logs / "1.pbs1" / "rank_00001.log").exists()
    seen = python.with_name("python.seen").read_text().split("\n")[0].split()
    assert seen[1] == "on" and int(seen[2]) <= (os.cpu_count() or 1), "mpirun carried the site's variables, not 192"


def test_a_spare_node_takes_the_place_of_one_that_fails_the_preflight(pbs_run):
    python = Path(pbs_run.submission.python)
    seen, excluded = python.with_name("preflight_ran"), pbs_run.run.jobs / "excluded_nodes.txt"
    first_line, rest = python.read_text().split("\n", 1)
    stand_in = (
        'if [[ "$*" == "-m megatron_cpt preflight "* ]]; then\n'
        f"  mkdir {seen} 2>/dev/null || {{ [[ -e {seen}/done ]] && exit 0; sleep 2; exit 5; }}\n"
        f'  echo "localhost too slow" >>{excluded}; sleep 1; touch {seen}/done; exit 5\nfi\n'
    )
    python.write_text(f"{first_line}\n{stand_in}{rest}")
    submission = pbs_run.submission
    launch = dataclasses.replace(submission.loaded.config.launch, spare_nodes=1)
    loaded = dataclasses.replace(submission.loaded, config=dataclasses.replace(submission.loaded.config, launch=launch))
    site = dataclasses.replace(submission.site, preflight=True)
    (job,) = submit_chain(dataclasses.replace(submission, loaded=loaded, site=site))
    assert pbs_run.wait(job)[0].exit_code == 0, pbs_run.logs()
    assert pbs_run.jobs()[job]["hosts"] == ["node1", "node2"] and pbs_run.iteration() == 40


def test_a_failed_parent_deletes_its_dependents_and_status_says_so(pbs_run):
    parent = submit_stage(pbs_run.submission, "convert", ["show-config", "--task", "nowhere"])
    later = dataclasses.replace(pbs_run.submission, stamp="later")
    child = submit_stage(later, "report", ["show-config"], dependencies=[Dependency("afterok", (parent,))])
    states = pbs_run.wait(parent, child)
    assert [state.state for state in states] == ["failed", "cancelled"]
    assert states[1].reason == "deleted before it ran" and states[1].exit_code is None
    assert states[0].exit_code == 2


def test_what_pbs_would_take_and_delete_later_is_refused_beforehand(pbs_run):
    with pytest.raises(LaunchError, match="pbs knows no job 99.pbs1. The job would be deleted without a word"):
        submit_chain(dataclasses.replace(pbs_run.submission, depend="afterok:99.pbs1"))
    failed = submit_stage(pbs_run.submission, "convert", ["show-config", "--task", "nowhere"])
    pbs_run.wait(failed)
    with pytest.raises(LaunchError, match="has failed already"):
        submit_chain(dataclasses.replace(pbs_run.submission, depend=f"afterok:{failed}"))


def test_an_array_runs_every_part_and_counts_as_one_job(pbs_run):
    job = submit_stage(
        pbs_run.submission, "tokenize", ["show-config", "--task", "part-{array_index}-of-{num_array_tasks}"],
        num_array_tasks=3,
    )  # fmt: skip
    assert job == "0[].pbs1"
    assert pbs_run.wait(job)[0].state == "failed"
    logs = [(pbs_run.run.logs / job / f"task_0000{index}.log").read_text() for index in range(3)]
    assert all(f"--task part-{index}-of-3" in log for index, log in enumerate(logs)), logs
    tasks = {name: record for name, record in pbs_run.jobs().items() if "/" in name}
    assert len(tasks) == 3 and all(record["exit_code"] == 2 for record in tasks.values())


def test_deleting_a_running_link_lets_the_next_one_continue(pbs_run):
    pbs_run.behave(seconds=0.1)
    first, second = submit_chain(pbs_run.submission, num_links=2)
    pbs_run.until(lambda: pbs_run.iteration() >= 10)
    pbs_run.behave()
    scheduler_of("pbs").cancel([first])
    assert [state.state for state in pbs_run.wait(first, second)] == ["cancelled", "finished"], pbs_run.logs()
    assert pbs_run.jobs()[second]["iteration_start"] >= 10


@pytest.mark.parametrize(("queue_name", "message"), [("nowhere", "exit code 170: qsub: Unknown queue")])
def test_the_schedulers_own_refusal_is_shown(pbs_run, queue_name, message):
    site = dataclasses.replace(pbs_run.submission.site, queue=queue_name)
    with pytest.raises(LaunchError, match=message):
        submit_chain(dataclasses.replace(pbs_run.submission, site=site))


def test_the_stand_in_refuses_as_pbs_does(pbs_run, tmp_path):
    script = tmp_path / "job.sh"
    for text, options, code in (
        ("#PBS -l walltime=1h\n", [], 166),
        ("#PBS -q nowhere\n", [], 170),
        ("#PBS -Z x\n", [], 2),
        ("true\n#PBS -q nowhere\n", [], 0),
        ("true\n", ["-q", "nowhere"], 170),
    ):
        script.write_text(text)
        assert subprocess.run(["qsub", *options, str(script)], capture_output=True).returncode == code, text
    assert subprocess.run(["qsub", "/nowhere.sh"], capture_output=True).returncode == 1
    assert subprocess.run(["qsub", str(script), "argument"], capture_output=True).returncode == 2
