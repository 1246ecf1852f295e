"""Quotas as the commands of sites print them."""

import os
from pathlib import Path

import pytest

from megatron_cpt.launch.planning import plan, quota

LUSTRE = """     /scratch
                 900000*  800000 1000000       -    1000       0       0       -
"""
LINUX = """Disk quotas for user me (uid 1):
     Filesystem   blocks   quota   limit   grace   files   quota   limit   grace
     {device}     2000       0    5000               1       0       0
     /dev/other   10         0      20               1       0       0
"""


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """Put commands that print a text on the PATH, and nothing else."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    (tmp_path / "bin").mkdir()

    def install(**texts: str) -> None:
        for name, text in texts.items():
            (tmp_path / "bin" / f"{name}.txt").write_text(text)
            path = tmp_path / "bin" / name
            path.write_text(f"#!/bin/sh\n/bin/cat {path}.txt\n")
            path.chmod(0o755)

    return install


def test_where_no_command_answers_there_is_no_quota(commands, tmp_path):
    assert quota.tightest_quota(tmp_path / "runs") is None
    commands(lfs="nothing to say\n", quota="Disk quotas for user me (uid 1): none\n")
    assert quota.tightest_quota(tmp_path) is None


def test_the_tightest_limit_counts_and_an_exceeded_one_leaves_nothing(commands, tmp_path):
    commands(lfs=LUSTRE)
    found = quota.tightest_quota(tmp_path / "not" / "yet")
    assert (found.used_bytes, found.limit_bytes, found.left_bytes) == (900000 << 10, 800000 << 10, 0)
    commands(lfs=LUSTRE.replace("800000 ", "0 "))
    assert quota.tightest_quota(tmp_path).left_bytes == 100000 << 10


def test_of_all_file_systems_the_run_directorys_own_counts(commands, tmp_path):
    device = max(
        (line.split()[:2] for line in Path("/proc/mounts").read_text().splitlines()),
        key=lambda mount: len(mount[1]) if tmp_path.resolve().is_relative_to(mount[1]) else 0,
    )[0]
    commands(quota=LINUX.format(device=device))
    assert quota.tightest_quota(tmp_path).left_bytes == 3000 << 10
    assert quota.tightest_quota(tmp_path).owner.startswith("user ")
    assert os.environ["PATH"].endswith("bin")


def test_a_plan_says_when_a_quota_is_too_small_for_the_checkpoints(monkeypatch):
    from megatron_cpt.config.loading.resolve import load_config
    from megatron_cpt.config.loading.sources import CHECKOUT

    config = load_config(CHECKOUT / "tasks/template", "llama3-8b", "50B").config
    limit = quota.Quota(owner="group team", used_bytes=0, limit_bytes=5 << 30)
    monkeypatch.setattr(plan, "tightest_quota", lambda path: limit)
    found = plan.plan_run(config)
    assert not found.fits_disk and found.room_bytes <= 5 << 30
    assert "quota of group team leaves 5.0 GiB  NOT ENOUGH" in plan.plan_text(found)
