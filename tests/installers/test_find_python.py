"""Finding a Python: which of several is taken, and what is said when there is none."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "installers" / "find_python.sh"
RIGHT = 'echo "$0"'
TOO_OLD = 'echo "$0"; exit 1'
FAILING_SHIM = 'echo "pyenv: python3.12: command not found" >&2; exit 127'


@pytest.fixture
def machine(tmp_path):
    """A machine with the given programs on PATH and pyenv versions: a function that runs the script on it."""
    for folder in ("bin", "pyenv/versions"):
        (tmp_path / folder).mkdir(parents=True)
    for tool in ("bash", "env"):
        (tmp_path / "bin" / tool).symlink_to(shutil.which(tool))

    def run(programs: dict[str, str], **variables: str) -> subprocess.CompletedProcess[str]:
        for name, body in programs.items():
            program = tmp_path / name
            program.parent.mkdir(parents=True, exist_ok=True)
            program.write_text(f"#!/usr/bin/env bash\n{body}\n")
            program.chmod(0o755)
        environment = {"PATH": str(tmp_path / "bin"), "PYENV_ROOT": str(tmp_path / "pyenv"), "HOME": str(tmp_path)}
        return subprocess.run(["bash", SCRIPT], env=environment | variables, capture_output=True, text=True, timeout=60)

    return run


def test_python_3_12_on_path_is_preferred(machine):
    answer = machine({"bin/python3.12": RIGHT, "bin/python3.13": RIGHT, "bin/python3": RIGHT})
    assert answer.stdout.strip().endswith("bin/python3.12")


def test_a_pyenv_shim_that_fails_is_passed_over_for_the_version_itself(machine):
    answer = machine({"bin/python3.12": FAILING_SHIM, "pyenv/versions/3.12.1/bin/python3": RIGHT})
    assert answer.stdout.strip().endswith("pyenv/versions/3.12.1/bin/python3")


def test_python3_is_taken_where_it_is_new_enough(machine):
    assert machine({"bin/python3": RIGHT}).stdout.strip().endswith("bin/python3")


def test_the_python_that_uv_knows_is_the_last_resort(machine, tmp_path):
    answer = machine({"bin/python3": TOO_OLD, "bin/uv": f"echo {tmp_path}/uv-python", "uv-python": RIGHT})
    assert answer.stdout.strip() == f"{tmp_path}/uv-python"


def test_without_a_new_enough_python_it_says_what_to_install(machine):
    answer = machine({"bin/python3": TOO_OLD, "pyenv/versions/3.11.7/bin/python3": RIGHT})
    assert answer.returncode == 2
    assert "no Python 3.12 or 3.13" in answer.stderr
    assert "apt-get install python3" in answer.stderr


def test_a_named_python_that_is_too_old_is_not_replaced_by_another(machine):
    answer = machine({"bin/python3.12": RIGHT, "bin/mine": TOO_OLD}, PYTHON="mine")
    assert answer.returncode == 2
    assert "in mine" in answer.stderr


def test_it_finds_a_python_on_this_machine():
    answer = subprocess.run([SCRIPT], env=dict(os.environ), capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    assert Path(answer.stdout.strip()).exists()
