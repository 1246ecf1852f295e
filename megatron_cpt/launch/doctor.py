"""Checks for missing or incompatible components on this machine, in about a second, without importing torch.

Each check returns findings: the item, its state and, for a warning or a problem, the remedy.
"""

import importlib.metadata
import importlib.util
import os
import re
import resource
import shutil
import site
import socket
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import megatron_cpt
from megatron_cpt.log import format_bytes

LOCK_FILE = Path(megatron_cpt.__file__).parent.parent / "installers" / "requirements" / "cpu.txt"
OPTIONAL = ("gigatoken", "fastokens")
"""Locked packages without which everything works, more slowly."""
DRIVER_OF_CUDA = {12: 525, 13: 580}
"""Oldest NVIDIA driver for each CUDA generation. Source: CUDA compatibility tables of NVIDIA's release notes."""
FREE_BYTES = 20 * 2**30
OPEN_FILES = 4096
SHARED_MEMORY_BYTES = 2**30


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    level: Literal["ok", "note", "warning", "problem"]
    what: str
    found: str
    remedy: str = ""

    def __str__(self) -> str:
        line = f"{self.level:<8} {self.what:<16} {self.found}"
        return f"{line}\n{'':<26}-> {self.remedy}" if self.remedy else line


def examine(runs_dir: Path, environment: Mapping[str, str] = os.environ) -> list[Finding]:
    """Return the findings of all checks; `runs_dir` is where checkpoints would go."""
    return [
        check_python(sys.version_info[:2]),
        *check_packages(locked_versions(LOCK_FILE), installed_versions()),
        *check_shadowing(environment),
        *check_gpu(nvidia_driver(), cuda_version()),
        check_scheduler(),
        *check_host(socket.gethostname()),
        *check_limits(),
        check_disk(runs_dir),
    ]


def check_python(version: tuple[int, ...]) -> Finding:
    """Look at the interpreter."""
    text = ".".join(map(str, version))
    if version in ((3, 12), (3, 13)):
        return Finding("ok", "python", f"{text} ({sys.executable})")
    return Finding(
        "problem", "python", f"{text}; megatron-core has wheels for 3.12 and 3.13", "make venv, with one of them"
    )


def locked_versions(lock_file: Path) -> dict[str, str]:
    """Return package -> version of a lock file; without a checkout, the bounds in the package's own metadata."""
    if lock_file.is_file():
        return dict(re.findall(r"^([\w.-]+)==(\S+)", lock_file.read_text(encoding="utf-8"), re.MULTILINE))
    requirements = [Requirement(text) for text in importlib.metadata.requires("megatron-cpt") or []]
    return {item.name: str(item.specifier) for item in requirements if item.marker is None}


def installed_versions() -> dict[str, str]:
    """Return package -> version of the packages that this interpreter would import."""
    found: dict[str, str] = {}
    for distribution in importlib.metadata.distributions():
        found.setdefault(canonicalize_name(distribution.metadata["Name"]), distribution.version)
    return found


def check_packages(expected: Mapping[str, str], installed: Mapping[str, str]) -> list[Finding]:
    """Compare installed packages with the tested ones: missing is a problem, another version a warning."""
    findings = []
    for name, version in expected.items():
        found = installed.get(canonicalize_name(name))
        exact = version[:1].isdigit()
        if found is None:
            level: Literal["note", "problem"] = "note" if name in OPTIONAL else "problem"
            findings.append(Finding(level, name, f"not installed; tested with {version}", "make venv"))
        elif exact and found != version:
            same_series = Version(found).release[:2] == Version(version).release[:2]
            findings.append(
                Finding("note" if same_series else "warning", name, f"{found}; tested with {version}", "make venv")
            )
        elif not exact and version and found not in Requirement(f"x{version}").specifier:
            findings.append(Finding("problem", name, f"{found}; {version} is needed", "pip install --upgrade it"))
    if all(finding.level == "note" for finding in findings):
        main = ", ".join(f"{name} {installed[name]}" for name in ("torch", "megatron-core") if name in installed)
        findings.insert(0, Finding("ok", "packages", f"{len(expected)} in the tested versions ({main})"))
    return findings


def check_shadowing(environment: Mapping[str, str]) -> list[Finding]:
    """Look for folders that put other packages or libraries before the environment's."""
    findings = []
    user_site = site.getusersitepackages()
    if user_site in sys.path and Path(user_site).is_dir():
        remedy = "export PYTHONNOUSERSITE=1"
        findings.append(Finding("warning", "user packages", f"{user_site} comes before the environment's", remedy))
    for folder in filter(None, environment.get("PYTHONPATH", "").split(os.pathsep)):
        if (Path(folder) / "torch").is_dir() or (Path(folder) / "megatron" / "core").is_dir():
            findings.append(
                Finding("warning", "PYTHONPATH", f"{folder} holds another torch or megatron", "unset PYTHONPATH")
            )
    for folder in filter(None, environment.get("LD_LIBRARY_PATH", "").split(os.pathsep)):
        libraries = [name for name in ("libcudnn.so.9", "libnccl.so.2") if (Path(folder) / name).exists()]
        if libraries:
            found = f"{folder} holds {' and '.join(libraries)}, which come before those torch was built with"
            findings.append(Finding("note", "LD_LIBRARY_PATH", found, "unload that module if torch fails to start"))
    return findings


