"""The container files name what is there; they are not built by the tests (gigabytes, and a container engine)."""

import json
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROFILES = json.loads((ROOT / "installers/requirements/profiles.json").read_text())


def test_what_the_containerfile_runs_is_in_what_it_copies():
    text = (ROOT / "Containerfile").read_text()
    for path in re.findall(r"/opt/megatron-cpt/source/([\w./-]+)", text):
        assert (ROOT / path).is_file(), path
    assert re.search(r"^ARG PROFILE=(\w+)", text, re.MULTILINE)[1] in PROFILES
    ignored = (ROOT / ".containerignore").read_text().split()
    assert not {"installers", "megatron_cpt", "params", "pbs", "slurm", "tasks"} & set(ignored)
    assert (ROOT / ".dockerignore").read_text().split() == ignored


def test_what_the_apptainer_definition_copies_is_all_that_the_build_needs():
    text = (ROOT / "installers" / "apptainer.def").read_text()
    files = text.split("%files")[1].split("%post")[0].split()
    copied = dict(zip(files[::2], files[1::2]))
    assert all((ROOT / name).exists() for name in copied)
    assert all(target == f"/opt/megatron-cpt/source/{name}" for name, target in copied.items())
    shipped = re.findall(r'"(\w+)/', (ROOT / "setup.py").read_text())
    assert {"pyproject.toml", "setup.py", "LICENSE", "megatron_cpt", "installers", *shipped} <= set(copied)
    assert re.search(r"^    PROFILE=(\w+)", text, re.MULTILINE)[1] in PROFILES


def test_the_shell_of_both_parses():
    apptainer = (ROOT / "installers" / "apptainer.def").read_text()
    scripts = [apptainer.split("%post")[1].split("%environment")[0].replace("{{ PROFILE }}", "cpu")]
    joined = (ROOT / "Containerfile").read_text().replace("\\\n", " ")
    scripts += re.findall(r"^RUN (.*)$", joined, re.MULTILINE)
    assert len(scripts) == 3
    for script in scripts:
        answer = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True)
        assert answer.returncode == 0, answer.stderr
