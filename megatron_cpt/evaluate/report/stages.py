"""A stage as recorded in its run directory: its curves without superseded records, its interruptions, its blend.

`metrics.jsonl` has one JSON object a line, each with `kind` and `time` (seconds since 1970):

    start        iteration, consumed_tokens, resumed, layout, world_size, changed_settings
    train        iteration, consumed_tokens, loss, lr, grad_norm, tokens_per_second and other values of a step
    validation   iteration, consumed_tokens, corpus, loss (nats per token), bits_per_byte
    save         iteration, seconds, stall_seconds
    skip         iteration, consumed_tokens: an iteration of data.skip_iterations or skip_iterations.txt
    spike        iteration, consumed_tokens, loss, median, deviation, first_sample, last_sample, shards, documents
    rollback     iteration (of the target checkpoint), consumed_tokens, skipped
    end          iteration, reason: finished, a signal, a file such as stop_now, the walltime

A value that is no number (NaN, infinity) is null. It is append-only. A stage that was killed and continued holds some iterations twice: after a `start` record
with `resumed`, every earlier record of a later iteration counts no more.
"""

import itertools
import json
import math
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from megatron_cpt.config.loading.sources import read_yaml
from megatron_cpt.data.lists.data_list import read_data_list
from megatron_cpt.errors import DataError
from megatron_cpt.evaluate.report.steps import STEP_FIELDS, Steps
from megatron_cpt.files import naming
from megatron_cpt.run.directory import RunDir


@dataclass(frozen=True, kw_only=True)
class Interruption:
    """A stage was continued from a checkpoint; `lost_tokens` were trained on once more."""

    stopped_tokens: int
    """Tokens consumed at the last record before the stop."""
    resumed_tokens: int
    """Tokens consumed at the checkpoint that was loaded."""
    reason: str
    """`killed` when the stage wrote no end record, else that record's reason."""
    layout_before: str
    layout_after: str


@dataclass(kw_only=True)
class Stage:
    """One run: valid records, in order, with their context."""

    name: str
    path: Path
    train: list[dict[str, Any]] = field(default_factory=list)
    validation: list[dict[str, Any]] = field(default_factory=list)
    spikes: list[dict[str, Any]] = field(default_factory=list)
    saves: list[dict[str, Any]] = field(default_factory=list)
    not_finite: list[int] = field(default_factory=list)
    """Iterations of logged steps without a finite loss: they changed nothing and are not in `train`."""
    starts: list[dict[str, Any]] = field(default_factory=list)
    interruptions: list[Interruption] = field(default_factory=list)
    end_reason: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    blend: dict[str, int] = field(default_factory=dict)
    """Tokens per corpus that the stage was to see."""
    parent: str | None = None
    """Variant that the stage's weights came from."""
    parent_iteration: int | None = None
    """Iteration of that variant's checkpoint, where one is named; None: its last."""
    offset_tokens: int = 0
    """Tokens that the weights had seen in earlier stages of the report."""

    @property
    def tokens(self) -> int:
        """Tokens consumed in this stage."""
        return max((record["consumed_tokens"] for record in self.train), default=0)


def read_stages(
    paths: Sequence[Path], fields: Collection[str] | None = None, *, may_be_empty: bool = False
) -> list[Stage]:
    """Return the stages in run directories; a stage that forks from another one starts where it left that one.

    Stages of the same name are told apart by as many of the folders above them as it takes.

    Raises: DataError as `read_stage`.
    """
    stages = [read_stage(path, fields, may_be_empty=may_be_empty) for path in paths]
    num_parts = 1
    longest = max((len(stage.path.absolute().parts) for stage in stages), default=0)
    while len({stage.name for stage in stages}) < len(stages) and num_parts < longest:
        num_parts += 1
        for stage in stages:
            stage.name = "/".join(stage.path.absolute().parts[-num_parts:])
    by_name = {stage.name: stage for stage in stages}
    for stage in stages:
        stage.offset_tokens = _offset(stage, by_name, set())
    return stages


