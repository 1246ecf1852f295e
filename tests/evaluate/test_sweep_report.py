"""The comparison of a sweep's points from their metrics."""

import json
from pathlib import Path

import pytest

from megatron_cpt.cli import main
from megatron_cpt.errors import DataError
from megatron_cpt.evaluate.report.sweep import _mean_interval, write_sweep_report
from tests.tolerances import assert_fp64_rounding


def write_metrics(
    run: Path,
    losses: list[float],
    held_out: dict[str, list[float]],
    *,
    rates: list[float] | None = None,
    end: str | None = "finished",
    tokens: int = 4096,
) -> None:
    """Write metrics.jsonl: a start, a record per loss, held-out losses spread evenly from iteration 0 on, an end."""
    records: list[dict] = [{"kind": "start", "iteration": 0, "consumed_tokens": 0, "resumed": False, "layout": "TP1"}]
    for iteration, loss in enumerate(losses, 1):
        rate = rates[iteration - 1] if rates else 2e-3
        values = {"iteration": iteration, "consumed_tokens": iteration * tokens, "loss": loss, "lr": rate}
        records.append({"kind": "train", **values, "tokens_per_second": 100.0})
    for corpus, values in held_out.items():
        for number, value in enumerate(values):
            iteration = number * len(losses) // max(len(values) - 1, 1)
            place = {"iteration": iteration, "consumed_tokens": iteration * tokens}
            records.append({"kind": "validation", **place, "corpus": corpus, "loss": value, "bits_per_byte": value})
    if end:
        records.append({"kind": "end", "iteration": len(losses), "reason": end})
    run.mkdir(parents=True, exist_ok=True)
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def write_sweep(folder: Path, points: dict[tuple[str, str], tuple[float, float] | None]) -> None:
    """Write a sweep over replay and peak whose points end with these changes on new and old data."""
    listed = []
    for (replay, lr), change in points.items():
        label = f"replay-{replay}_lr-{lr}"
        if change:
            held_out = {"D1": [2.0, 2.0 + change[0]], "D0": [1.0, 1.0 + change[1]]}
            write_metrics(folder.parent / label, [3.0] * 10, held_out)
        axes = {"replay": replay, "optimizer.lr": lr}
        listed.append({"label": label, "run": f"../{label}", "axes": axes, "train_iters": 10})
    folder.mkdir()
    (folder / "sweep.json").write_text(json.dumps({"format": 1, "old": ["D0"], "new": ["D1"], "points": listed}))


def test_points_are_compared_and_those_that_none_beats_are_marked(tmp_path, capsys):
    changes = {("0.05", "1e-3"): (-0.4, 0.2), ("0.05", "2e-3"): (-0.5, 0.3), ("0.25", "1e-3"): (-0.3, 0.25),
               ("0.25", "2e-3"): None}  # fmt: skip
    write_sweep(tmp_path / "main+sweep", changes)
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", "sweep", str(tmp_path / "main+sweep"), "--output", str(tmp_path / "report")])
    assert not ended.value.code
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    assert rows[0] == ["", "replay", "optimizer.lr", "D0", "D1", "learned", "forgot", "training loss", "state"]
    assert [row[0] for row in rows[2:]] == ["*", "*", "", ""], "less learned and more forgotten than the first"
    assert rows[2][3:7] == ["+0.2000", "-0.4000", "-0.4000", "+0.2000"]
    assert rows[5][3:] == ["", "", "", "", "", "0 of 10"]
    assert (tmp_path / "report" / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert "sweep.png" in (tmp_path / "report" / "sweep.md").read_text()


def write_forgetting(run: Path, intervals: dict[str, tuple[float, float]]) -> None:
    """Write what `evaluate forgetting` says of a point: intervals around changes of -0.4."""
    changes = [
        {"model": model, "text": text, "change": -0.4, "change_low": -0.4 - below, "change_high": -0.4 + above}
        for text, (below, above) in intervals.items()
        for model in ("cpt", "soup")
    ]
    (run / "report" / "evaluation").mkdir(parents=True)
    (run / "report" / "evaluation" / "forgetting.json").write_text(json.dumps({"format": 1, "changes": changes}))


def test_intervals_are_drawn_where_a_point_was_measured_and_said_where_not(tmp_path):
    write_sweep(tmp_path / "sweep", {("0.05", "1e-3"): (-0.4, 0.2), ("0.25", "1e-3"): (-0.3, 0.1)})
    write_sweep_report(tmp_path / "sweep", tmp_path / "report")
    page, plain = (tmp_path / "report/sweep.md").read_text(), (tmp_path / "report/sweep.png").read_bytes()
    assert "No intervals: " in page
    write_forgetting(tmp_path / "replay-0.05_lr-1e-3", {"D0": (0.02, 0.03), "D1": (0.04, 0.05)})
    write_sweep_report(tmp_path / "sweep", tmp_path / "report")
    first, second = json.loads((tmp_path / "report/sweep.json").read_text())["points"]
    assert_fp64_rounding((first["forgot_interval"], first["learned_interval"]), ([0.02, 0.03], [0.04, 0.05]))
    assert second["learned_interval"] is None
    assert "Bars of 1 of 2 points: 95 % intervals" in (tmp_path / "report/sweep.md").read_text()
    assert (tmp_path / "report/sweep.png").read_bytes() != plain


def test_the_interval_of_a_mean_over_two_texts_is_that_of_independent_errors():
    assert_fp64_rounding(_mean_interval({"a": (0.3, 0.6), "b": (0.4, 0.8)}, ["a", "b"]), (0.25, 0.5))
    assert _mean_interval({"a": (0.3, 0.6)}, ["a", "b"]) is None and _mean_interval({}, []) is None


def test_a_sweep_without_any_training_is_refused(tmp_path):
    write_sweep(tmp_path / "sweep", {("0.05", "1e-3"): None})
    with pytest.raises(DataError, match="no point has trained yet"):
        write_sweep_report(tmp_path / "sweep", tmp_path / "report")
    (tmp_path / "sweep" / "sweep.json").write_text("{}")
    with pytest.raises(DataError, match="not written by `submit sweep`"):
        write_sweep_report(tmp_path / "sweep", tmp_path / "report")
