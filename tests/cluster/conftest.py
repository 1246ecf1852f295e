"""A real Slurm for the session, and runs whose training is a stand-in that takes a second."""

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from megatron_cpt.config.loading.resolve import load_config
from megatron_cpt.launch.scheduler import queue
from megatron_cpt.launch.scheduler.choice import scheduler_of
from megatron_cpt.launch.scheduler.site import read_site
from megatron_cpt.launch.submission.chain import submit_training
from megatron_cpt.launch.submission.executor import executor_of
from megatron_cpt.launch.submission.submit import Submission
from megatron_cpt.launch.submission.work import Work
from megatron_cpt.run.directory import RunDir, run_dir
from megatron_cpt.run.ledger import read_jobs
from tests.cluster import loopback_slurm

ROOT = Path(__file__).resolve().parents[2]
STAND_IN = """
import json, os, sys, time
from pathlib import Path
run = Path({run!r})
if os.environ.get("RANK", "0") != "0":
    while not (run / "rank0_done").exists():
        time.sleep(0.05)
    sys.exit(0)
(run / "rank0_done").unlink(missing_ok=True)
tracker = run / "checkpoints" / "latest_checkpointed_iteration.txt"
tracker.parent.mkdir(exist_ok=True)
iteration = int(tracker.read_text()) if tracker.exists() else 0
print("start at", iteration, flush=True)
behaviour = json.loads((run / "behaviour.json").read_text())
starts = behaviour["starts"] = behaviour.get("starts", 0) + 1
(run / "behaviour.json").write_text(json.dumps(behaviour))
while iteration < 40:
    time.sleep(behaviour.get("seconds", 0.02))
    iteration += 1
    if iteration == behaviour.get("crash_at", {{}}).get(str(starts)):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    if iteration % 10 == 0:
        tracker.write_text(str(iteration))
    if (run / "stop_now").exists():
        (run / "stop_now").unlink()
        tracker.write_text(str(iteration))
        print("stopped at", iteration, flush=True)
        break
(run / "rank0_done").touch()
"""
PARAMS = {
    "model": {
        "num_layers": 2,
        "hidden_size": 32,
        "ffn_hidden_size": 64,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "vocab_size": 500,
        "max_position_embeddings": 64,
        "make_vocab_size_divisible_by": 4,
    },
    "training": {"seq_length": 32, "micro_batch_size": 2, "global_batch_size": 4, "precision": "fp32"},
    "optimizer": {"lr": 1e-3},
    "checkpoint": {"save_interval": 20},
    "logging": {"tensorboard": False},
}


