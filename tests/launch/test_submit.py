"""What is refused before anything is queued, one line each, and the graph of a pipeline."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_cpt.config.loading.resolve import load_config
from megatron_cpt.config.loading.sources import CHECKOUT
from megatron_cpt.errors import LaunchError
from megatron_cpt.launch.scheduler.site import Site
from megatron_cpt.launch.submission.graph import chosen_stages, pipeline_stages
from megatron_cpt.launch.submission.submit import Submission
from megatron_cpt.run.ledger import append_record

TASK = """\
paths: {{runs_dir: {0}/runs, data_dir: {0}/data}}
data:
  tokenizer: tokenizer
  corpora:
    D0: {{documents: [D0.jsonl], tokens: [tokens/D0_text_document], validation_documents: [held.jsonl],
          validation: [tokens/held_text_document]}}
    D1: {{documents: [D1/*.jsonl], tokens: [tokens/D1]}}
  mix: {{D0: 0.5, D1: 0.5}}
sizes: {{S: {{training: {{train_iters: 100, precision: fp32}}, checkpoint: {{save_interval: 40}}}}}}
variants: {{main: {{init: {{from_path: {0}/base}}}}}}
"""


@pytest.fixture
def task(tmp_path: Path) -> Path:
    """A task whose documents, tokenizer and base model exist and whose tokens do not."""
    folder = tmp_path / "tasks" / "t"
    folder.mkdir(parents=True)
    (folder / "task.yaml").write_text(TASK.format(tmp_path))
    for name in (
        "data/D0.jsonl",
        "data/held.jsonl",
        "data/D1/a.jsonl",
        "data/tokenizer/tokenizer.json",
        "base/config.json",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    return folder


def submission(task: Path) -> Submission:
    names = ("--task", str(task), "--params", "demo-5m", "--size", "S")
    return Submission(loaded=load_config(task, "demo-5m", "S"), site=Site(), run_arguments=names, work_dir=task)


def submit(stage: str, task: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megatron_cpt", "submit", stage, "--task", str(task), "--params", "demo-5m"]
    environment = {"PATH": os.environ["PATH"], **variables}
    return subprocess.run(
        [*command, "--size", "S", *words], cwd=CHECKOUT, env=environment, capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--site", "nowhere"], "nowhere: no such site. Known: abci"),
        (["--site", "generic"], "both pbs/sites and slurm/sites have it"),
        (
            ["--site", "pbs/sites/generic.yaml", "training.global_batch_size=64"],
            "site: no queue. The site wants one. Give --queue",
        ),
        (["launch.nodes=0"], "launch.nodes is 0"),
        (["launch.walltime=1h"], "'1h' is not a walltime. Write '24:00:00'"),
        (["--depend", "afterok:1"], "launch.scheduler is local. A batch scheduler is needed"),
        (
            ["--site", "leonardo", "--account", "A", "--depend", "afterok:1.pbs1", "--dry-run"],
            "tokens/D0_text_document",
        ),
        (["--site", "leonardo", "--account", "A", "launch.walltime=48:00:00"], "the site allows 24:00:00. Shorten it"),
        (["--chain", "0", "--site", "leonardo", "--account", "A"], "a chain has at least one link"),
        ([], "tokens/D0_text_document"),
        (["data.mix=null"], "none of data.mix, data.rules and data.train_data_path is given"),
        (["init.from_path=nothing-there"], "init.from_path: nothing-there is no Hugging Face folder and no checkpoint"),
        (["init.from_path=variant:other"], "Train other first"),
    ],
)
def test_bad_input_is_refused_before_anything_is_queued(task, words, message):
    refused = submit("train", task, *words)
    assert refused.returncode == 2, refused.stdout + refused.stderr
    assert message in refused.stderr and "Traceback" not in refused.stderr
    assert not list((task.parents[1]).glob("runs/**/jobs/*.sh"))


def test_a_checkpoint_that_cannot_fit_the_disk_is_refused_with_the_numbers(task, monkeypatch):
    from megatron_cpt.launch.planning import plan
    from megatron_cpt.launch.submission import validate

    monkeypatch.setattr(plan, "free_bytes", lambda path: 10 << 20)
    chosen = submission(task)
    with pytest.raises(LaunchError, match=r"10.0 MiB free. 3 checkpoints of .* need .* Set checkpoint.keep_last"):
        validate.check_training(chosen.loaded, chosen.run, data_will_exist=True)


def test_the_graph_knows_what_needs_what_and_what_is_there(task):
    chosen = submission(task)
    stages = {stage.name: stage for stage in pipeline_stages(chosen, num_array_tasks=4, soup_last=2)}
    assert list(stages) == [
        "tokenize-D0", "merge-D0", "tokenize-D0-validation", "tokenize-D1", "build-index", "convert-in", "train",
        "convert-out", "soup", "evaluate", "report",
    ]  # fmt: skip
    assert stages["train"].needs == ("build-index", "convert-in")
    assert stages["build-index"].needs == ("tokenize-D0", "merge-D0", "tokenize-D0-validation", "tokenize-D1")
    assert stages["tokenize-D1"].num_array_tasks == stages["tokenize-D0"].num_array_tasks == 4
    assert stages["tokenize-D0-validation"].num_array_tasks is None
    assert stages["merge-D0"].needs == ("tokenize-D0",) and stages["merge-D0"].arguments[:2] == ("data", "merge")
    assert stages["tokenize-D1"].arguments[-2:] == ("--shard", "{array_index}/{num_array_tasks}")
    assert [Path(word).name for word in stages["soup"].arguments[2:4]] == ["iter_0000080", "iter_0000100"]
    assert not any(stage.is_done for stage in stages.values())
    data = task.parents[1] / "data" / "tokens"
    data.mkdir()
    for suffix in (".bin", ".idx", ".json"):
        (data / f"D0_text_document{suffix}").touch()
    append_record(chosen.run.jobs, "5", name="tokenize-D1", stage="tokenize", state="submitted", num_array_tasks=2)
    append_record(chosen.run.jobs, "5/0", state="finished")
    assert not done(chosen)["tokenize-D1"], "one of two array tasks has finished"
    append_record(chosen.run.jobs, "5/1", state="finished")
    chosen.run.checkpoints.mkdir(parents=True)
    (chosen.run.checkpoints / "latest_checkpointed_iteration.txt").write_text("100")
    now = done(chosen)
    assert [name for name in now if not now[name]] == ["tokenize-D0-validation", "convert-out", "evaluate", "report"]


def test_a_part_of_the_graph_can_be_chosen_by_kind_or_name(task):
    stages = pipeline_stages(submission(task))
    assert [stage.name for stage in chosen_stages(stages, ["tokenize-D1", "convert"])] == [
        "tokenize-D1", "convert-in", "convert-out",
    ]  # fmt: skip
    assert chosen_stages(stages, []) == stages
    with pytest.raises(LaunchError, match="--only tokenise: no such stage"):
        chosen_stages(stages, ["tokenise"])
    shown = submit("pipeline", task, "--only", "tokenize", "--dry-run")
    assert shown.returncode == 0 and shown.stdout.count("$ megatron-cpt tokenize") == 3


def done(chosen: Submission) -> dict[str, bool]:
    return {stage.name: stage.is_done for stage in pipeline_stages(chosen, num_array_tasks=2)}


def test_a_local_pipeline_names_missing_documents_and_shows_its_commands_in_a_dry_run(task):
    shown = submit("pipeline", task, "--dry-run")
    assert shown.returncode == 0, shown.stderr
    assert [line.split()[2] for line in shown.stdout.splitlines()] == [
        "tokenize", "tokenize", "tokenize", "blend", "convert", "train", "convert", "evaluate", "report",
    ]  # fmt: skip
    (task.parents[1] / "data/D0.jsonl").unlink()
    refused = submit("pipeline", task)
    assert refused.returncode == 2 and "data.corpora.D0: D0.jsonl matches nothing" in refused.stderr
