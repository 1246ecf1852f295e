"""Progress from the ends of files is what reading them whole says, wherever blocks begin."""

import json
import random

import pytest

from megatron_cpt.run import progress
from megatron_cpt.run.directory import RunDir


def whole(lines: list[dict[str, object]]) -> progress.Progress:
    """Return what the records say when all are read."""
    iteration, tokens, loss, rate, time, starts, reason = 0, 0, None, None, None, 0, None
    for record in lines:
        time, iteration = record["time"], record.get("iteration", iteration)
        tokens = record.get("consumed_tokens", tokens)
        if record["kind"] == "start":
            starts, reason, rate = starts + 1, None, None
        elif record["kind"] == "train":
            loss, rate = record["loss"], record["tokens_per_second"]
        elif record["kind"] == "end":
            reason = record["reason"]
    return progress.Progress(iteration, tokens, loss, rate, time, starts, reason)  # type: ignore[arg-type]


@pytest.mark.parametrize("block", [1 << 10, 1500, 4097, 8 << 20])
@pytest.mark.parametrize("seed", range(12))
def test_the_end_of_a_file_says_what_the_whole_says(seed, block, tmp_path, monkeypatch):
    chooser = random.Random(seed)
    lines: list[dict[str, object]] = []
    for number in range(chooser.randrange(1, 200)):
        kind = chooser.choices(["train", "start", "end", "validation", "save"], [20, 2, 2, 2, 2])[0]
        record: dict[str, object] = {"kind": kind, "iteration": number}
        if kind in ("train", "validation", "start"):
            record["consumed_tokens"] = number * 10
        if kind == "train":
            record |= {
                "loss": chooser.random(),
                "tokens_per_second": chooser.random(),
                "note": "x" * chooser.randrange(60),
            }
        if kind == "end":
            record["reason"] = chooser.choice(["finished", "signal"])
        lines.append(record | {"time": float(number)})
    run = RunDir(tmp_path)
    run.metrics_path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"kind": "tr')
    monkeypatch.setattr(progress, "_BLOCK_BYTES", block)
    monkeypatch.setattr(progress, "_TAIL_BYTES", 2000)
    monkeypatch.setattr(progress, "_LINE_BYTES", 400)
    found, expected = progress.read_progress(run), whole(lines)
    assert found == expected


def test_no_metrics_are_no_progress(tmp_path):
    assert progress.read_progress(RunDir(tmp_path)) == progress.Progress()
    (tmp_path / "metrics.jsonl").write_text("")
    assert progress.read_progress(RunDir(tmp_path)) == progress.Progress()
