"""Where a stage's weights come from, tried as a user would: every form of init.from_path gives the same weights."""

import shutil

import pytest

from megatron_cpt.checkpoint.convert.choices import ExportChoices
from megatron_cpt.checkpoint.convert.hf_mcore import mcore_to_hf
from tests.distributed import RankFailure
from tests.tolerances import assert_fp32_rounding
from tests.train.test_loop import TP2, after_base, losses, run_path, run_stage  # noqa: F401

ONE = ("training.train_iters=1", "schedule.lr_cooldown=0", "evaluation.eval_interval=0", "optimizer.lr=1e-3")


@pytest.fixture
def exported(after_base, tmp_path):  # noqa: F811
    """Return the task after its base and Hugging Face folders of iterations 4 and 8."""
    checkpoints = run_path(after_base, "base") / "checkpoints"
    for iteration in (4, 8):
        mcore_to_hf(
            checkpoints / f"iter_{iteration:07d}", tmp_path / f"hf{iteration}", options=ExportChoices(tokenizer=None)
        )
    return after_base, tmp_path


def first_loss(ranks, task, label: str, path: object, *more: str, size: int = 1) -> float:
    variant = f"replay+{label}"
    ranks.run(run_stage, size, str(task), variant, (*ONE, f"init.from_path={path}", *more))
    return losses(task, variant)[1]


def test_every_name_of_the_same_weights_gives_the_same_first_loss(ranks, exported):
    task, folder = exported
    checkpoints = run_path(task, "base") / "checkpoints"
    found = {
        label: first_loss(ranks, task, label, path, "init.load=weights")
        for label, path in {
            "newest": "variant:base",
            "iteration": "variant:base@8",
            "folder": checkpoints,
            "one": checkpoints / "iter_0000008",
            "hf": folder / "hf8",
        }.items()
    }
    assert len(set(found.values())) == 1, found
    full = first_loss(ranks, task, "full", "variant:base@8", "init.load=full", *TP2, size=2)
    assert_fp32_rounding(full, found["newest"])
    assert first_loss(ranks, task, "earlier", "variant:base@4", "init.load=weights") != found["newest"]


def test_weights_converted_from_another_folder_are_not_taken_for_these(ranks, exported):
    """A start that was given another folder and failed, or was ended before its first save, left its conversion behind."""
    task, folder = exported
    with pytest.raises(RankFailure, match=r"holds weights only. Use init.load=weights"):
        first_loss(ranks, task, "x", folder / "hf4", "init.load=full")
    first_loss(ranks, task, "x", folder / "hf4", "init.load=weights")
    run = run_path(task, "replay+x")
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(RankFailure, match="made of something else"):
        first_loss(ranks, task, "x", folder / "hf8", "init.load=weights")


REFUSED = {
    "variant:base@5": "iter_0000005: no such folder",
    "variant:base@soon": "is no iteration. Write variant:base@1000",
    "variant:nobody": "Train nobody first",
    "nowhere/at/all": "nowhere/at/all: ",
}


def test_what_cannot_be_started_from_is_named(ranks, after_base):  # noqa: F811
    for path, message in REFUSED.items():
        with pytest.raises(RankFailure) as failure:
            first_loss(ranks, after_base, "y", path, "init.load=full")
        assert message in str(failure.value)
