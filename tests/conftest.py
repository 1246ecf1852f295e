"""Fixtures of the whole test-suite."""

import os
from collections.abc import Iterator

import pytest

from tests.distributed import RankPool

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: the ranks share this machine's cores
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # tests never download


SETUP_SECONDS: dict[str, float] = {}
"""Of the test that runs: what its fixtures took."""


def pytest_report_teststatus(report, config):
    """With -v, say a passed test's seconds as it ends: a run that is cut short shows where its time went."""
    if report.when == "setup":
        SETUP_SECONDS[report.nodeid] = report.duration
    if report.when == "call" and report.outcome == "passed" and config.get_verbosity() > 0:
        seconds = SETUP_SECONDS.get(report.nodeid, 0.0) + report.duration
        return "passed", ".", f"PASSED in {seconds:.1f} s"
    return None


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """Processes that run functions as ranks of a process group: `ranks.run(function, world_size, *args)`."""
    with RankPool() as pool:
        yield pool
