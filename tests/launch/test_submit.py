"""What is refused before anything is queued, one line each, and the graph of a pipeline."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_cpt.config.loading.resolve import load_config
from megatron_cpt.config.loading.sources import CHECKOUT
from megatron_cpt.errors import LaunchError
from megatron_cpt.launch.scheduler.site import Site
from megatron_cpt.launch.submission.graph import chosen_stages, current_stages, pipeline_stages
from megatron_cpt.launch.submission.submit import Submission
from megatron_cpt.run.ledger import append_record
from megatron_cpt.run.made_of import fingerprint

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
TOKENIZER = """{"version": "1.0", "truncation": null, "padding": null, "added_tokens": [{"id": 1, "content": "</s>",
"single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true}], "normalizer": null,
"pre_tokenizer": null, "post_processor": null, "decoder": null,
"model": {"type": "WordLevel", "vocab": {"a": 0, "</s>": 1}, "unk_token": "a"}}"""


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
    (tmp_path / "data/tokenizer/tokenizer.json").write_text(TOKENIZER)
    (tmp_path / "data/tokenizer/tokenizer_config.json").write_text('{"eos_token": "</s>"}')
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
        (["--depend", "afterok:1"], "--depend afterok:1: launch.scheduler is local; it runs everything at once"),
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
        (["--queue", "q"], "--queue q: launch.scheduler is local; it has no queues. Leave it out, or name a --site."),
        (["--account", "a"], "--account a: launch.scheduler is local"),
        (["--chain", "2"], "--chain 2: launch.scheduler is local; it has no walltime; launch.max_restarts continues"),
        (["--max-failures", "2"], "--max-failures 2: launch.scheduler is local"),
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
    assert stages["merge-D0"].needs == ("tokenize-D0",) and stages["merge-D0"].words[:2] == ("data", "merge")
    assert stages["tokenize-D1"].words[-2:] == ("--shard", "{array_index}/{num_array_tasks}")
    assert [Path(word).name for word in stages["soup"].words[2:4]] == ["iter_0000080", "iter_0000100"]
    assert stages["tokenize-D0"].joined_by == "merge-D0" and stages["tokenize-D1"].joined_by is None
    assert current(chosen) == set()


def test_done_means_made_from_these_inputs(task):
    """Each row changes one thing of a pipeline whose every job finished; what is made of it is missing afterwards."""
    chosen = submission(task)
    data = task.parents[1] / "data"
    last = chosen.run.checkpoints_hf / "iter_0000100"
    made = [data / "tokens/D0_text_document.bin", data / "tokens/D1/a_text_document.bin", last / "config.json"]
    made += [data / "tokens/held_text_document.bin", chosen.run.report / "evaluation/forgetting.json"]
    for path in (*made, chosen.run.report / "report.md", chosen.run.metrics_path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    stages = pipeline_stages(chosen, num_array_tasks=2)
    for number, stage in enumerate(stages):
        for task_number in range(stage.num_array_tasks or 1):
            job = f"{number}/{task_number}" if stage.num_array_tasks else str(number)
            append_record(chosen.run.jobs, str(number), name=stage.name, num_array_tasks=stage.num_array_tasks)
            inputs = fingerprint(stage.reads, stage.words)
            append_record(chosen.run.jobs, job, state="finished", inputs=inputs, outputs=fingerprint(stage.writes))
    everything = {stage.name for stage in stages}
    assert current(chosen) == everything - {"train", "convert-out", "evaluate", "report"}, "it is not trained"
    chosen.run.checkpoints.mkdir(parents=True)
    (chosen.run.checkpoints / "latest_checkpointed_iteration.txt").write_text("100")
    convert = next(number for number, stage in enumerate(stages) if stage.name == "convert-out")
    stage = stages[convert]
    append_record(chosen.run.jobs, str(convert), inputs=fingerprint(stage.reads, stage.words))
    assert current(chosen) == everything

    def missing_after(path: Path, text: str | None) -> set[str]:
        before = path.read_text(), path.stat()
        path.unlink() if text is None else path.write_text(text)
        found = everything - current(chosen)
        path.write_text(before[0])
        os.utime(path, ns=(before[1].st_atime_ns, before[1].st_mtime_ns))
        assert current(chosen) == everything
        return found

    behind = {"evaluate", "report"}
    assert missing_after(data / "D0.jsonl", '{"text": "appended"}') == {"tokenize-D0", "merge-D0"}
    assert missing_after(data / "D1/a.jsonl", "{}{}") == {"tokenize-D1"}
    assert missing_after(data / "held.jsonl", "{}{}") == {"tokenize-D0-validation", *behind}
    assert missing_after(data / "tokens/D1/a_text_document.bin", None) == {"tokenize-D1"}
    assert missing_after(data / "tokens/D0_text_document.bin", None) == {"tokenize-D0", "merge-D0"}
    assert missing_after(last / "config.json", None) == {"convert-out", *behind}
    assert missing_after(chosen.run.report / "report.md", None) == {"report"}
    (data / "D1/b.jsonl").write_text("{}")
    assert everything - current(chosen) == {"tokenize-D1"}, "a new file"
    (data / "D1/b.jsonl").unlink()
    more = {stage.name for stage in pipeline_stages(chosen, num_array_tasks=2, soup_last=2)}
    assert more - current(chosen, soup_last=2) == {"soup", *behind}, "a soup is evaluated, also of a finished pipeline"
    append_record(chosen.run.jobs, "90", name="tokenize-D1", state="failed", stage="tokenize")
    assert "tokenize-D1" not in current(chosen), "the newest job of a stage counts"


def current(chosen: Submission, **options: int) -> set[str]:
    return current_stages(chosen, pipeline_stages(chosen, num_array_tasks=2, **options))


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


def test_a_local_pipeline_names_missing_documents_and_shows_its_commands_in_a_dry_run(task):
    shown = submit("pipeline", task, "--dry-run")
    assert shown.returncode == 0, shown.stderr
    assert [line.split()[2] for line in shown.stdout.splitlines()] == [
        "tokenize", "tokenize", "tokenize", "blend", "convert", "train", "convert", "evaluate", "report",
    ]  # fmt: skip
    (task.parents[1] / "data/D0.jsonl").unlink()
    refused = submit("pipeline", task)
    assert refused.returncode == 2 and "data.corpora.D0.documents: D0.jsonl: " in refused.stderr
    assert "Traceback" not in refused.stderr
    shown = submit("pipeline", task, "--dry-run")
    assert shown.returncode == 2 and "documents: D0.jsonl: " in shown.stderr, "what is missing is listed"
    assert shown.stdout.count("$ megatron-cpt") == 9, "and the commands are shown all the same"


@pytest.mark.parametrize("stage", ["train", "pipeline", "lr-find", "sweep"])
def test_a_dry_run_shows_the_scripts_of_what_cannot_run_yet_and_lists_what_is_missing(task, stage):
    (task.parents[1] / "data/D0.jsonl").unlink()
    (task.parents[1] / "base/config.json").unlink()
    more = ["--grid", "optimizer.lr=1e-3,2e-3", "evaluation.eval_interval=50"] if stage == "sweep" else []
    shown = submit(stage, task, *more, "--site", "leonardo", "--account", "A", "--dry-run")
    assert shown.returncode == 2 and "Traceback" not in shown.stderr
    assert f"#SBATCH --job-name=t-{'train' if stage == 'pipeline' else stage}" in shown.stdout
    missing = "data.corpora.D0.documents: D0.jsonl: " if stage == "pipeline" else "tokens/D0_text_document"
    assert missing in shown.stderr and "init.from_path" in shown.stderr
    assert not (task.parents[1] / "runs").exists()


def test_what_a_path_in_documents_means_is_one_thing(task, tmp_path, monkeypatch):
    """Absolute, `..`, folder, glob, glob of folders: the check, the graph and tokenize agree on the files."""
    from megatron_cpt.data.reading.documents import list_sources
    from megatron_cpt.data.shards.corpus_documents import document_inputs, document_problems

    data = tmp_path / "data"
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    for path in (tmp_path / "elsewhere/x.jsonl", tmp_path / "elsewhere/deep/y.jsonl", data / "D1" / "z.jsonl"):
        path.write_text('{"text": "a"}\n')
    chosen = submission(task)
    rows = {
        f"{tmp_path}/elsewhere/x.jsonl": ["x"],
        f"{tmp_path}/elsewhere/*.jsonl": ["x"],
        f"{tmp_path}/elsewhere": ["x", "y"],
        f"{tmp_path}/else*": ["x", "y"],
        f"{tmp_path}/elsewhere/**/*.jsonl": ["x", "y"],
        "../elsewhere/x.jsonl": ["x"],
        "../elsewhere/*": ["x", "y"],
        "D1": ["a", "z"],
        "D1/": ["a", "z"],
        "D1/[z]*": ["z"],
        "D0.jsonl": ["D0"],
        "nothing": None,
        f"{tmp_path}/nothing/*.jsonl": None,
        "D1/*.csv": None,
    }
    for pattern, expected in rows.items():
        corpus = dataclasses.replace(chosen.loaded.config.data.corpora["D1"], documents=(pattern,))
        data_config = dataclasses.replace(
            chosen.loaded.config.data, corpora={**chosen.loaded.config.data.corpora, "D1": corpus}
        )
        config = dataclasses.replace(chosen.loaded.config, data=data_config)
        problems = document_problems(config)
        assert bool(problems) == (expected is None), pattern
        assert all("data.corpora.D1.documents" in problem and pattern in problem for problem in problems)
        own = dataclasses.replace(chosen, loaded=dataclasses.replace(chosen.loaded, config=config))
        (stage,) = (stage for stage in pipeline_stages(own) if stage.name == "tokenize-D1")
        words = stage.words[2 : stage.words.index("--tokenizer")]
        assert list(words) == document_inputs(config.paths, [pattern]) == list(stage.reads[:-1])
        if expected is not None:
            assert sorted(source.path.stem for source in list_sources(words)) == sorted(expected), pattern
