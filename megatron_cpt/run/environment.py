"""The environment of a job, written next to its log to explain the run's behaviour months later.

Variables are taken by prefix (scheduler, devices, fabric, threads, Python), never all: the environment of a login holds
tokens. Values that still look like secrets are left out.
"""

import os
import platform
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from megatron_cpt.files import write_json

PREFIXES = (
    "SLURM_", "PBS_", "CUDA_", "NVIDIA_", "NCCL_", "TORCH_", "OMP_", "MKL_", "FI_", "UCX_", "CCL_", "ZE_", "ROCR_", "GLOO_",
    "OMPI_MCA_", "PALS_", "LD_LIBRARY_PATH", "PATH", "PYTHON", "VIRTUAL_ENV", "LOADEDMODULES", "HF_HOME", "HF_HUB_OFFLINE",
    "TRANSFORMERS_OFFLINE", "MEGATRON_CPT_", "HOSTNAME", "TMPDIR",
)  # fmt: skip
_SECRET = re.compile(r"token|secret|passw|credential|api_?key|auth|cookie", re.I)
_CREDENTIALS = re.compile(r"://[^/\s@]+@")
_DEVICES = (
    ["nvidia-smi", "--query-gpu=index,name,driver_version,memory.total,ecc.mode.current", "--format=csv"],
    ["xpu-smi", "discovery"],
)
_SECONDS = 20


def write_environment(path: Path, environment: Mapping[str, str], more: tuple[str, ...] = ()) -> None:
    """Write host, devices, modules, variables (those of `PREFIXES` and `more`) and package versions as JSON."""
    write_json(path, job_environment(environment, more))


def job_environment(environment: Mapping[str, str], more: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return what `write_environment` writes."""
    return {
        "format": 1,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "host": socket.gethostname(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "devices": {command[0]: text for command in _DEVICES if (text := _output(command))},
        "modules": [name for name in environment.get("LOADEDMODULES", "").split(":") if name],
        "variables": {
            name: value
            for name, value in sorted(environment.items())
            if (name.startswith(PREFIXES) or name in more)
            and not _SECRET.search(name)
            and not _CREDENTIALS.search(value)
        },
        "packages": dict(
            sorted({str(found.metadata["Name"]): found.version for found in metadata.distributions()}.items())
        ),
    }


def _output(command: list[str]) -> str:
    """Return what a command prints; nothing where it is not there, fails or hangs (a broken driver)."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_SECONDS, check=False, env=dict(os.environ)
        )
    except (OSError, subprocess.TimeoutExpired):
        return f"{command[0]}: no answer within {_SECONDS} s"
    return (done.stdout or done.stderr).strip()
