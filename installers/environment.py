"""Build a virtual environment from the hash-locked requirements; restartable, quiet, with progress.

A stamp in the environment holds a hash of everything that went in (requirements, pyproject.toml, Python's version):
while it matches, there is nothing to do. An interrupted installation continues where it stopped; packages whose
files are incomplete are installed anew. Two calls at the same time wait for each other. Standard library only,
because it runs before the environment exists.
"""

import argparse
import contextlib
import csv
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from profiles import REQUIREMENTS, InstallError, Profile, load_profile

REPOSITORY = Path(__file__).resolve().parent.parent
STAMP = "megatron-cpt.stamp"
LOG = "install.log"


def main() -> int:
    """Build the development environment, for `make venv`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venv", type=Path, required=True, help="the environment's folder")
    parser.add_argument("--profile", default="dev", help="an entry of requirements/profiles.json (dev)")
    arguments = parser.parse_args()
    return exit_code(lambda: build(arguments.venv, load_profile(arguments.profile)))


def exit_code(step: Callable[[], None]) -> int:
    """Run an installation and return its exit code, with failures on one line."""
    try:
        step()
    except InstallError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; run it again to continue\n")
        return 130
    return 0


def build(venv: Path, profile: Profile, bundle: Path | None = None) -> None:
    """Bring `venv` to the state that the profile's lock files describe, with this checkout in editable mode.

    `bundle` is a folder of wheels to install from, without any index.

    Raises: InstallError with the reason and the remedy.
    """
    venv.parent.mkdir(parents=True, exist_ok=True)
    with exclusive(venv.parent):
        key = stamp_key(profile)
        if (venv / STAMP).is_file() and (venv / STAMP).read_text() == key and python_works(venv):
            return
        started = time.monotonic()
        create_venv(venv, system_packages=profile.system_torch)
        (venv / STAMP).unlink(missing_ok=True)
        remove_incomplete_packages(venv)
        install_wheels(venv, profile, bundle)
        if profile.source:
            install_source(venv, profile, bundle)
        pip = [*pip_command(venv), "install", "--no-deps", "--no-build-isolation", "--no-index", "--force-reinstall"]
        run_pip([*pip, "-e", str(REPOSITORY)], venv, "installing megatron-cpt")
        (venv / STAMP).write_text(key)
        say(f"{venv} is ready ({time.monotonic() - started:.0f} s)")


def stamp_key(profile: Profile) -> str:
    """Return a hash of what an environment is built from."""
    digest = hashlib.sha256(f"{sys.version} {REPOSITORY} {profile.exclude}".encode())
    for file in [*profile.files(), REPOSITORY / "pyproject.toml"]:
        digest.update(file.read_bytes())
    return digest.hexdigest() + "\n"


def install_wheels(venv: Path, profile: Profile, bundle: Path | None) -> None:
    """Install the profile's locked wheels."""
    requirements = venv / "requirements.txt"
    requirements.write_text(profile.wheels_text())
    pip = [*pip_command(venv), "install", "--require-hashes", "--no-deps", *only_from(bundle)]
    num_packages = profile.wheels_text().count("==")
    run_pip([*pip, "-r", str(requirements)], venv, f"installing {num_packages} package{'s' * (num_packages != 1)}")


def install_source(venv: Path, profile: Profile, bundle: Path | None) -> None:
    """Build and install the profile's source archives with the target's compiler.

    Raises: InstallError when there is no CUDA compiler.
    """
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if not shutil.which("nvcc") and not (home and (Path(home) / "bin" / "nvcc").is_file()):
        raise InstallError(
            "nvcc: no CUDA compiler was found. Transformer Engine's torch part is built with it. "
            f"{profile.nvcc_hint} and run again, or use --profile cpu, which trains without Transformer Engine."
        )
    pip = [*pip_command(venv), "install", "--require-hashes", "--no-deps", "--no-build-isolation", *only_from(bundle)]
    locked = [argument for name in profile.source for argument in ("-r", str(REQUIREMENTS / name))]
    # by itself its setup looks for a wheel on a code host first
    run_pip([*pip, *locked], venv, "building Transformer Engine", {"NVTE_PYTORCH_FORCE_BUILD": "TRUE"})


def only_from(bundle: Path | None) -> list[str]:
    """Return pip's options that take wheels from a folder instead of an index."""
    return ["--no-index", "--find-links", str(bundle)] if bundle else []


