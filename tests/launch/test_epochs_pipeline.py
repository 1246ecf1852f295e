"""A length in epochs before the token files exist: `plan` and `submit` estimate it, the jobs count it when they start."""

import json
import re
from pathlib import Path

import pytest
import yaml

from megatron_cpt.config.loading.resolve import load_config, read_resolved, write_resolved
from megatron_cpt.config.loading.sources import CHECKOUT
from megatron_cpt.errors import LaunchError
from megatron_cpt.launch.node.chain import chain_verdict
from megatron_cpt.launch.node.supervisor import parse_arguments, stage_length
from megatron_cpt.launch.scheduler.site import Site
from megatron_cpt.launch.submission.graph import pipeline_stages
from megatron_cpt.launch.submission.submit import Submission, job_of
from megatron_cpt.run.directory import RunDir
from megatron_cpt.start.length import with_length
from tests.launch.test_pipeline_local import call, ledger, make_task


@pytest.fixture
def names(tmp_path) -> list[str]:
    """A run of 8 epochs of which there are documents, a tokenizer and a model only."""
    words = make_task(tmp_path, "llama")
    path = tmp_path / "t" / "task.yaml"
    task = yaml.safe_load(path.read_text())
    task["sizes"]["S"] = {"training": {"train_epochs": 8}, "checkpoint": {"save_interval": 100}}
    path.write_text(yaml.safe_dump(task))
    return words


def submission(root: Path, monkeypatch) -> Submission:
    monkeypatch.chdir(root)
    loaded, estimate = with_length(load_config(root / "t", str(root / "own.yaml"), "S", "main"))
    site = Site(launcher=("srun",))
    return Submission(loaded=loaded, site=site, run_arguments=(), work_dir=root, in_epochs=True, estimate=estimate)


def num_tokens(root: Path) -> int:
    """Return the tokens in the corpus's file: two bytes each, the vocabulary being small."""
    return (root / "data/tokens/D0_text_document.bin").stat().st_size // 2


def counted_iterations(root: Path) -> int:
    """Return the iterations of 8 epochs of the token files: sequences of 32 tokens, batches of 4, none incomplete."""
    return num_tokens(root) * 8 // 32 // 4


def test_plan_and_a_dry_run_know_the_length_by_an_estimate(tmp_path, names):
    planned = call(tmp_path, "plan", *names, "--variant", "main")
    assert planned.returncode == 0, planned.stderr
    (stated,) = re.findall(r"= ([\d,]+) iterations", planned.stdout)
    assert "an estimate: 8 epochs of D0" in planned.stdout and "counted when training starts" in planned.stdout
    shown = call(tmp_path, "submit", "pipeline", *names, "--variant", "main", "--dry-run")
    assert shown.returncode == 0, shown.stderr
    assert "$ megatron-cpt train " in shown.stdout and "length: an estimate: 8 epochs of D0" in shown.stderr
    assert not (tmp_path / "runs").exists()
    made = call(tmp_path, "submit", "pipeline", *names, "--variant", "main", "--only", "tokenize")
    assert made.returncode == 0, made.stderr[-3000:]
    counted = counted_iterations(tmp_path)
    assert int(stated.replace(",", "")) == counted  # the text is small and was looked at whole
    again = call(tmp_path, "plan", *names, "--variant", "main")
    assert f"= {counted:,} iterations" in again.stdout and "an estimate" not in again.stdout


def test_jobs_of_a_scheduler_need_no_iterations(tmp_path, names, monkeypatch):
    work = submission(tmp_path, monkeypatch)
    stages = {stage.name: stage for stage in pipeline_stages(work)}
    command = job_of(work, stages["train"]).command
    assert command[command.index("--train-iters") + 1] == "recorded"
    export = str(work.run.checkpoints_hf)
    assert f"cpt={export}" in stages["evaluate"].words and export in stages["evaluate"].reads
    with pytest.raises(LaunchError, match="--soup-last 2: .*once its token files are counted"):
        pipeline_stages(work, soup_last=2)


def test_a_job_reads_the_length_that_training_has_counted(tmp_path):
    words = ["--run", str(tmp_path), "--stage", "train", "--log-dir", "logs", "--train-iters"]
    recorded = parse_arguments([*words, "recorded", "--", "true"])
    run = RunDir(tmp_path)
    assert stage_length(recorded, run) is None
    verdict = chain_verdict([], iteration=0, train_iters=None, run_path=tmp_path, max_failures=2)
    assert verdict == ("run", "continuing at iteration 0 of a length in epochs")
    length = ["training.train_tokens=null", "training.train_iters=37"]
    loaded = load_config(CHECKOUT / "tasks/demo", "demo-5m", "300K", "base", overrides=length)
    write_resolved(loaded, run.config_path)
    assert stage_length(recorded, run) == 37
    assert stage_length(parse_arguments([*words, "12", "--", "true"]), run) == 12


@pytest.mark.slow
@pytest.mark.full
def test_a_task_that_init_writes_takes_epochs(tmp_path):
    assert call(tmp_path, "init", "t", "--model", "tiny").returncode == 0
    length = ["training.train_tokens=null", "training.train_epochs=8", "data.max_epochs=9"]
    planned = call(tmp_path, "plan", "--task", "t", *length)
    assert planned.returncode == 0 and "an estimate: 8 epochs of python" in planned.stdout, planned.stderr
    shown = call(tmp_path, "submit", "pipeline", "--task", "t", "--dry-run", *length)
    assert shown.returncode == 0 and "training.train_epochs=8" in shown.stdout, shown.stderr


def test_what_cannot_be_estimated_is_said(tmp_path, names):
    (tmp_path / "elsewhere/D0.jsonl").unlink()
    planned = call(tmp_path, "plan", *names, "--variant", "main")
    assert planned.returncode == 2 and "*.jsonl" in planned.stderr and "Traceback" not in planned.stderr
    wrong = call(tmp_path, "plan", *names, "--variant", "main", "data.tokenizer=nowhere")
    assert wrong.returncode == 2 and "data.tokenizer" in wrong.stderr and "Traceback" not in wrong.stderr


@pytest.mark.slow
@pytest.mark.full
@pytest.mark.timeout(900)
def test_the_pipeline_trains_the_epochs_of_the_tokens_it_made(tmp_path, names):
    less = ["training.train_epochs=1", "training.global_batch_size=64", "evaluation.eval_interval=50"]
    ended = call(tmp_path, "submit", "pipeline", *names, "--variant", "main", *less)
    assert ended.returncode == 0, ended.stderr[-4000:]
    run = RunDir(tmp_path / "runs/t/own/S/main")
    tokens = num_tokens(tmp_path)
    assert read_resolved(run.config_path).training.train_iters == tokens // 32 // 64
    (export,) = run.checkpoints_hf.glob("iter_*")
    assert export.name == f"iter_{tokens // 32 // 64:07d}"
    measured = json.loads((run.report / "evaluation/forgetting.json").read_text())
    assert {result["model"] for result in measured["results"]} == {"base", "cpt"}
    assert {job["state"] for job in ledger(tmp_path)} == {"finished"}
    again = call(tmp_path, "submit", "pipeline", *names, "--variant", "main", *less)
    assert again.returncode == 0, again.stderr[-4000:]
