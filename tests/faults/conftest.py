"""The fault suite: `make faults` runs it (`pytest tests/faults`); a plain `pytest` leaves it out, because it takes long."""

import subprocess
from pathlib import Path

import pytest

SHIM = Path(__file__).with_name("faulty_disk.c")


def pytest_ignore_collect(collection_path, config):
    """Collect the suite only when it is asked for by its folder."""
    is_meant = any("tests/faults" in str(argument) for argument in config.invocation_params.args)
    return None if is_meant else True


@pytest.fixture(scope="session")
def faulty_disk(tmp_path_factory):
    """Return a function rules -> environment in which the calls that the rules name fail (see faulty_disk.c)."""
    library = tmp_path_factory.mktemp("shim") / "faulty_disk.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, SHIM, "-ldl"], check=True)
    return lambda rules: {"LD_PRELOAD": str(library), "FAULTY_DISK": rules}