@pytest.fixture(scope="session")
def slurm(tmp_path_factory):
    """Environment of a loopback Slurm with two nodes; skips where it cannot be had."""
    reason = loopback_slurm.why_not()
    if reason:
        pytest.skip(reason)
    directory = tmp_path_factory.mktemp("slurm")
    environment = loopback_slurm.start(directory, 2, outlive=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", environment["SLURM_CONF"])
        patch.setenv("PATH", environment["PATH"])
        try:
            yield environment
        finally:
            loopback_slurm.stop(directory)


@dataclass
class Cluster:
    """One run on a scheduler, with what tests ask of it."""

    submission: Submission
    run: RunDir

    def behave(self, **behaviour) -> None:
        """Tell the stand-in for training what to do."""
        (self.run.path / "behaviour.json").write_text(json.dumps(behaviour))

    def wait(self, *ids: str, seconds: float = 120) -> list[queue.JobState]:
        """Return the states of jobs once none may run any more."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            states = scheduler_of(self.submission.scheduler).states(ids)
            if all(state.state not in queue.ALIVE for state in states.values()):
                return [states[job] for job in ids]
            time.sleep(0.2)
        raise AssertionError(f"still there after {seconds} s: {scheduler_of(self.submission.scheduler).states(ids)}")

    def until(self, condition, seconds: float = 60) -> None:
        """Wait until `condition()` is true."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, self.logs()
            time.sleep(0.05)

    def iteration(self) -> int:
        """Return the newest checkpoint's iteration."""
        path = self.run.checkpoints / "latest_checkpointed_iteration.txt"
        return int(path.read_text() or 0) if path.exists() else 0

    def jobs(self) -> dict[str, dict]:
        """Return the ledger."""
        return read_jobs(self.run.jobs)

    def logs(self) -> str:
        """Return everything that the jobs wrote."""
        paths = sorted(path for path in self.run.logs.rglob("*") if path.is_file() and not path.parent.is_symlink())
        return "".join(f"== {path.parent.name}/{path.name}\n{path.read_text()[-3000:]}" for path in paths)


def make_task(folder: Path, site: dict, **sections) -> list[str]:
    """Write a task, params and a site file into `folder`; return the arguments that name the run."""
    (folder / "tasks" / "t").mkdir(parents=True)
    task = {
        "paths": {"runs_dir": str(folder / "runs"), "data_dir": str(folder / "data")},
        "sizes": {"S": {"training": {"train_iters": 40}}},
        "variants": {"main": {}},
        "data": {"tokenizer": "tokenizer"},
        **sections,
    }
    (folder / "tasks" / "t" / "task.yaml").write_text(yaml.safe_dump(task))
    (folder / "params.yaml").write_text(yaml.safe_dump(PARAMS))
    (folder / "site.yaml").write_text(yaml.safe_dump(site))
    names = ["--task", str(folder / "tasks/t"), "--params", str(folder / "params.yaml"), "--size", "S"]
    return [*names, "--variant", "main", "--site", str(folder / "site.yaml")]


def stand_in_cluster(tmp_path: Path, monkeypatch, site: dict) -> Cluster:
    """Return a run whose `megatron-cpt train` is the stand-in; its data is not looked at."""
    names = make_task(tmp_path, site, data={"mix": {"D": 1.0}, "corpora": {"D": {"tokens": ["x"]}}})
    loaded = load_config(tmp_path / "tasks/t", str(tmp_path / "params.yaml"), "S", "main", tmp_path / "site.yaml")
    run = RunDir(run_dir(loaded.config).path)
    run.path.mkdir(parents=True)
    program, python = tmp_path / "stand_in.py", tmp_path / "python"
    program.write_text(STAND_IN.format(run=str(run.path)))
    python.write_text(
        f'#!/bin/bash\n[[ "$*" == "-m megatron_cpt train "* ]] && exec {sys.executable} {program}\n'
        f'exec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    monkeypatch.setattr("megatron_cpt.launch.submission.chain.training_problems", lambda *_, **__: [])
    site_values = read_site(tmp_path / "site.yaml", {})
    submission = Submission(
        loaded=loaded, site=site_values, run_arguments=tuple(names), python=str(python), work_dir=tmp_path
    )
    cluster = Cluster(submission, run)
    cluster.behave()
    return cluster


def submit_chain(submission: Submission, **options) -> list[str]:
    """Submit training; return the ids."""
    return list(submit_training(submission, **options).ids)


def submit_stage(submission: Submission, stage: str, words: list[str], dependencies=(), num_array_tasks=None) -> str:
    """Submit one stage that runs once, or as an array; return its id."""
    work = Work(name=stage, stage=stage, words=tuple(words), num_array_tasks=num_array_tasks)
    return executor_of(submission).submit(work, dependencies)


@pytest.fixture
def make_run():
    """Return `make_task`."""
    return make_task


@pytest.fixture
def slurm_run(slurm, tmp_path, monkeypatch) -> Cluster:
    """A run on the loopback Slurm, two nodes, a rank each."""
    site = {
        "launch": {"scheduler": "slurm", "nodes": 2, "gpus_per_node": 1, "walltime": 300},
        "site": {
            "queue": "debug",
            "processes": "rank",
            "launcher": "srun --kill-on-bad-exit=1 --nodes={nodes} --ntasks={processes}",
            "signal_seconds": 60,
        },
    }
    return stand_in_cluster(tmp_path, monkeypatch, site)


def command(*words: str) -> subprocess.CompletedProcess[str]:
    """Run a scheduler's command."""
    return subprocess.run(words, capture_output=True, text=True, check=True, timeout=60)
