"""docs/clusters.md, command by command as it stands there, against a real Slurm."""

import contextlib
import os
import subprocess
import sys

import pytest

from megatron_cpt.launch.scheduler.choice import scheduler_of
from megatron_cpt.launch.scheduler.queue import ALIVE
from megatron_cpt.run.directory import RunDir
from megatron_cpt.run.ledger import read_jobs
from tests.cluster.conftest import ROOT
from tests.guide_scratch import build_scratch
from tests.test_guides import blocks, command_lines

pytestmark = [pytest.mark.cluster, pytest.mark.full, pytest.mark.timeout(300)]


@pytest.fixture
def login_node(slurm, tmp_path, monkeypatch):
    """A folder with the checkout's files and the demo's data, and `megatron-cpt` on the PATH."""
    root = tmp_path / "checkout"
    root.mkdir()
    with contextlib.chdir(root):
        build_scratch(root)
    for name in ("tools", "pbs", "slurm", "megatron_cpt", "params"):
        (root / name).symlink_to(ROOT / name)
    (root / "tasks" / "demo").symlink_to(ROOT / "tasks" / "demo")
    commands = root / "commands"
    commands.mkdir()
    (commands / "megatron-cpt").write_text(
        f'#!/usr/bin/env bash\nPYTHONPATH="{ROOT}" exec {sys.executable} -m megatron_cpt "$@"\n'
    )
    (commands / "megatron-cpt").chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
    monkeypatch.chdir(root)
    yield root
    scheduler_of("slurm").cancel(
        [job for ledger in root.glob("runs/**/jobs") for job in read_jobs(ledger) if job.isdigit()]
    )


def test_the_walk_through_goes_from_a_site_file_to_a_queued_chain(login_node):
    outputs = {}
    for block in blocks(ROOT / "docs" / "clusters.md"):
        assert block.reason is None, "every command of this page is run"
        for line in command_lines(block.text):
            answer = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=120)
            assert answer.returncode == 0, f"$ {line}\n{answer.stdout[-2000:]}\n{answer.stderr[-2000:]}"
            outputs[line] = answer.stdout
    (shown,) = (text for line, text in outputs.items() if "--dry-run" in line)
    assert shown.count("$ sbatch --parsable") >= 5 and "--kill-on-invalid-dep=yes" in shown
    (submitted,) = (text for line, text in outputs.items() if "--chain 3" in line)
    ids = submitted.split()
    run = RunDir(login_node / "runs/demo/demo-5m/300K/base")
    links = [job for job, record in read_jobs(run.jobs).items() if record.get("name") == "train"]
    assert len(links) == 3 and set(links) < set(ids)
    states = scheduler_of("slurm").states(links)
    assert all(state.state in ALIVE for state in states.values()), states
    assert "train" in outputs["megatron-cpt status --runs runs"]