def nvidia_driver() -> str | None:
    """Return the NVIDIA driver's version, or None where nvidia-smi finds no GPU."""
    command = ["nvidia-smi", "--query-gpu=driver_version,name", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip().splitlines()[0] if answer.returncode == 0 and answer.stdout.strip() else None


def cuda_version() -> str | None:
    """Return the version of the CUDA runtime that torch brought, from its package's metadata."""
    installed = installed_versions()
    for name in ("nvidia-cuda-runtime", "nvidia-cuda-runtime-cu12"):
        if name in installed:
            return installed[name]
    return None


def check_gpu(driver: str | None, cuda: str | None) -> list[Finding]:
    """Compare the driver with torch's CUDA, and look for Transformer Engine."""
    if driver is None:
        return [Finding("note", "gpu", "none found by nvidia-smi: training runs on CPU with gloo")]
    if cuda is None:
        return [Finding("warning", "gpu", f"{driver}, but torch is a build without CUDA", "installers/install.sh")]
    needed = DRIVER_OF_CUDA.get(int(cuda.split(".")[0]), 0)
    if int(driver.split(".")[0]) < needed:
        remedy = f"use nodes with driver {needed} or later"
        return [Finding("problem", "gpu", f"driver {driver}; torch's CUDA {cuda} needs {needed}", remedy)]
    findings = [Finding("ok", "gpu", f"driver {driver}, CUDA {cuda}")]
    if importlib.util.find_spec("transformer_engine") is None:
        remedy = "installers/install.sh TARGET_DIR --profile cuda13"
        findings.append(
            Finding("note", "transformer engine", "not installed: megatron's local layers are used", remedy)
        )
    return findings


def check_scheduler() -> Finding:
    """Look for a scheduler's commands."""
    found = [name for name, command in (("PBS", "qsub"), ("Slurm", "sbatch")) if shutil.which(command)]
    if found:
        return Finding("ok", "scheduler", " and ".join(found))
    return Finding("note", "scheduler", "neither qsub nor sbatch: jobs run on this machine (--site local)")


def check_host(hostname: str) -> list[Finding]:
    """Look up this machine's own name, which ranks use to find each other."""
    try:
        address = socket.gethostbyname(hostname)
    except OSError as error:
        remedy = "add the name to /etc/hosts, or set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME"
        return [Finding("warning", "host name", f"{hostname} cannot be looked up ({error})", remedy)]
    return [Finding("ok", "host name", f"{hostname} is {address}")]


def check_limits() -> list[Finding]:
    """Look at the limits that long jobs hit: open files, shared memory, the permissions of new files."""
    findings = []
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < OPEN_FILES:
        remedy = "ask the site to raise it: NCCL and data loaders open many"
        findings.append(Finding("warning", "open files", f"at most {hard}; {OPEN_FILES} are needed", remedy))
    shared = Path("/dev/shm")
    if shared.is_dir() and shutil.disk_usage(shared).total < SHARED_MEMORY_BYTES:
        size = format_bytes(shutil.disk_usage(shared).total)
        findings.append(Finding("warning", "shared memory", f"/dev/shm holds {size}", "in a container: --shm-size 8g"))
    mask = os.umask(0)
    os.umask(mask)
    if mask & 0o050:
        found = f"{mask:03o}: your group cannot read what you write"
        findings.append(Finding("note", "umask", found, "umask 027, or `umask` in the site file"))
    return findings


def check_disk(folder: Path) -> Finding:
    """Look at the free space where checkpoints would go."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    found = f"{format_bytes(free)} free for {folder}"
    if not os.access(existing, os.W_OK):
        return Finding("problem", "disk", f"{existing} is not writable", "choose another paths.runs_dir")
    if free < FREE_BYTES:
        return Finding("warning", "disk", found, "free some, or choose another paths.runs_dir")
    return Finding("ok", "disk", found)


def report(findings: Iterable[Finding]) -> str:
    """Return the findings as lines, followed by a sum."""
    findings = list(findings)
    problems = sum(finding.level == "problem" for finding in findings)
    warnings = sum(finding.level == "warning" for finding in findings)
    return "\n".join([*map(str, findings), f"{problems} problems, {warnings} warnings"]) + "\n"
