"""A job per kept checkpoint: what is measured, what is left out, what a rerun submits."""

from pathlib import Path

import pytest

from megatron_cpt.errors import LaunchError
from megatron_cpt.launch.submission.checkpoint_jobs import checkpoint_stages
from megatron_cpt.launch.submission.graph import current_stages
from megatron_cpt.run.ledger import append_record
from megatron_cpt.run.made_of import fingerprint
from tests.launch.test_submit import submission, submit, task

__all__ = ["task"]


def write_checkpoint(run: Path, iteration: int, *, is_exported: bool = False) -> None:
    folder = run / ("checkpoints_hf" if is_exported else "checkpoints") / f"iter_{iteration:07d}"
    folder.mkdir(parents=True)
    (folder / ("config.json" if is_exported else "manifest.json")).write_text("{}")


def test_every_checkpoint_is_one_job_its_export_first_and_what_has_a_result_is_done(task):
    chosen = submission(task)
    with pytest.raises(LaunchError, match="no checkpoint to measure. Train first"):
        checkpoint_stages(chosen, ["piqa"])
    for iteration in (40, 80, 100):
        write_checkpoint(chosen.run.path, iteration)
    write_checkpoint(chosen.run.path, 80, is_exported=True)
    stages = checkpoint_stages(chosen, ["piqa", "arc_easy"])
    assert [stage.name for stage in stages] == [f"harness-iter_0000{number:03}" for number in (40, 80, 100)]
    arguments = stages[1].words
    assert arguments[:2] == ("evaluate", "harness") and "piqa,arc_easy" in arguments
    assert arguments[3] == f"iter_0000080={chosen.run.checkpoints_hf / 'iter_0000080'}"
    assert [stage.name[-3:] for stage in checkpoint_stages(chosen, [], every=80)] == ["080", "100"]
    results = chosen.run.report / "harness" / "iter_0000040" / "model"
    results.mkdir(parents=True)
    (results / "results_2026.json").write_text("{}")
    made = {"inputs": fingerprint(stages[0].reads, stages[0].words), "outputs": fingerprint(stages[0].writes)}
    append_record(chosen.run.jobs, "5", name=stages[0].name, state="finished", **made)
    assert current_stages(chosen, stages) == {"harness-iter_0000040"}
    assert current_stages(chosen, checkpoint_stages(chosen, ["piqa"])) == set(), "other tasks"
    texts = checkpoint_stages(chosen, [])[0]
    assert texts.words[-4] == "--text" and texts.words[-1].endswith("report/perplexity/iter_0000040.json")


def test_a_dry_run_prints_a_script_per_checkpoint_for_a_cluster_and_a_command_here(task):
    chosen = submission(task)
    write_checkpoint(chosen.run.path, 40)
    write_checkpoint(chosen.run.path, 100)
    shown = submit("evaluate", task, "--harness", "piqa", "--dry-run")
    assert shown.returncode == 0 and shown.stdout.count("$ megatron-cpt evaluate harness") == 2, shown.stderr
    shown = submit("evaluate", task, "--dry-run", "--site", "leonardo", "--account", "A")
    assert shown.returncode == 0 and shown.stdout.count("$ sbatch --parsable") == 2, shown.stderr
    assert shown.stdout.count("evaluate perplexity") == 2
