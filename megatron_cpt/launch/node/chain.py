"""Chains: a run longer than one walltime is a row of jobs, each continuing from the last checkpoint.

Every link asks `chain_verdict` before it starts. A finished run ends the chain, so does the file `stop_chain` in the run
directory; a mistake of the user (exit code 2), or `max_failures` links in a row that failed without a new checkpoint,
break it. The file `stop_now` ends only the link that runs.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

Verdict = Literal["run", "finished", "stopped", "broken"]

NOT_FINISHED_EXIT_CODE = 3
"""Exit code of a chain's last link if the run needs more: jobs that depend on the finished run must not start."""
BROKEN_EXIT_CODE = 4


def chain_verdict(
    earlier_links: Sequence[Mapping[str, Any]],
    *,
    iteration: int,
    train_iters: int | None,
    run_path: Path,
    max_failures: int,
) -> tuple[Verdict, str]:
    """Return what the next link should do, and why.

    `earlier_links`: ledger entries of this chain's links that have started, oldest first; `iteration`: the newest
    checkpoint's; `train_iters`: None while the length is not known.
    """
    if train_iters is not None and iteration >= train_iters:
        return "finished", f"iteration {iteration} of {train_iters} is on disk"
    if (run_path / "stop_chain").exists():
        return "stopped", f"{run_path / 'stop_chain'} exists; remove it and submit again to continue"
    if earlier_links and earlier_links[-1].get("exit_code") == 2:
        return "broken", "the last link ended with exit code 2, a mistake that repeats; see its log"
    failures = 0
    later_start = iteration
    for link in reversed(earlier_links):
        started_at = link.get("iteration_start", 0)
        has_failed = link.get("state") not in ("finished", "stopped")
        if not has_failed or later_start > started_at:
            break
        failures += 1
        later_start = started_at
    if failures >= max_failures:
        return "broken", f"{failures} links in a row failed without a new checkpoint"
    return (
        "run",
        f"continuing at iteration {iteration} of {'a length in epochs' if train_iters is None else train_iters}",
    )
