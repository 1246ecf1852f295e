"""The lock files and profiles: complete, hashed, and free of addresses."""

import importlib
import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
REQUIREMENTS = ROOT / "installers" / "requirements"


@pytest.fixture
def profiles(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "installers"))
    return importlib.import_module("profiles")


def locked(name: str) -> dict[str, str]:
    return dict(re.findall(r"^([\w.-]+)==(\S+) \\\n(?:    --hash=sha256:[0-9a-f]{64}\b)", text(name), re.MULTILINE))


def text(name: str) -> str:
    return (REQUIREMENTS / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["cpu", "dev", "cuda13"])
def test_every_locked_package_has_a_hash_and_no_address_is_written(name):
    assert len(locked(f"{name}.txt")) == text(f"{name}.txt").count("==")
    assert "://" not in text(f"{name}.txt")


@pytest.mark.parametrize("name", ["cpu", "dev", "cuda13"])
def test_what_a_person_pins_is_what_is_locked(name):
    pins = locked(f"{name}.txt")
    lines = [line for line in text(f"{name}.in").splitlines() if line and not line.startswith("#")]
    for requirement in map(Requirement, lines):
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), requirement


def test_the_additions_repeat_no_package():
    assert not locked("cpu.txt").keys() & (locked("dev.txt").keys() | locked("cuda13.txt").keys())


def test_the_package_declares_nothing_that_is_not_locked_but_wandb():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    groups = project["optional-dependencies"]
    extra = [name for group, names in groups.items() if group != "wandb" for name in names]
    assert {"fast-tokenizers", "muon", "wandb"} == groups.keys()
    pins = locked("cpu.txt")
    for requirement in map(Requirement, [*project["dependencies"], *extra]):
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), requirement


def test_a_profile_with_the_sites_torch_installs_neither_torch_nor_cuda(profiles):
    names = {line.split("==")[0] for line in profiles.load_profile("aurora-like").wheels_text().splitlines()}
    assert "megatron-core" in names
    assert not [name for name in names if name == "torch" or name.startswith(("nvidia", "cuda"))]


def test_every_profile_names_files_that_exist(profiles):
    for name, profile in profiles.load_profiles().items():
        assert profile.about, name
        assert all(file.is_file() for file in profile.files()), name


def test_an_unknown_profile_is_answered_with_the_known_ones(profiles):
    with pytest.raises(profiles.InstallError, match="'rocm' is not known. Use one of cpu, dev, cuda13, abci"):
        profiles.load_profile("rocm")