def read_stage(path: Path, fields: Collection[str] | None = None, *, may_be_empty: bool = False) -> Stage:
    """Return the stage in a run directory, named by its last folder, the variant.

    Of training records only `fields` are kept (None: all); if `STEP_FIELDS` contain all requested fields, a long stage
    is thinned (`report/steps.py`). `may_be_empty`: a run that has not trained has no records.

    Raises: DataError when there are no metrics or a line of them is not a record.
    """
    run = RunDir(path)
    stage = Stage(name=path.absolute().name, path=path, config=_read_config(run.config_path))
    stage.parent, stage.parent_iteration = _parent(setting(stage.config, "init.from_path"))
    if run.data_list_path.exists():
        for entry in read_data_list(run.data_list_path):
            corpus = entry.corpus or Path(entry.prefix).name
            stage.blend[corpus] = stage.blend.get(corpus, 0) + (entry.tokens or 0)
    if may_be_empty and not run.metrics_path.exists():
        return stage
    steps = Steps() if fields is not None and set(fields) <= STEP_FIELDS else None
    for record in read_metrics(run.metrics_path):
        if fields is not None and steps is None and record["kind"] == "train":
            record = {name: value for name, value in record.items() if name in fields}
        try:
            _add_record(stage, steps, record)
        except (KeyError, TypeError, OverflowError):
            raise DataError(
                f"{run.metrics_path}: {str(record)[:100]} lacks what a record of its kind has. Remove that line."
            ) from None
    if steps is not None:
        stage.train = steps.records()
    return stage


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a metrics file; a last line that a killed process left unfinished is passed over.

    Raises: DataError when there is no file or another line is no record.
    """
    try:
        file = path.open("rb")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file. A run directory with metrics.jsonl is needed.") from None
    with file, naming(path):
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            record = _record(line)
            if record is not None:
                yield record
            elif line.endswith(b"\n"):
                said = line.decode(errors="replace").rstrip()[:60]
                raise DataError(f"{path}:{number}: {said!r} is no record. Remove that line.")


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError:
        try:
            record = json.loads(line)  # earlier versions and other programs write NaN
        except (ValueError, RecursionError):
            return None
    return record if isinstance(record, dict) and "kind" in record else None


def short_layouts(before: str, after: str) -> tuple[str, str]:
    """Return two layouts such as `TP2 PP1 CP1 DP1` without the parts that are 1 in both."""
    pairs = list(zip(before.split(), after.split(), strict=False))
    pairs = [pair for pair in pairs if {re.sub(r"[A-Z]+", "", part) for part in pair} != {"1"}]
    return " ".join(one for one, _ in pairs), " ".join(other for _, other in pairs)


def setting(config: dict[str, Any], key: str) -> Any:
    """Return the value of a dotted key in a resolved configuration, None where there is none."""
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def smoothed(values: Sequence[float], window: int) -> list[float]:
    """Return the mean over `window` values around each one; towards both ends the window shrinks, so nothing is shifted."""
    sums = list(itertools.accumulate(values, initial=0.0))
    count = len(values)
    reaches = (min(index, count - 1 - index, window // 2) for index in range(count))
    return [
        (sums[index + reach + 1] - sums[index - reach]) / (2 * reach + 1) if reach else values[index]
        for index, reach in enumerate(reaches)
    ]


def _add_record(stage: Stage, steps: Steps | None, record: dict[str, Any]) -> None:
    kind = record["kind"]
    if kind == "train":
        if _is_finite(record):
            stage.train.append(record) if steps is None else steps.add(record)
        else:
            stage.not_finite.append(record["iteration"])
    elif kind == "validation":
        if _is_finite(record):
            stage.validation.append(record)
    elif kind in ("spike", "save"):
        (stage.spikes if kind == "spike" else stage.saves).append(record)
    elif kind == "end":
        stage.end_reason = record.get("reason")
    elif kind == "rollback":  # a loss spike was undone: the steps since the checkpoint are trained again
        _cut(stage, steps, record, "roll-back")
    elif kind == "start":
        if record.get("resumed"):
            _resume(stage, steps, record)
        elif stage.starts:  # started over from nothing: what was before does not count
            if steps is not None:
                steps.cut(-1)
            stage.train, stage.validation, stage.interruptions, stage.not_finite = [], [], [], []
            stage.spikes, stage.saves = [], []
        stage.starts.append(record)
        stage.end_reason = None


def _resume(stage: Stage, steps: Steps | None, start: dict[str, Any]) -> None:
    _cut(stage, steps, start, None if stage.end_reason == "finished" else stage.end_reason or "killed")


def _cut(stage: Stage, steps: Steps | None, record: dict[str, Any], reason: str | None) -> None:
    """Continue at the record's iteration and drop later records. With a reason it is an interruption."""
    iteration, tokens = record["iteration"], record.get("consumed_tokens", 0)
    if reason is not None:
        before = stage.starts[-1].get("layout", "") if stage.starts else ""
        stage.interruptions.append(
            Interruption(
                stopped_tokens=max(stage.tokens if steps is None else steps.tokens, tokens),
                resumed_tokens=tokens,
                reason=reason,
                layout_before=before,
                layout_after=record.get("layout", before),
            )
        )
    if steps is not None:
        steps.cut(iteration)
    while stage.train and stage.train[-1]["iteration"] > iteration:
        stage.train.pop()
    stage.validation = [record for record in stage.validation if record["iteration"] <= iteration]
    stage.saves = [record for record in stage.saves if record["iteration"] <= iteration]
    stage.not_finite = [found for found in stage.not_finite if found <= iteration]


def _is_finite(record: dict[str, Any]) -> bool:
    return record.get("loss") is not None and math.isfinite(record["loss"])


def _offset(stage: Stage, by_name: dict[str, Stage], visited: set[str]) -> int:
    parent = by_name.get(stage.parent or "")
    if parent is None or stage.name in visited:
        return 0
    return _offset(parent, by_name, visited | {stage.name}) + tokens_at(parent, stage.parent_iteration)


def tokens_at(stage: Stage, iteration: int | None) -> int:
    """Return the tokens that a stage had consumed after an iteration, between logged ones in proportion; None: at its end."""
    if iteration is None:
        return stage.tokens
    known = [
        (0, 0),
        *((record["iteration"], record["consumed_tokens"]) for record in [*stage.train, *stage.validation]),
    ]
    before = max((point for point in known if point[0] <= iteration), default=(0, 0))
    after = min((point for point in known if point[0] >= iteration), default=None)
    if after is None or after[0] == before[0]:
        return before[1]
    return before[1] + (after[1] - before[1]) * (iteration - before[0]) // (after[0] - before[0])


def _parent(from_path: Any) -> tuple[str | None, int | None]:
    text = str(from_path or "")
    if not text.startswith("variant:"):
        return None, None
    name, _, iteration = text.removeprefix("variant:").partition("@")
    return name, int(iteration) if iteration.isdecimal() else None


def _read_config(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    return read_yaml(path)
