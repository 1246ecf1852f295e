"""When a chain goes on, ends or breaks; what a job does on its nodes."""

import os
import socket
import sys
from pathlib import Path

import pytest

from megatron_cpt.errors import LaunchError
from megatron_cpt.launch.node import hosts
from megatron_cpt.launch.node import supervisor as batch
from megatron_cpt.launch.node.chain import chain_verdict
from megatron_cpt.launch.node.processes import Outcome, _outcome
from megatron_cpt.launch.node.torchrun import node_rank
from megatron_cpt.run.ledger import read_jobs
from megatron_cpt.run.lock import run_lock


def link(start: int, state: str = "failed", exit_code: int = 1) -> dict:
    return {"iteration_start": start, "state": state, "exit_code": exit_code}


@pytest.mark.parametrize(
    ("links", "iteration", "verdict"),
    [
        ([], 0, "run"),
        ([link(0, "stopped", 0)], 40, "run"),
        ([link(0)], 0, "run"),
        ([link(0), link(0)], 0, "broken"),
        ([link(0), link(0)], 10, "run"),
        ([link(0), link(20), link(20)], 20, "broken"),
        ([link(0), link(0, "finished", 0), link(0)], 0, "run"),
        ([link(0, "running"), link(0, "running")], 0, "broken"),
        ([link(0, "failed", 2)], 0, "broken"),
        ([link(0), link(0)], 100, "finished"),
    ],
)
def test_a_chain_breaks_on_failures_without_progress_and_on_mistakes(tmp_path, links, iteration, verdict):
    found, reason = chain_verdict(links, iteration=iteration, train_iters=100, run_path=tmp_path, max_failures=2)
    assert found == verdict, reason


def test_a_stop_file_stops_the_chain_unless_it_is_finished(tmp_path):
    (tmp_path / "stop_chain").touch()
    options = {"train_iters": 100, "run_path": tmp_path, "max_failures": 2}
    assert chain_verdict([], iteration=50, **options)[0] == "stopped"
    assert chain_verdict([], iteration=100, **options)[0] == "finished"


def test_hosts_that_repeat_in_a_node_file_count_once_and_keep_their_order(tmp_path):
    nodes = tmp_path / "nodes"
    nodes.write_text("b\nb\na\nb\na\n")
    assert hosts.job_hosts({"PBS_NODEFILE": str(nodes)}) == ["b", "a"]
    assert hosts.job_hosts({}) == [socket.gethostname()]


def test_bad_hosts_give_their_place_to_spare_ones_and_train_only_where_there_are_too_few(tmp_path, caplog):
    assert hosts.training_hosts(["a", "b", "c", "d"], ["b", "x"], 3) == ["a", "c", "d"]
    assert hosts.training_hosts(["a", "b", "c", "d"], [], 2) == ["a", "b"]
    assert not caplog.records
    assert hosts.training_hosts(["a", "b", "c"], ["a", "b"], 2) == ["a", "c"]
    assert "a: bad nodes train" in caplog.text
    with pytest.raises(LaunchError, match="a, b: 2 hosts, 3 are needed"):
        hosts.training_hosts(["a", "b"], [], 3)
    (tmp_path / "nodes").write_text("a\na\nb\nb\nc\nc\n")
    hosts.write_hostfile(tmp_path / "hostfile", ["a", "c"], tmp_path / "nodes")
    assert (tmp_path / "hostfile").read_text() == "a\na\nc\nc\n"


def test_ports_follow_from_the_job_and_move_when_taken():
    ports = {batch.rendezvous_port(job, attempt) for job in ("17.pbs1", "18.pbs1", "17") for attempt in range(4)}
    assert len(ports) == 8 and all(15000 <= port < 30000 for port in ports)
    assert batch.rendezvous_port("20[].pbs1", 0) == batch.rendezvous_port("20", 0)


def run_batch(tmp_path: Path, monkeypatch, launcher: str, *options: str, program: str = "pass") -> int:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setattr(batch, "configure_logging", lambda: None)  # it would keep this test's stderr beyond the test
    monkeypatch.delenv("SLURM_JOB_NODELIST", raising=False)
    arguments = ["--run", str(tmp_path), "--stage", "train", "--log-dir", str(tmp_path / "logs"), "--processes", "rank"]
    arguments += ["--launcher", launcher, *options, "--", sys.executable, "-c", program]
    return batch.main(arguments)


