"""Advice on stages written by hand: every rung of the ladder, with commands that load, and too little data."""

import math
import shlex
from pathlib import Path

import pytest

from megatron_cpt.cli import main
from megatron_cpt.config.loading.resolve import load_config, write_resolved
from megatron_cpt.config.loading.sources import CHECKOUT
from megatron_cpt.evaluate.advice.judge import Advice, advice_json, advice_text, advise
from megatron_cpt.evaluate.advice.recovery import TREND_FRACTION, heldout_recovery, training_recovery, trend
from megatron_cpt.run.ledger import append_record
from megatron_cpt.run.names import command_line_settings, run_names
from tests.evaluate.test_sweep_report import write_metrics
from tests.tolerances import assert_fp64_rounding

DEMO = CHECKOUT / "tasks" / "demo"
TOKENS = 4096


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Return a function that writes a run of the demo: its settings, training losses and held-out losses."""
    monkeypatch.chdir(tmp_path)

    def write(
        variant: str,
        losses: list[float],
        held_out: dict[str, list[float]] | None = None,
        overrides: tuple[str, ...] = (),
        rates: list[float] | None = None,
        end: str | None = "finished",
    ) -> Path:
        loaded = load_config(DEMO, "demo-5m", "300K", variant, overrides=overrides)
        run = tmp_path / "runs" / "demo" / "demo-5m" / "300K" / variant
        write_resolved(loaded, run / "config.yaml")
        write_metrics(run, losses, held_out or {}, rates=rates, end=end, tokens=TOKENS)
        return run

    return write


def falling(start: float, end: float, count: int = 40) -> list[float]:
    return [end + (start - end) * math.exp(-6 * index / count) for index in range(count)]


def flat(level: float, count: int = 40) -> list[float]:
    return [level + 0.01 * (-1) ** index for index in range(count)]


def settings_of(advice: Advice, number: int = 0):
    """Load the configuration that a command of the advice names: it must be one that training takes."""
    words = list(advice.commands[number])
    at = {words[index]: words[index + 1] for index in range(0, 8, 2)}
    return load_config(Path(at["--task"]), at["--params"], at["--size"], at["--variant"], None, words[8:]).config


FORGOT = {"D0": [2.0, 2.4, 2.5, 2.5, 2.5], "D1": [3.0, 2.0, 1.9, 1.8, 1.8]}
WELL = {"D0": [2.0, 2.05, 2.03, 2.02, 2.01], "D1": [3.0, 2.0, 1.9, 1.8, 1.8]}


def test_a_stage_that_keeps_the_old_and_learns_the_new_goes_on_or_is_cooled_down(runs):
    runs("base", falling(4, 3))
    run = runs("replay", falling(3.6, 2.5), WELL, end=None)
    assert advise(run).summary == "recovered: let it continue"
    run = runs("replay", falling(3.6, 2.5), WELL)
    advice = advise(run)
    assert advice.summary.startswith("recovered and finished at 0.002: fork the next stage from here")
    config = settings_of(advice)
    assert config.variant == "replay+cooldown" and config.init.from_path == "variant:replay"
    assert config.training.train_tokens == 40 * TOKENS // 10


def test_forgetting_leads_to_more_replay_first(runs):
    runs("base", falling(4, 3))
    advice = advise(runs("no-replay", falling(3.6, 2.5), FORGOT))
    assert advice.summary.startswith("not recovering; next: more replay (old data (D0) is 0 of the mix; next 0.05)")
    assert settings_of(advice).data.mix == {"D0": 0.05, "D1": 0.95}
    assert "held-out D0 (old): stuck: 2.5000 bits per byte, before the first step 2.0000 (+25.0%)" in advice_text(
        advice
    )
    again_run = runs("no-replay+replay-0.05", falling(3.6, 2.5), FORGOT, ("data.mix={D0: 0.05, D1: 0.95}",))
    again = advise(again_run)
    assert settings_of(again).variant == "no-replay+replay-0.05_replay-0.1"
    assert settings_of(again).data.mix == {"D0": 0.1, "D1": 0.9}
    first = advise(again_run.parent / "no-replay")
    assert first.evidence[-1] == "no-replay+replay-0.05 has begun already: advise that run next"


def test_a_loss_that_stays_above_the_old_trend_counts_where_no_held_out_set_says_otherwise(runs):
    runs("base", falling(4, 3))
    stuck = advise(runs("replay", flat(3.6)))
    assert stuck.training.verdict == "stuck" and stuck.chosen.name == "more replay"
    harder = advise(runs("replay", flat(3.6), WELL))
    assert harder.training.verdict == "stuck" and harder.chosen is None and "recovered" in harder.summary
    assert advise(runs("replay", falling(5.5, 3.3))).training.verdict == "recovering"
    assert advise(runs("replay", falling(2.9, 3.9))).training.verdict == "rising"


ENOUGH = ("data.mix={D0: 0.3, D1: 0.7}",)


def test_with_enough_replay_the_peak_is_halved(runs):
    runs("base", falling(4, 3))
    advice = advise(runs("replay", falling(3.6, 2.5), FORGOT, ENOUGH))
    assert advice.chosen.name == "re-warm to another peak"
    config = settings_of(advice)
    assert (config.optimizer.lr, config.schedule.lr_warmup.amount) == (1e-3, 0.01)
    assert config.data.mix == {"D0": 0.3, "D1": 0.7}, "what the command line set stays"


def test_a_fork_from_a_cooled_down_checkpoint_moves_to_the_last_one_before(runs):
    base = runs("base", falling(4, 3), rates=[2e-3] * 30 + [2e-3 * (10 - index) / 10 for index in range(10)])
    for iteration in (20, 30, 40):
        (base / "checkpoints" / f"iter_{iteration:07d}").mkdir(parents=True)
    overrides = (*ENOUGH, "optimizer.lr=1e-3")
    advice = advise(runs("replay", falling(3.6, 2.5), FORGOT, overrides))
    assert advice.chosen.name == "fork earlier" and "0.0002 of 0.002" in advice.chosen.why
    config = settings_of(advice)
    assert (config.init.from_path, config.init.load) == ("variant:base@30", "full")


def test_the_buffer_has_two_mixes(runs, tmp_path):
    runs("base", falling(4, 3))
    overrides = (*ENOUGH, "optimizer.lr=1e-3", "data.buffer=buffer.yaml")
    run = runs("replay", falling(3.6, 2.5), FORGOT, overrides)
    assert advise(run).rungs[3].why.startswith("buffer.yaml holds nothing yet")
    (tmp_path / "runs/demo/data").mkdir(parents=True)
    (tmp_path / "runs/demo/data/buffer.yaml").write_text("format: 1\n")
    advice = advise(run)
    assert advice.chosen.name == "buffer mix"
    assert settings_of(advice).data.mix == {"D0": 0.05, "D1": 0.48, "buffer": 0.47}
    overrides = (*overrides[1:], "data.mix={D0: 0.3, D1: 0.23, buffer: 0.47}")
    advice = advise(runs("replay", falling(3.6, 2.5), FORGOT, overrides))
    assert settings_of(advice).data.mix == {"D1": 0.1, "buffer": 0.9}


def test_the_last_rung_decays_on_the_old_data_and_brings_the_new_in_at_a_fifth_of_the_peak(runs):
    runs("base", falling(4, 3), overrides=("parallel.pipeline_model_parallel_size=2", "launch.gpus_per_node=2"))
    advice = advise(runs("replay", falling(3.6, 2.5), FORGOT, (*ENOUGH, "optimizer.lr=1e-3")))
    assert advice.chosen.name == "decay first"
    first, second = settings_of(advice, 0), settings_of(advice, 1)
    assert first.variant == "base+decay" and first.data.mix == {"D0": 1.0}
    assert first.parallel.pipeline_model_parallel_size == 2, "a trial of the stage before keeps that stage's settings"
    assert (first.optimizer.lr, first.optimizer.min_lr) == (2e-3, 4e-4)
    assert second.init.from_path == "variant:base+decay"
    assert (second.optimizer.lr, second.optimizer.min_lr) == (4e-4, 2e-5)
    overrides = (*ENOUGH, "optimizer.lr=4e-4", "init.from_path=variant:base+decay")
    runs("base+decay", falling(3, 2.9), rates=[2e-3 - 4e-5 * index for index in range(40)])
    end = advise(runs("replay+after-decay", falling(3.6, 2.5), FORGOT, overrides))
    assert end.chosen is None and "the ladder is at its end" in end.summary and not end.commands


def test_a_stage_that_learns_nothing_is_re_warmed_higher(runs):
    runs("base", falling(4, 3))
    advice = advise(runs("replay", falling(3.0, 2.99), {"D0": [2.0, 2.0, 2.0], "D1": [3.0, 3.0, 2.999]}))
    assert advice.summary.startswith("not learning the new data; next: re-warm")
    assert settings_of(advice).optimizer.lr == 4e-3


def test_too_little_data_is_said_and_nothing_is_advised(runs):
    runs("base", falling(4, 3))
    advice = advise(runs("replay", falling(3.6, 2.5, 8), {"D0": [2.0, 2.5]}))
    assert advice.summary.startswith("too little data to judge: 8 training records after the warm-up, 16 are needed")
    assert not advice.commands
    assert advice_json(advice)["training"]["now"] is None
    alone = advise(runs("no-replay", falling(3.6, 2.5)), previous=runs("replay", falling(3, 2, 5)))
    assert "5 training records of the stage before" in alone.summary


def test_a_stage_whose_base_was_not_trained_here_is_judged_by_its_held_out_losses(runs):
    advice = advise(runs("base", falling(3.6, 2.5), {"D0": [2.0, 2.4, 2.5, 2.5]}, ("data.mix={D0: 0.01, D1: 0.99}",)))
    assert advice.training.verdict == "unknown" and "0 training records of the stage before" in advice.training.note
    assert advice.chosen.name == "more replay" and settings_of(advice).data.mix == {"D0": 0.05, "D1": 0.95}
    assert "is not a run of this task" in advice.rungs[2].why and not advice.rungs[4].trials


def test_a_trend_is_carried_on_but_never_upwards_nor_for_ever():
    line = [(float(x), 4 - x / 100) for x in range(100)]
    level, slope = trend(line)
    assert_fp64_rounding((level, slope), (3.01, -0.01))  # smoothing leaves a line alone
    assert trend([(x, 8 - y) for x, y in line])[1] == 0
    far = training_recovery(line, [(float(x), 2.8) for x in range(1000)])
    # held after as many tokens as the trend was laid through
    assert_fp64_rounding(far.reference, 3.01 - 0.01 * 99 * TREND_FRACTION)
    assert heldout_recovery([2.0, 2.9, 2.5, 2.2]).verdict == "recovering"


def test_a_run_is_named_as_it_was_started_and_its_own_settings_are_found(runs, tmp_path):
    run = runs("replay", falling(3, 2), overrides=("optimizer.lr=1e-3", "paths.runs_dir=runs"))
    assert command_line_settings(run / "config.yaml") == {"optimizer.lr": "0.001", "paths.runs_dir": "runs"}
    from megatron_cpt.run.directory import RunDir

    fallback = {"--task": "demo", "--params": "demo-5m", "--size": "300K"}
    assert run_names(RunDir(run), fallback)[1] == "demo"
    append_record(run / "jobs", "1", stage="train", command=["megatron-cpt", "train", "--task", "x/demo"])
    assert run_names(RunDir(run), fallback)[:2] == ["--task", "x/demo"]
    script = tmp_path / "job.sh"
    script.write_text("#!/bin/bash\n#PBS -N it's\nexec python \\\n    --task y/demo \\\n    --site mine.yaml\n")
    append_record(run / "jobs", "2", stage="train", script=str(script))
    assert run_names(RunDir(run), fallback) == [
        "--task", "y/demo", "--params", "demo-5m", "--size", "300K", "--site", "mine.yaml",
    ]  # fmt: skip


def test_the_verb_prints_conclusion_numbers_ladder_and_commands(runs, capsys, tmp_path):
    runs("base", falling(4, 3))
    run = runs("no-replay", falling(3.6, 2.5), FORGOT)
    with pytest.raises(SystemExit) as ended:
        main(["advise", str(run), "--old", "D0", "--output", str(tmp_path / "advice.json")])
    assert not ended.value.code
    printed = capsys.readouterr().out
    assert "-> 1. more replay" in printed and (tmp_path / "advice.json").is_file()
    command = shlex.split(printed.strip().splitlines()[-1])
    assert command[:3] == ["megatron-cpt", "submit", "train"] and command[-1] == "data.mix={D0: 0.05, D1: 0.95}"
    with pytest.raises(SystemExit) as ended:
        main(["advise", str(run), "--old", "D9"])
    assert ended.value.code == 2 and "--old D9: no corpus of the task. There are D0, D1" in capsys.readouterr().err
