"""The package outside its checkout: a wheel, installed into an empty folder, finds what comes with it."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Return the wheel, built from a copy of the tracked files with the build tools of this environment."""
    folder = tmp_path_factory.mktemp("wheel")
    names = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT, capture_output=True, check=True,
    ).stdout.split(b"\0")  # fmt: skip
    source = folder / "source"
    for name in filter(None, map(os.fsdecode, names)):
        if name.startswith(("tests/", "docs/")) or not (ROOT / name).is_file():
            continue
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, source]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """Return a folder with the package in it and nothing else; the dependencies are this environment's."""
    target = tmp_path_factory.mktemp("site") / "packages"
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", target, wheel]
    answer = subprocess.run(command, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    return target


def call(installed: Path, here: Path, *words: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(installed), "MEGATRON_CPT_ACCOUNT": "mine"}
    command = [sys.executable, "-m", "megatron_cpt", *words]
    return subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True, timeout=240)


@pytest.mark.full
def test_what_comes_with_the_package_is_in_the_wheel(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    for path in (
        "megatron_cpt/py.typed", "megatron_cpt/shipped/params/llama3-8b.yaml", "megatron_cpt/shipped/slurm/job.sh.in",
        "megatron_cpt/shipped/pbs/sites/abci.yaml", "megatron_cpt/shipped/tasks/template/task.yaml",
        "megatron_cpt/evaluate/page/assets/uPlot.iife.min.js", "megatron_cpt/evaluate/page/assets/uPlot.LICENSE",
        "megatron_cpt/evaluate/page/assets/report.html.j2",
    ):  # fmt: skip
        assert path in names
    for folder in ("params", "pbs/sites", "slurm/sites"):
        there = {path.name for path in (ROOT / folder).glob("*.yaml")}
        assert {Path(name).name for name in names if f"shipped/{folder}/" in name} == there


@pytest.mark.full
def test_an_installed_package_works_in_an_empty_folder(installed, tmp_path):
    shown = call(installed, tmp_path, "show-config", "--task", "template", "--params", "llama3-8b", "--size", "50B")
    assert shown.returncode == 0, shown.stderr
    assert "num_layers: 32  # params/llama3-8b.yaml" in shown.stdout

    missing = call(installed, tmp_path, "show-config", "--task", "template", "--params", "llama9", "--size", "50B")
    assert missing.returncode == 2
    assert f"{installed}/megatron_cpt/shipped/params" in missing.stderr

    made = call(installed, tmp_path, "init", "first", "--model", "tiny")
    assert made.returncode == 0, made.stderr
    planned = call(installed, tmp_path, "plan", "first")
    assert planned.returncode == 0, planned.stderr
    assert "196 iterations" in planned.stdout

    made = call(installed, tmp_path, "init", "second", "--model", "tiny", "--site", "leonardo")
    assert made.returncode == 0, made.stderr
    site = call(installed, tmp_path, "submit", "pipeline", "second", "--site", "leonardo", "--dry-run")
    assert site.returncode == 0, site.stderr
    assert "#SBATCH" in site.stdout and "tokenize" in site.stdout


@pytest.mark.full
def test_a_users_own_files_win(installed, tmp_path):
    (tmp_path / "params").mkdir()
    (tmp_path / "params" / "llama3-8b.yaml").write_text(
        (ROOT / "params" / "llama3-8b.yaml").read_text().replace("lr: 3e-5", "lr: 7e-5")
    )
    words = ("show-config", "--task", "template", "--params", "llama3-8b", "--size", "50B")
    assert "lr: 7.0e-05" in call(installed, tmp_path, *words).stdout
