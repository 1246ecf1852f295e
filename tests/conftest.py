"""Fixtures of the whole test-suite."""

import os
from collections.abc import Iterator

import pytest

from tests.distributed import RankPool

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: the ranks share this machine's cores
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # tests never download


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """Processes that run functions as ranks of a process group: `ranks.run(function, world_size, *args)`."""
    with RankPool() as pool:
        yield pool
