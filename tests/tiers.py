"""Which cases of a long matrix `make test` runs. The others have the marker `full`, and `make test-full` runs them."""

from collections.abc import Iterable
from typing import Any

import pytest


def full_except(cases: Iterable[Any], *representatives: Any) -> list[Any]:
    """Return the cases for `parametrize`, all but the representatives marked `full`. A tuple is several arguments.

    A representative that is no case is an error: `make test` would silently run nothing of the matrix.
    """
    cases = list(cases)
    if missing := [case for case in representatives if case not in cases]:
        raise ValueError(f"not among the cases: {missing}")
    return [case if case in representatives else in_full(case) for case in cases]


def in_full(case: Any) -> Any:
    """Return one case of a matrix as one that `make test-full` runs."""
    return pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.full)
