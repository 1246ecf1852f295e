"""The fault suite: `make faults` runs it (`pytest tests/faults`); a plain `pytest` leaves it out, because it takes long."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHIM = Path(__file__).with_name("faulty_disk.c")


def pytest_ignore_collect(collection_path, config):
    """Collect the suite only when it is asked for by its folder."""
    is_meant = any("tests/faults" in str(argument) for argument in config.invocation_params.args)
    return None if is_meant else True


@pytest.fixture(scope="session")
def verb(tmp_path_factory):
    """Return a function that runs a verb on a disk that fails as `rules` say, or kills it: see `server.py`."""
    library = tmp_path_factory.mktemp("shim") / "faulty_disk.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, SHIM, "-ldl"], check=True)
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.faults.server", library],
        cwd=ROOT,
        env={**os.environ, "LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None and process.stdout is not None
    stdin, stdout = process.stdin, process.stdout

    def run(argv, rules="", signal=0, after=0.0):
        request = {"argv": [str(word) for word in argv], "rules": rules, "signal": int(signal), "after": after}
        stdin.write(json.dumps(request) + "\n")
        stdin.flush()
        return json.loads(stdout.readline())

    yield run
    stdin.close()
    process.wait(timeout=30)
