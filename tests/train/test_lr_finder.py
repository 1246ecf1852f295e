"""The learning-rate range test: the rule on known curves, and a sweep that leaves the run alone."""

import csv
import json
import math
import os
import subprocess
import sys

import pytest

from megatron_cpt.config.loading.sources import CHECKOUT
from megatron_cpt.train.tools.lr_finder import smooth, suggested_rate
from tests.distributed import RankFailure
from tests.tolerances import assert_fp64_rounding
from tests.train.test_loop import run_path, run_stage

RATES = [10 ** (-6 + 0.05 * n) for n in range(101)]


def test_smoothing_leaves_a_constant_alone():
    assert_fp64_rounding(smooth([2.0] * 5), [2.0] * 5)


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

    from megatron_cpt.config.loading.resolve import load_config
    from megatron_cpt.train.tools.lr_finder import find_learning_rate

    overrides = ("training.train_iters=40", "launch.gpus_per_node=2")
    loaded = load_config(Path(task), "tiny", "short", "base", overrides=overrides)
    return find_learning_rate(loaded, 1e-5, 10.0, iterations).losses


def test_a_sweep_writes_a_curve_and_no_checkpoint(ranks, experiment):
    first, second = ranks.run(sweep, 2, str(experiment), 30)
    assert first == second and len(first) > 15
    run = run_path(experiment, "base")
    rows = list(csv.DictReader((run / "lr_find" / "losses.csv").open()))
    assert [float(row["loss"]) for row in rows] == first
    assert_fp64_rounding(float(rows[0]["lr"]), 1e-5)
    assert (run / "lr_find" / "losses.png").read_bytes().startswith(b"\x89PNG")
    suggestion = json.loads((run / "lr_find" / "suggestion.json").read_text())
    assert suggestion["suggested"] == min(suggestion["steepest"], suggestion["tenth_of_lowest"]) > 0
    assert not (run / "checkpoints").exists() and not (run / "metrics.jsonl").exists()


def test_a_sweep_leaves_a_run_that_has_begun_as_it_is(ranks, experiment):
    """Its settings are not the run's: forks, traces and reports go by what the run directory says."""
    ranks.run(run_stage, 1, str(experiment), "base")
    run = run_path(experiment, "base")
    files = [run / name for name in ("config.yaml", "train_data.yaml", "metrics.jsonl")]
    before = [path.read_bytes() for path in files]
    ranks.run(sweep, 2, str(experiment), 12)
    assert [path.read_bytes() for path in files] == before
    assert len(list((run / "checkpoints").glob("iter_*"))) == 2


def test_more_iterations_than_the_stage_has_are_refused(ranks, experiment):
    with pytest.raises(RankFailure, match="the stage has 40"):
        ranks.run(sweep, 2, str(experiment), 50)


def submit(experiment, *words: str, at: str = "start") -> subprocess.CompletedProcess[str]:
    """Run `megatron-cpt submit lr-find` for the experiment."""
    before, after = (words, ()) if at == "start" else ((), words)
    command = [sys.executable, "-m", "megatron_cpt", "submit", "lr-find", *before, "--task", str(experiment)]
    command += ["--params", "tiny", "--size", "short", "--variant", "base", "training.train_iters=40", *after]
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    return subprocess.run(
        command, cwd=experiment.parent.parent, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.full
def test_a_rendered_job_script_runs_the_sweep_on_every_rank_of_the_job(experiment):
    """The script that `submit` would hand to Slurm, run by bash, with a launcher that starts the one node's processes here."""
    folder = experiment.parent.parent
    (folder / "site.yaml").write_text(
        "launch: {scheduler: slurm, gpus_per_node: 2, hang_timeout: 300}\n"
        "site: {queue: q, launcher: [env, SLURM_NODEID=0], processes: node}\n"
    )
    dry = submit(experiment, "--iterations", "12", "--lr-min", "1e-5", "--dry-run", "--site", str(folder / "site.yaml"))
    assert dry.returncode == 0, dry.stderr
    assert "-m megatron_cpt lr-find" in dry.stdout and "--gpus-per-node 2" in dry.stdout
    (folder / "job.sh").write_text(dry.stdout[dry.stdout.index("#!") : dry.stdout.index("\n$ sbatch")] + "\n")
    (folder / "nodes").write_text("127.0.0.1\n")
    environment = {**os.environ, "PBS_NODEFILE": str(folder / "nodes"), "SLURM_JOB_ID": "7", "GLOO_SOCKET_IFNAME": "lo"}
    job = subprocess.run(
        ["bash", str(folder / "job.sh")], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert job.returncode == 0, job.stderr
    run = run_path(experiment, "base")
    rows = list(csv.DictReader((run / "lr_find" / "losses.csv").open()))
    assert len(rows) == 12 and float(rows[0]["lr"]) == 1e-5
    (logs,) = [path for path in (run / "logs").iterdir() if path.name.startswith("lr-find")]
    assert {path.name for path in logs.glob("rank_*.log")} == {"rank_00000.log", "rank_00001.log"}
    assert "sugges" in (logs / "rank_00000.log").read_text()
    last = json.loads((run / "jobs" / "ledger.jsonl").read_text().splitlines()[-1])
    assert (last["state"], last["exit_code"]) == ("finished", 0)


def test_what_the_sweep_cannot_do_is_said_before_it_is_queued(experiment):
    missing = submit(experiment, "init.from_path=variant:replay", "training.train_iters=200", at="end")
    assert missing.returncode == 2 and "Train replay first" in missing.stderr, missing.stderr
    for words, message in (
        (("--iterations", "50"), "the stage has 40"),
        (("--iterations", "5"), "at least 10 are needed"),
        (("--lr-min", "1", "--lr-max", "0.1"), "0 < --lr-min < --lr-max"),
    ):
        answer = submit(experiment, *words)
        assert answer.returncode == 2 and message in answer.stderr, answer.stderr
