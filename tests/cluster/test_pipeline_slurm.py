"""The whole graph, from documents to soup and report, on a real Slurm: two nodes, srun, torchrun, real training."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_cpt.launch.scheduler.choice import scheduler_of
from megatron_cpt.run.directory import RunDir
from megatron_cpt.run.ledger import read_jobs
from tests.cluster.conftest import ROOT, Cluster

pytestmark = [pytest.mark.cluster, pytest.mark.full, pytest.mark.timeout(900)]

SITE = {
    "launch": {"scheduler": "slurm", "nodes": 2, "gpus_per_node": 1, "walltime": 600},
    "site": {
        "queue": "debug",
        "processes": "node",
        "launcher": "srun --kill-on-bad-exit=1 --nodes={nodes} --ntasks={processes} --ntasks-per-node=1",
        "environment": {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"},
    },
}
WORDS = "the a model of language learns from old and new text without losing what it knew before".split()


def write_documents(data: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    texts = [" ".join(WORDS[(number * step) % len(WORDS)] for step in range(60)) for number in range(1, 121)]
    (data / "D0").mkdir(parents=True)
    for part in range(2):
        lines = [json.dumps({"text": text}) for text in texts[part::2]]
        (data / "D0" / f"part{part}.jsonl").write_text("\n".join(lines) + "\n")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    (data / "tokenizer").mkdir()
    tokenizer.save(str(data / "tokenizer" / "tokenizer.json"))
    (data / "tokenizer" / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))


def submit(names: list[str], *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megatron_cpt", "submit", "pipeline", *options, *names]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_a_pipeline_runs_from_documents_to_soup_and_a_second_submission_finds_nothing_missing(
    slurm, tmp_path, make_run
):
    write_documents(tmp_path / "data")
    corpus = {
        "documents": ["D0/*.jsonl"],
        "tokens": ["tokens/D0"],
    }
    names = make_run(
        tmp_path,
        SITE,
        data={"tokenizer": "tokenizer", "corpora": {"D0": corpus}, "mix": {"D0": 1.0}, "max_epochs": 100},
    )
    options = ["--array-tasks", "2", "--soup-last", "2"]
    shown = submit(names, *options, "--dry-run")
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.count("#SBATCH --job-name") == 6 and "--array=0-1" in shown.stdout
    assert not (tmp_path / "runs").exists(), "a dry run writes nothing"

    submitted = submit(names, *options)
    assert submitted.returncode == 0, submitted.stderr
    ids = submitted.stdout.split()
    run = RunDir(tmp_path / "runs/t/params/S/main")
    cluster = Cluster.__new__(Cluster)
    cluster.run = run
    cluster.submission = type("Slurm", (), {"scheduler": "slurm"})()
    states = cluster.wait(*ids, seconds=800)
    assert [state.state for state in states] == ["finished"] * 6, cluster.logs()
    assert read_jobs(run.jobs)[ids[2]]["hosts"] == ["cpt1", "cpt2"]
    metrics = [json.loads(line) for line in run.metrics_path.read_text().splitlines()]
    assert metrics[0]["world_size"] == 2 and metrics[-1]["reason"] == "finished"
    assert (run.path / "soup/last_2/merge_info.json").is_file()
    assert (run.report / "report.md").is_file()
    assert all((run.logs / ids[2] / f"rank_0000{rank}.log").is_file() for rank in (0, 1))

    again = submit(names, *options)
    assert again.returncode == 0 and again.stdout == "", again.stderr
    (run.report / "report.md").unlink()
    repaired = submit(names, *options)
    assert len(repaired.stdout.split()) == 1, repaired.stderr
    subprocess.run(["scancel", *repaired.stdout.split()], check=True)
    assert scheduler_of("slurm").states(ids[:1])[ids[0]].state == "finished"
