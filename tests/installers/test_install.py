"""install.sh and run_setup.sh: arguments, errors, and the job that is submitted."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

INSTALLERS = Path(__file__).resolve().parents[2] / "installers"


def run(script: str, *arguments: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PATH": f"{path}:{os.environ['PATH']}" if path else os.environ["PATH"]}
    return subprocess.run(
        [INSTALLERS / script, *arguments], capture_output=True, text=True, env=environment, timeout=60
    )


def fake(folder: Path, name: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("#!/usr/bin/env bash\nprintf '%s\\n' \"$@\"\n")
    (folder / name).chmod(0o755)


def test_offline_without_a_bundle_says_how_to_make_one(tmp_path):
    answer = run("install.sh", str(tmp_path / "env"), "--offline")
    assert answer.returncode == 2
    assert "no bundle" in answer.stderr
    assert "--download-only" in answer.stderr


def test_an_unknown_profile_ends_with_one_line(tmp_path):
    answer = run("install.sh", str(tmp_path / "env"), "--profile", "rocm")
    assert answer.returncode == 2
    assert answer.stderr.startswith("--profile: 'rocm' is not known")
    assert answer.stderr.count("\n") == 1


def test_help_lists_the_profiles():
    answer = run("install.sh", "--help")
    assert answer.returncode == 0
    assert all(profile in answer.stdout for profile in ("cpu", "cuda13", "abci", "aurora-like", "leonardo"))


def test_run_setup_submits_to_pbs_with_options_and_a_target_with_spaces(tmp_path):
    fake(tmp_path / "bin", "qsub")
    target = tmp_path / "my env"
    answer = run("run_setup.sh", str(target), "--profile", "abci", "--", "-P", "group", path=tmp_path / "bin")
    words = answer.stdout.splitlines()
    assert words[words.index("-P") + 1] == "group"
    assert words[words.index("-o") + 1] == str(target / "setup.log")
    assert words[words.index("--") + 1 :] == [str(INSTALLERS / "install.sh"), str(target), "--profile", "abci"]
    assert target.is_dir(), "the log's folder exists before the job does"


def test_run_setup_submits_to_slurm_what_a_shell_reads_back_unchanged(tmp_path):
    fake(tmp_path / "bin", "sbatch")
    if shutil.which("qsub"):
        pytest.skip("this machine has PBS, which is asked first")
    target = tmp_path / "my env"
    answer = run("run_setup.sh", str(target), "--profile", "leonardo", "--", "--account", "me", path=tmp_path / "bin")
    words = answer.stdout.splitlines()
    assert words[words.index("--account") + 1] == "me"
    line = words[words.index("--wrap") + 1]
    read_back = subprocess.run(
        ["bash", "-c", f"printf '%s\\n' {line}"], capture_output=True, text=True
    ).stdout.splitlines()
    assert read_back == [str(INSTALLERS / "install.sh"), str(target), "--profile", "leonardo"]


def test_run_setup_without_a_target_shows_its_usage():
    answer = run("run_setup.sh")
    assert answer.returncode == 2
    assert "Usage: installers/run_setup.sh TARGET_DIR" in answer.stdout
