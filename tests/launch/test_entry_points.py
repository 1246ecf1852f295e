"""Scripts under the names that other systems' users know, and Aurora's variables."""

import os
import subprocess
from pathlib import Path

import pytest

from megatron_cpt.config.loading.sources import CHECKOUT
from megatron_cpt.errors import ConfigError
from megatron_cpt.files import write_json
from megatron_cpt.launch.submission.aurora_variables import overrides_from


def run_script(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), **variables}
    return subprocess.run(words, cwd=CHECKOUT, env=environment, capture_output=True, text=True, timeout=60)


@pytest.fixture
def task(tmp_path: Path) -> list[str]:
    """Task, params and size of a run with a data list of one tiny shard; enough for a dry run."""
    import numpy as np

    from megatron_cpt.data.shards.indexed import bin_path, idx_path, manifest_path, write_index

    folder = tmp_path / "tasks" / "t"
    folder.mkdir(parents=True)
    data = tmp_path / "data"
    data.mkdir()
    prefix = data / "D_text_document"
    np.ones(40_000, dtype=np.uint16).tofile(bin_path(prefix))
    write_index(idx_path(prefix), np.dtype(np.uint16), np.array([40_000]))
    identity = {"name": "tok", "kind": "huggingface", "hash": "0", "vocab_size": 100, "eod_id": 0}
    write_json(manifest_path(prefix), {"documents": 1, "tokens": 40_000, "tokenizer": identity})
    (folder / "task.yaml").write_text(
        f"paths: {{runs_dir: {tmp_path}/runs, data_dir: {data}}}\n"
        "data: {corpora: {D: {tokens: [D_text_document]}}, mix: {D: 1.0}, max_epochs: 1000}\n"
        "sizes: {S: {training: {train_iters: 10, global_batch_size: 32, micro_batch_size: 2, precision: fp32}}}\n"
        "variants: {main: {}}\n"
    )
    return [str(folder), "demo-5m", "S"]


@pytest.mark.parametrize(
    ("variables", "flags", "settings"),
    [
        ({"TRAIN_TOKENS": "22000000000", "LR": "0.0002"}, [], ["training.train_tokens=22000000000", "optimizer.lr=0.0002"]),
        ({"LR_WARMUP_FRACTION": "0.01"}, [], ["schedule.lr_warmup=0.010000"]),
        ({"LR_WARMUP_FRACTION": "1"}, [], ["schedule.lr_warmup=1.000000"]),
        ({"LOAD": "ckpt", "SAVE": "out", "SAVE_INTERVAL": "5", "MICRO_BATCH": "2"}, ["--finetune"],
         ["training.micro_batch_size=2", "init.from_path=ckpt", "paths.runs_dir=out", "checkpoint.save_interval=5",
          "init.load=weights"]),
        ({}, ["--universal-checkpoint"], ["init.load=full"]),
        ({}, ["--universal-checkpoint", "--finetune"], ["init.load=weights"]),
        ({"LOADEDMODULES": "gcc", "PATH": "/bin"}, [], []),
    ],
)  # fmt: skip
def test_each_variable_becomes_a_setting(variables, flags, settings):
    assert overrides_from(variables, flags) == settings


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"LR_WARMUP_FRAC": "0.1"}, "LR_WARMUP_FRAC: not a variable"),
        ({"SAVE_EVERY": "5", "TRAIN_TOKEN": "5"}, "SAVE_EVERY: not a variable"),
        ({"LR_WARMUP_FRACTION": "2000"}, "from 0 to 1"),
        ({"GRAD_ACC_STEPS": "2", "GLOBAL_BATCH": "8"}, "which decides the same"),
        ({"TRAIN_TOKENS": "2", "TRAIN_ITERS": "8"}, "A run has one length"),
    ],
)
def test_an_unknown_or_contradicting_variable_is_an_error(variables, message):
    with pytest.raises(ConfigError, match=message):
        overrides_from(variables)


def test_gradient_accumulation_steps_become_the_global_batch_of_the_layout(task):
    names = ["--task", task[0], "--params", task[1], "--size", task[2], "--site", "pbs/sites/aurora.yaml"]
    shown = run_script("tools/train.sh", "--account", "A", *names, "--dry-run", "launch.nodes=2", GRAD_ACC_STEPS="3")
    assert shown.returncode == 0, shown.stderr
    assert "training.global_batch_size=144" in shown.stdout  # 2 x 3 x 24 ranks
    refused = run_script("tools/train.sh", *names, "--dry-run", TRAIN_TOKEN="5")
    assert refused.returncode == 2 and "TRAIN_TOKEN: not a variable" in refused.stderr


@pytest.mark.parametrize(
    ("folder", "depend", "words"),
    [
        ("pbs", "afterok:1.pbs1:2.pbs1", ["#PBS -l select=4", "qsub -W depend=afterok:1.pbs1:2.pbs1"]),
        ("slurm", "afterok:1:2", ["#SBATCH --nodes=4", "--dependency=afterok:1:2 --kill-on-invalid-dep=yes"]),
    ],
)
def test_run_train_takes_the_seeds_arguments_in_their_order(task, folder, depend, words):
    for script in ("run_train.sh", "run_train_with_deps.sh"):
        shown = run_script(f"{folder}/{script}", *task, "4", depend, "--dry-run", "--account", "mine",
                           "training.global_batch_size=64", MEGATRON_CPT_QUEUE="q")  # fmt: skip
        assert shown.returncode == 0, shown.stderr
        assert all(word in shown.stdout for word in words), shown.stdout
    bare = run_script(f"{folder}/run_train.sh", task[0])
    assert bare.returncode == 2 and "Usage" in bare.stdout


def test_what_the_site_still_needs_is_named_before_anything_is_queued(task):
    refused = run_script("pbs/run_train.sh", *task, "4", "--dry-run", "training.global_batch_size=64")
    assert refused.returncode == 2
    assert "site: no account. The site wants one. Give --account, MEGATRON_CPT_ACCOUNT" in refused.stderr
