"""Building an environment from locked wheels: tiny wheels in a folder stand for the index."""

import base64
import hashlib
import importlib
import multiprocessing
import subprocess
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

BACKEND = '''
"""A build backend that makes an empty editable wheel."""
import base64, hashlib, zipfile
def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    name = "checkout-1.0-py3-none-any.whl"
    files = {
        "checkout.pth": "",
        "checkout-1.0.dist-info/METADATA": "Metadata-Version: 2.1\\nName: checkout\\nVersion: 1.0\\n",
        "checkout-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n",
    }
    files["checkout-1.0.dist-info/RECORD"] = "".join(f"{file},,\\n" for file in files)
    with zipfile.ZipFile(f"{wheel_directory}/{name}", "w") as wheel:
        for file, text in files.items():
            wheel.writestr(file, text)
    return name
build_wheel = build_editable
'''


@pytest.fixture
def environment(monkeypatch, tmp_path_factory):
    """The module, with a small project in place of this checkout."""
    monkeypatch.syspath_prepend(str(ROOT / "installers"))
    for variable in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS"):
        monkeypatch.delenv(variable, raising=False)
    module = importlib.import_module("environment")
    project = tmp_path_factory.mktemp("project")
    (project / "backend.py").write_text(BACKEND)
    (project / "pyproject.toml").write_text(
        '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    )
    monkeypatch.setattr(module, "REPOSITORY", project)
    return module


@pytest.fixture
def bundle(tmp_path):
    """A folder with the wheels alpha 1.0 and beta 2.0."""
    folder = tmp_path / "bundle"
    folder.mkdir()
    make_wheel(folder, "alpha", "1.0")
    make_wheel(folder, "beta", "2.0")
    return folder


def make_wheel(folder: Path, name: str, version: str) -> None:
    info = f"{name}-{version}.dist-info"
    files = {
        f"{name}/__init__.py": f"__version__ = '{version}'\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = ""
    for file, text in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).decode().rstrip("=")
        record += f"{file},sha256={digest},{len(text)}\n"
    files[f"{info}/RECORD"] = record + f"{info}/RECORD,,\n"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        for file, text in files.items():
            wheel.writestr(file, text)


def lock(environment, monkeypatch, bundle: Path, *names: str, spoil: bool = False):
    """Return a profile whose lock file names wheels of the bundle, in place of the real ones."""
    lines = []
    for wheel in sorted(bundle.glob("*.whl")):
        name, version, *_ = wheel.name.split("-")
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
        if name in names:
            lines.append(f"{name}=={version} \\\n    --hash=sha256:{'0' * 64 if spoil else digest}\n")
    (bundle / "locked.txt").write_text("# a lock file\n" + "".join(lines))
    profiles = importlib.import_module("profiles")
    monkeypatch.setattr(profiles, "REQUIREMENTS", bundle)
    return profiles.Profile(about="test", requirements=("locked.txt",))


def without_ensurepip(environment, monkeypatch) -> None:
    """Be a Debian without python3-venv but with python3-pip, which is also quicker."""
    monkeypatch.setattr(environment, "missing_module", lambda name: name == "ensurepip")


def version_in(venv: Path, name: str) -> str:
    command = [str(venv / "bin" / "python"), "-c", f"import {name}; print({name}.__version__)"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def test_an_environment_is_built_kept_extended_and_repaired(environment, monkeypatch, bundle, tmp_path, capsys):
    without_ensurepip(environment, monkeypatch)
    venv = tmp_path / "target" / "venv"
    environment.build(venv, lock(environment, monkeypatch, bundle, "alpha"), bundle)
    assert (version_in(venv, "alpha"), version_in(venv, "beta")) == ("1.0", "")
    assert "is ready" in capsys.readouterr().err

    environment.build(venv, lock(environment, monkeypatch, bundle, "alpha"), bundle)
    assert capsys.readouterr().err == "", "a second call has nothing to do"

    both = lock(environment, monkeypatch, bundle, "alpha", "beta")
    environment.build(venv, both, bundle)
    assert version_in(venv, "beta") == "2.0"

    (site,) = environment.site_packages(venv)
    (site / "alpha" / "__init__.py").unlink()  # what a killed installation leaves
    (venv / environment.STAMP).unlink()
    environment.build(venv, both, bundle)
    assert "alpha-1.0.dist-info is incomplete" in capsys.readouterr().err
    assert version_in(venv, "alpha") == "1.0"

    (venv / "bin" / "python").unlink()
    environment.build(venv, both, bundle)
    assert "building it anew" in capsys.readouterr().err
    assert version_in(venv, "alpha") == "1.0"


def test_a_wheel_with_another_hash_is_refused_and_the_environment_not_declared_ready(
    environment, monkeypatch, bundle, tmp_path
):
    without_ensurepip(environment, monkeypatch)
    venv = tmp_path / "venv"
    spoiled = lock(environment, monkeypatch, bundle, "alpha", spoil=True)
    with pytest.raises(environment.InstallError, match=r"(?s)HASHES.*failed at installing 1 package\b.*run again"):
        environment.build(venv, spoiled, bundle)
    assert not (venv / environment.STAMP).exists()
    assert version_in(venv, "alpha") == ""


def test_a_python_without_pip_and_ensurepip_is_told_the_debian_package(environment, monkeypatch, tmp_path):
    monkeypatch.setattr(environment, "missing_module", lambda name: True)
    with pytest.raises(environment.InstallError, match="apt-get install python3-venv"):
        environment.create_venv(tmp_path / "venv")
    assert not (tmp_path / "venv").exists()


def test_source_archives_without_a_cuda_compiler_say_what_to_load(environment, monkeypatch, tmp_path):
    profiles = importlib.import_module("profiles")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    with pytest.raises(environment.InstallError, match=r"nvcc: .*module load cuda.*--profile cpu"):
        environment.install_source(tmp_path, profiles.load_profile("abci"), None)


def hold(installers: str, folder: str, ready, release) -> None:
    import sys

    sys.path.insert(0, installers)
    environment = importlib.import_module("environment")
    with environment.exclusive(Path(folder)):
        ready.set()
        release.wait(30)


def test_a_second_installation_into_one_folder_waits_for_the_first(environment, tmp_path, capsys):
    context = multiprocessing.get_context("fork")
    ready, release = context.Event(), context.Event()
    other = context.Process(target=hold, args=(str(ROOT / "installers"), str(tmp_path), ready, release))
    other.start()
    try:
        assert ready.wait(30)
        context.Process(target=release_later, args=(release,)).start()
        with environment.exclusive(tmp_path):
            assert release.is_set(), "entered while the first held the folder"
        assert "waiting for it" in capsys.readouterr().err
    finally:
        release.set()
        other.join()


def release_later(release) -> None:
    import time

    time.sleep(0.5)
    release.set()
