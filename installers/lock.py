"""Write the hash-locked requirements: every package of every profile with its exact version and its wheels' hashes.

    .venv/bin/python installers/lock.py

Reads `requirements/*.in`, asks pip (dry run, wheels for Linux x86_64) what they resolve to on each supported Python,
and writes `cpu.txt` (what everybody needs) and one file per addition with what it adds. A package's hashes are those
of its wheel for each Python. Nothing is installed, and no index address is written. Standard library only.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

PYTHON_VERSIONS = ("3.12", "3.13")
REQUIREMENTS = Path(__file__).parent / "requirements"
ADDITIONS = ("dev", "cuda13")

Locked = dict[str, tuple[str, set[str]]]


def main() -> None:
    """Resolve and write the lock files."""
    runtime = resolve(["cpu.in"])
    write("cpu", runtime)
    for addition in ADDITIONS:
        everything = resolve(["cpu.in", f"{addition}.in"])
        moved = [name for name, (version, _) in runtime.items() if everything[name][0] != version]
        if moved:
            sys.exit(f"lock.py: {addition}.in changes the version of {', '.join(moved)}. Pin them in cpu.in.")
        write(addition, {name: pin for name, pin in everything.items() if name not in runtime})


def write(name: str, locked: Locked) -> None:
    """Write one lock file."""
    pythons = " and ".join(PYTHON_VERSIONS)
    header = f"# Written by installers/lock.py for Python {pythons} on Linux x86_64. Edit {name}.in instead.\n"
    (REQUIREMENTS / f"{name}.txt").write_text(header + lock_text(locked), encoding="utf-8")
    sys.stderr.write(f"{name}.txt: {len(locked)} packages\n")


def resolve(sources: list[str]) -> Locked:
    """Return name -> (version, hashes of its wheels) of everything that the sources need on all Pythons."""
    locked: Locked = {}
    for python_version in PYTHON_VERSIONS:
        sys.stderr.write(f"resolving {' + '.join(sources)} for Python {python_version}\n")
        for package in pip_report(sources, python_version)["install"]:
            name, version = package["metadata"]["name"].lower().replace("_", "-"), package["metadata"]["version"]
            known_version, hashes = locked.setdefault(name, (version, set()))
            if known_version != version:
                sys.exit(f"lock.py: {name} resolves to {known_version} and {version}. Pin it in a .in file.")
            hashes.add(package["download_info"]["archive_info"]["hashes"]["sha256"])
    return locked


def pip_report(sources: list[str], python_version: str) -> dict:
    """Return pip's installation report of a dry run."""
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "-qq", "--dry-run", "--ignore-installed"]
        command += ["--target", scratch, "--only-binary", ":all:", "--python-version", python_version]
        command += ["--report", str(report)]
        for source in sources:
            command += ["-r", str(REQUIREMENTS / source)]
        subprocess.run(command, check=True)
        return json.loads(report.read_text(encoding="utf-8"))


def lock_text(locked: Locked) -> str:
    """Return pip's hash-checking format, sorted, one package a paragraph."""
    lines = []
    for name, (version, hashes) in sorted(locked.items()):
        lines.append(
            " \\\n    ".join([f"{name}=={version}", *(f"--hash=sha256:{digest}" for digest in sorted(hashes))])
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
