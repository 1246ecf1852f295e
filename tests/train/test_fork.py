"""Branches of a run: the command that `fork` prints trains, from the checkpoint and the rate that the source had."""

import shlex

import pytest

from megatron_cpt.checkpoint.torch_dist.retention import read_protected
from megatron_cpt.cli import main
from tests.tolerances import assert_fp64_rounding
from tests.train.test_loop import after_base, records, run_path, run_stage  # noqa: F401


def fork(capsys, task, *arguments: str) -> tuple[int, str, str]:
    words = ["fork", "--run", str(run_path(task, "base")), "--task", str(task), *arguments]
    with pytest.raises(SystemExit) as ended:
        main(words)
    captured = capsys.readouterr()
    return int(ended.value.code or 0), captured.out, captured.err


def test_a_decay_branch_of_a_kept_iteration_cools_down_from_the_rate_it_had(ranks, after_base, capsys):  # noqa: F811
    code, out, _ = fork(capsys, after_base, "--iteration", "4", "--to-variant", "cool", "--decay", "4")
    assert code == 0
    words = shlex.split(out)
    assert words[:3] == ["megatron-cpt", "submit", "train"] and words[words.index("--variant") + 1] == "base+cool"
    overrides = tuple(word for word in words if "=" in word)
    assert "init.from_path=variant:base@4" in overrides and "optimizer.lr=0.005" in overrides
    assert "data.order=continue" in overrides and "training.seed=1234" in overrides
    before = (after_base / "task.yaml").read_text()
    assert ranks.run(run_stage, 1, str(after_base), "base+cool", overrides) == ["finished"]
    steps = records(after_base, "base+cool", "train")
    assert_fp64_rounding([step["lr"] for step in steps], [0.005, 0.00375, 0.0025, 0.00125])
    source = {step["iteration"]: step["loss"] for step in records(after_base, "base", "train")}
    assert steps[0]["loss"] < source[4] + 0.1  # the weights, and not random ones
    assert (after_base / "task.yaml").read_text() == before
    assert read_protected(run_path(after_base, "base") / "checkpoints") == {4}


REFUSED = {
    "iter_0000005: no such folder": ["--iteration", "5", "--to-variant", "x"],
    "is the run itself": ["--to-variant", "base"],
    "is nothing": ["--to-variant", "x", "--decay", "0"],
    "is not a duration": ["--to-variant", "x", "--decay", "soon"],
    "Did you mean lr": ["--to-variant", "x", "optimizer.lrr=1"],
}


def test_another_variant_keeps_its_own_settings_and_what_could_not_begin_is_refused(after_base, capsys):  # noqa: F811
    code, out, _ = fork(capsys, after_base, "--to-variant", "replay", "optimizer.lr=1e-3", "--load", "weights")
    assert code == 0
    words = shlex.split(out)
    assert words[words.index("--variant") + 1] == "replay"
    assert {"init.from_path=variant:base@8", "init.load=weights", "optimizer.lr=1e-3"} <= set(words)
    for message, arguments in REFUSED.items():
        code, _, err = fork(capsys, after_base, *arguments)
        assert code == 2 and message in err, (message, err)


def test_a_folder_that_is_no_run_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["fork", "--run", str(tmp_path), "--to-variant", "x"])
    assert "no config.yaml" in capsys.readouterr().err


def test_a_decay_branch_keeps_the_weight_decay_it_had_and_needs_a_rate_to_cool_down_from(ranks, experiment, capsys):
    rising = ("optimizer.weight_decay_end=0.3", "optimizer.weight_decay_incr_style=linear", "optimizer.min_lr=5e-3")
    ranks.run(run_stage, 1, str(experiment), "base", rising)
    code, _, err = fork(capsys, experiment, "--iteration", "4", "--to-variant", "cool", "--decay", "4")
    assert code == 2 and "the learning rate after iteration 4 is 0.005, not above optimizer.min_lr (0.005)" in err
    stated = ("--iteration", "4", "--to-variant", "cool", "--decay", "4", "optimizer.min_lr=0")
    code, out, _ = fork(capsys, experiment, *stated)
    assert code == 0
    words = shlex.split(out)
    assert "optimizer.weight_decay_incr_style=constant" in words and "optimizer.weight_decay_end=null" in words
    decay = next(word for word in words if word.startswith("optimizer.weight_decay=")).partition("=")[2]
    assert_fp64_rounding(float(decay), 0.2)
