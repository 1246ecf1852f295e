"""The learning-rate range test: the rule on known curves, and a sweep that leaves the run alone."""

import csv
import math

import pytest

from megatron_cpt.train.lr_finder import smooth, suggested_rate
from tests.distributed import RankFailure
from tests.train.test_loop import run_path

RATES = [10 ** (-6 + 0.05 * n) for n in range(101)]


def test_smoothing_leaves_a_constant_alone():
    assert smooth([2.0] * 5) == pytest.approx([2.0] * 5)


def test_the_steepest_rate_is_where_the_curve_falls_fastest():
    # a fall around 1e-4 and a rise from 1e-2 on
    losses = [5 - 3 / (1 + math.exp(-5 * (math.log10(r) + 4))) + max(0, math.log10(r) + 2) ** 2 * 8 for r in RATES]
    steepest, tenth = suggested_rate(RATES, losses)
    assert 1e-4 <= steepest <= 1e-3  # smoothing lags by half a decade at most
    assert 1e-3 / 2 <= tenth <= 1e-2


def test_a_loss_that_never_falls_gives_no_suggestion():
    with pytest.raises(ValueError, match="never falls"):
        suggested_rate(RATES, [1.0 + 0.01 * n for n in range(101)])


def sweep(task: str, iterations: int) -> list[float]:
    from pathlib import Path

    from megatron_cpt.config.load import load_config
    from megatron_cpt.train.lr_finder import find_learning_rate

    overrides = ("training.train_iters=40", "launch.gpus_per_node=2")
    loaded = load_config(Path(task), "tiny", "short", "base", overrides=overrides)
    return find_learning_rate(loaded, 1e-5, 10.0, iterations).losses


def test_a_sweep_writes_a_curve_and_no_checkpoint(ranks, experiment):
    first, second = ranks.run(sweep, 2, str(experiment), 30)
    assert first == second and len(first) > 15
    run = run_path(experiment, "base")
    rows = list(csv.DictReader((run / "lr_find" / "losses.csv").open()))
    assert [float(row["loss"]) for row in rows] == first
    assert float(rows[0]["lr"]) == pytest.approx(1e-5)
    assert (run / "lr_find" / "losses.png").read_bytes().startswith(b"\x89PNG")
    assert not (run / "checkpoints").exists() and not (run / "metrics.jsonl").exists()


def test_more_iterations_than_the_stage_has_are_refused(ranks, experiment):
    with pytest.raises(RankFailure, match="the stage has 40"):
        ranks.run(sweep, 2, str(experiment), 50)