def test_a_taken_rendezvous_port_is_tried_again_elsewhere(tmp_path, monkeypatch):
    launcher = tmp_path / "launcher"
    launcher.write_text(
        f'#!/bin/bash\necho "$@" >>{tmp_path}/calls\n'
        f"if [[ $(wc -l <{tmp_path}/calls) -lt 3 ]]; then echo 'EADDRINUSE: address already in use'; exit 1; fi\n"
        'exec "$@"\n'
    )
    launcher.chmod(0o755)
    assert run_batch(tmp_path, monkeypatch, str(launcher), program="print('trained')") == 0
    calls = (tmp_path / "calls").read_text().splitlines()
    assert len({call.split("MASTER_PORT=")[1].split()[0] for call in calls}) == 3
    assert (tmp_path / "logs" / "rank_00000.log").read_text() == "trained\n"


def test_a_rank_gets_its_environment_through_launchers_that_carry_none(tmp_path, monkeypatch):
    monkeypatch.setenv("FABRIC", "fast and wide")
    monkeypatch.setenv("OMP_NUM_THREADS", "192")
    program = "import os; print(os.environ['FABRIC'], os.environ['MASTER_ADDR'], os.environ['OMP_NUM_THREADS'])"
    assert run_batch(tmp_path, monkeypatch, "env -i", "--forward", "FABRIC", program=program) == 0
    words = (tmp_path / "logs" / "rank_00000.log").read_text().split()
    assert words[:4] == ["fast", "and", "wide", socket.gethostname()] and int(words[4]) <= (os.cpu_count() or 1)


def test_fewer_hosts_than_nodes_is_one_clear_line(tmp_path, monkeypatch, capsys):
    assert run_batch(tmp_path, monkeypatch, "env", "--nodes", "2") == 1
    assert "1 hosts, 2 are needed" in capsys.readouterr().err
    assert read_jobs(tmp_path / "jobs")["7"]["state"] == "failed"


@pytest.mark.parametrize(
    ("log", "outcome"),
    [
        ("srun: error: n1: task 3: Exited with exit code 2\n", Outcome(2, failed_rank=3)),
        ("  Process name: [[1,1],5]\n  Exit code:    2\n", Outcome(2, failed_rank=5)),
        ("x1: rank 4 exited with code 1\n", Outcome(1, failed_rank=4)),
        ("$ python -m torch.distributed.run\nsrun: error: n1: task 1: Exited with exit code 1\n", Outcome(9)),
        ("Root Cause (first):\n[0]:\n  time : x\n  rank      : 6 (local_rank: 2)\n  exitcode  : -9 (pid: 1)\n",
         Outcome(137, failed_rank=6)),
        ("Failures:\n  rank      : 1 (local_rank: 1)\n  exitcode  : -9 (pid: 2)\n  rank      : 2 (local_rank: 2)\n"
         "  exitcode  : -15 (pid: 3)\nRoot Cause:\n  rank      : 0 (local_rank: 0)\n  exitcode  : 1 (pid: 1)\n",
         Outcome(137, failed_rank=1)),
        ("Failures:\n  rank      : 1 (local_rank: 1)\n  exitcode  : -9 (pid: 2)\nRoot Cause:\n"  # it stalled and did not end
         "  rank      : 0 (local_rank: 0)\n  exitcode  : 85 (pid: 1)\n", Outcome(85, failed_rank=0)),
        ("RuntimeError: EADDRINUSE", Outcome(9, port_taken=True)),
    ],
)  # fmt: skip
def test_the_first_failing_rank_is_read_from_each_launchers_words(log, outcome):
    assert _outcome(9, log) == outcome


def test_a_nodes_rank_comes_from_its_launcher():
    assert node_rank({"SLURM_NODEID": "3"}) == 3 and node_rank({"PMI_RANK": "0"}) == 0
    with pytest.raises(LaunchError, match="srun or mpirun must start one process per node"):
        node_rank({})


def test_a_link_waits_for_a_lock_whose_owner_died_on_another_machine(tmp_path):
    path = tmp_path / "lock.json"
    path.write_text('{"owner": "old", "host": "gone", "pid": 1, "since": 1, "expiry_seconds": 0.5}')
    with pytest.raises(LaunchError, match="held by old"), run_lock(path, "new"):
        pass
    with run_lock(path, "new", wait_seconds=5):
        assert "new" in path.read_text()
