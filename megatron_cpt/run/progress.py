"""How far a run has come, read from its files: the tracker, the metrics, the first error in a log."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_cpt.run.directory import RunDir

_ERROR = re.compile(r"error|exception|killed|fault|abort|out of memory|no space left|cannot|failed|: .*\. .*\.$", re.I)
_NOISE = re.compile(r"warn|traceback \(most recent|^\s+(file|raise|return)\b|\[W\d|elastic|ChildFailedError", re.I)


@dataclass(frozen=True)
class Progress:
    """The last thing that the metrics say."""

    iteration: int = 0
    consumed_tokens: int = 0
    loss: float | None = None
    tokens_per_second: float | None = None
    last_time: float | None = None
    num_starts: int = 0
    end_reason: str | None = None


def last_checkpoint(run: RunDir) -> int:
    """Return the iteration in the run's tracker file; 0 without one (or for `release`)."""
    try:
        text = (run.checkpoints / "latest_checkpointed_iteration.txt").read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return 0
    return int(text) if text.isdigit() else 0


def read_progress(run: RunDir) -> Progress:
    """Return the run's position according to its metrics."""
    iteration, tokens, loss, rate, last_time, starts, reason = 0, 0, None, None, None, 0, None
    for record in _records(run.metrics_path):
        kind, last_time = record.get("kind"), record.get("time", last_time)
        iteration, tokens = record.get("iteration", iteration), record.get("consumed_tokens", tokens)
        if kind == "start":
            starts, reason, rate = starts + 1, None, None
        elif kind == "train":
            loss, rate = record.get("loss", loss), record.get("tokens_per_second", rate)
        elif kind == "end":
            reason = record.get("reason")
    return Progress(iteration, tokens, loss, rate, last_time, starts, reason)


def first_error(log_dir: Path) -> str | None:
    """Return `FILE: LINE` for the first line of a job's logs that looks like the reason it died.

    Ranks' logs come before the launcher's, which only repeats that a rank failed.
    """
    logs = sorted(log_dir.glob("*.log"), key=lambda path: (path.name == "launcher.log", path.name))
    for path in [*logs, log_dir / "job.out"]:
        try:
            text = path.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            continue
        lines = [line.strip() for line in text.splitlines() if _ERROR.search(line) and not _NOISE.search(line)]
        raised = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Interrupt)\b|megatron-cpt ", line)]
        if lines:
            return f"{path.name}: {(raised or lines)[0][:200]}"
    return None


def _records(path: Path) -> list[dict[str, Any]]:
    records = []
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    records.append(json.loads(line))
                except json.JSONDecodeError:  # being written now, or cut by a crash
                    continue
    except FileNotFoundError:
        return []
    return records