def create_venv(venv: Path, *, system_packages: bool = False) -> None:
    """Create `venv` with this Python, anew where an existing one does not run or has another Python version.

    Raises: InstallError naming the Debian package when Python has neither ensurepip nor pip.
    """
    if venv.exists() and not python_works(venv):
        say(f"{venv} does not run with Python {sys.version_info.major}.{sys.version_info.minor}: building it anew")
        shutil.rmtree(venv)
    if not venv.exists():
        say(f"creating {venv} with {sys.executable}")
        options = ["--without-pip"] if missing_module("ensurepip") else []
        options += ["--system-site-packages"] if system_packages else []
        created = subprocess.run([sys.executable, "-m", "venv", *options, str(venv)])
        if created.returncode:
            shutil.rmtree(venv, ignore_errors=True)
            raise InstallError(f"{sys.executable} -m venv failed, see above. On Debian: apt-get install python3-venv.")
    if without_own_pip(venv) and missing_module("pip"):
        shutil.rmtree(venv)
        raise InstallError(
            f"{sys.executable}: this Python has neither ensurepip nor pip. A virtual environment needs one of them. "
            "On Debian: apt-get install python3-venv."
        )


def python_works(venv: Path) -> bool:
    """Say whether the environment's Python runs and has this Python's version."""
    command = [str(venv / "bin" / "python"), "-c", "import sys; print(sys.version_info[:2])"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return answer.returncode == 0 and answer.stdout.strip() == str(sys.version_info[:2])


def pip_command(venv: Path) -> list[str]:
    """Return the environment's pip, or this Python's pip aimed at it."""
    python = str(venv / "bin" / "python")
    return [sys.executable, "-m", "pip", "--python", python] if without_own_pip(venv) else [python, "-m", "pip"]


def without_own_pip(venv: Path) -> bool:
    """Say whether the environment has no pip of its own (Debian without python3-venv)."""
    return not any(site.joinpath("pip").is_dir() for site in site_packages(venv))


def site_packages(venv: Path) -> list[Path]:
    """Return the environment's package folders."""
    return sorted(venv.glob("lib/python3.*/site-packages"))


def missing_module(name: str) -> bool:
    """Say whether this Python cannot import a module."""
    return subprocess.run([sys.executable, "-c", f"import {name}"], capture_output=True).returncode != 0


def remove_incomplete_packages(venv: Path) -> None:
    """Forget packages whose recorded files are missing (an installation was killed), so that pip installs them anew."""
    for info in (info for site in site_packages(venv) for info in site.glob("*.dist-info")):
        record = info / "RECORD"  # written last
        files = [row[0] for row in csv.reader(record.open(newline=""))] if record.is_file() else ["RECORD"]
        if any(not file.endswith(".pyc") and not (info.parent / file).exists() for file in files):
            say(f"{info.name} is incomplete: installing it anew")
            shutil.rmtree(info)


def run_pip(command: list[str], venv: Path, what: str, variables: dict[str, str] | None = None) -> None:
    """Run pip with its output in the environment's log, and a line of progress every 10 seconds.

    Raises: InstallError with the last lines of the log.
    """
    log = venv / LOG
    started = said = time.monotonic()
    say(f"{what} (log: {log})")
    with log.open("a") as output:
        environment = {
            **os.environ,
            "PYTHONUNBUFFERED": "1",
            "PIP_PROGRESS_BAR": "off",
            "PIP_NO_INPUT": "1",
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
            **(variables or {}),
        }
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        try:
            while process.poll() is None:
                time.sleep(0.2)
                if time.monotonic() - said >= 10:
                    said = time.monotonic()
                    say(f"  {said - started:.0f} s: {progress(venv, log)}")
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    if process.returncode:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise InstallError(
            f"{tail}\npip failed at {what} (exit {process.returncode}). The log is {log}; run again to continue."
        )


def progress(venv: Path, log: Path) -> str:
    """Return how many packages are in place and pip's last line."""
    packages = sum(1 for site in site_packages(venv) for _ in site.glob("*.dist-info"))
    lines = [line for line in log.read_text(errors="replace").splitlines() if not line.startswith("WARNING")]
    last = lines[-1].strip() if lines else "starting"
    last = "unpacking" if last.startswith("Installing collected") else last
    return f"{packages} package{'s' * (packages != 1)} in place; {last[:70]}"


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold a lock on `folder` (the folder itself: no lock file stays behind)."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"another installation into {folder} is running: waiting for it")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:  # a file system without locks
            say(f"{folder} cannot be locked ({error.strerror}): do not install into it twice at the same time")
        yield
    finally:
        os.close(descriptor)


def say(line: str) -> None:
    """Write a line of progress."""
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
