"""How far a run has come, read from its files: the tracker, the metrics, the first error in a log."""

import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from megatron_cpt.run.directory import RunDir

_ERROR = re.compile(r"error|exception|killed|fault|abort|out of memory|no space left|cannot|failed|: .*\. .*\.$", re.I)
_BLOCK_BYTES, _TAIL_BYTES, _LINE_BYTES = 8 << 20, 1 << 18, 1 << 20
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
    except (FileNotFoundError, UnicodeDecodeError):
        return 0
    return int(text) if text.isdigit() else 0


def read_progress(run: RunDir) -> Progress:
    """Return the run's position according to its metrics, in time and memory almost independent of its number of steps.

    The last records are parsed; of the ones before, only how many starts there are, and where the last start, end and step lie.
    """
    try:
        with run.metrics_path.open("rb") as file:
            tail = _tail_records(file)
            places = _last_places(file)
            last_train = next((record for record in reversed(tail) if record.get("kind") == "train"), None)
            last_train = last_train or _record_at(file, places["train"].last)
            ended = _record_at(file, places["end"].last) if places["end"].last > places["start"].last else {}
    except FileNotFoundError:
        return Progress()
    is_of_this_start = places["train"].last > places["start"].last
    return Progress(
        iteration=int(_last_number(tail, "iteration") or 0),
        consumed_tokens=int(_last_number(tail, "consumed_tokens") or 0),
        loss=_last_number([last_train], "loss"),
        tokens_per_second=_last_number([last_train], "tokens_per_second") if is_of_this_start else None,
        last_time=_last_number(tail, "time"),
        num_starts=places["start"].count,
        end_reason=str(ended["reason"]) if ended.get("reason") else None,
    )


def first_error(log_dir: Path) -> str | None:
    """Return `FILE: LINE` for the first line of a job's logs that looks like the reason it died.

    Ranks' logs come before the launcher's, which only repeats that a rank failed.
    """
    logs = sorted(log_dir.glob("*.log"), key=lambda path: (path.name == "launcher.log", path.name))
    for path in [*logs, log_dir / "job.out"]:
        try:
            text = _end_of(path)
        except FileNotFoundError:
            continue
        lines = [line.strip() for line in text.splitlines() if _ERROR.search(line) and not _NOISE.search(line)]
        raised = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Interrupt)\b|megatron-cpt ", line)]
        if lines:
            return f"{path.name}: {(raised or lines)[0][:200]}"
    return None


@dataclass
class _Places:
    """Records of one kind: how many, and where the last one starts; -1: nowhere."""

    count: int = 0
    last: int = -1


def _last_places(file: BinaryIO) -> dict[str, _Places]:
    """Return where records of the kinds start, found by their first bytes, as `train/watch/metrics.py` writes them."""
    places = {"start": _Places(), "end": _Places(), "train": _Places()}
    file.seek(0)
    position, rest = 0, b"\n"  # so that the first line begins as the others do
    while block := file.read(_BLOCK_BYTES):
        data = rest + block
        for kind, found in places.items():
            mark = b'\n{"kind": "%s"' % kind.encode()
            found.count += data.count(mark)
            where = data.rfind(mark)
            if where >= 0:
                found.last = position - len(rest) + where + 1
        position += len(block)
        keep = data.rfind(b"\n")  # the last line may go on in the next block
        rest = data[max(keep, len(data) - _LINE_BYTES) :] if keep >= 0 else data[-_LINE_BYTES:]
        for kind, found in places.items():  # what is read again is not counted again
            found.count -= rest.count(b'\n{"kind": "%s"' % kind.encode())
    for kind, found in places.items():
        found.count += rest.count(b'\n{"kind": "%s"' % kind.encode())
    return places


def _tail_records(file: BinaryIO) -> list[dict[str, Any]]:
    """Return the records of the last part of a file; a line that is being written, or was cut by a crash, is passed over."""
    size = file.seek(0, os.SEEK_END)
    start = max(size - _TAIL_BYTES, 0)
    file.seek(start)
    lines = file.read(_TAIL_BYTES).split(b"\n")
    return [record for line in lines[1 if start else 0 :] if (record := _record(line))]


def _record_at(file: BinaryIO, place: int) -> dict[str, Any]:
    if place < 0:
        return {}
    file.seek(place)
    return _record(file.readline(_LINE_BYTES)) or {}


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line.decode("utf-8", errors="replace"))
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def _last_number(records: Sequence[dict[str, Any]], name: str) -> float | None:
    for record in reversed(records):
        value = record.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            return value
    return None


def _end_of(path: Path) -> str:
    with path.open("rb") as file:
        file.seek(max(file.seek(0, os.SEEK_END) - _BLOCK_BYTES, 0))
        return file.read(_BLOCK_BYTES).decode("utf-8", errors="replace")
