"""Scripts under the names that other systems' users know, and Aurora's variables."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

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
        ({"LR_WARMUP_FRACTION": "0.01"}, [], ["schedule.lr_warmup=0.01"]),
        ({"LR_WARMUP_FRACTION": "1"}, [], ["schedule.lr_warmup=1.0"]),
        ({"LOAD": "ckpt", "SAVE": "out", "SAVE_INTERVAL": "5", "MICRO_BATCH": "2"}, ["--finetune"],
         ["training.micro_batch_size=2", "init.from_path=ckpt", "paths.runs_dir=out", "checkpoint.save_interval=5",
          "init.load=weights"]),
        ({"LR_WARMUP_FRAC": "4e-7"}, [], ["schedule.lr_warmup=0.0000004"]),
        ({"LR_WARMUP_FRACTION": "0"}, [], ["schedule.lr_warmup=0.0"]),
        ({"TP": "2", "PP": "4", "SP": "2", "SEQ_LEN": "8192"}, [],
         ["training.seq_length=8192", "parallel.tensor_model_parallel_size=2",
          "parallel.pipeline_model_parallel_size=4", "parallel.context_parallel_size=2"]),
        ({"OPT": "adamw", "ZERO_STAGE": "0", "DTYPE": "bf16", "USE_ACTIVATION_CHECKPOINTING": "1"}, [],
         ["optimizer.name=adam", "training.precision=bf16", "parallel.use_distributed_optimizer=false",
          "parallel.recompute_granularity=full"]),
        ({"LR_DECAY_ITERS": "5000", "TOKENIZER_MODEL": "/t/tokenizer.model", "WEIGHT_DECAY": ""}, [],
         ["schedule.lr_decay=5000 iterations", "data.tokenizer=/t/tokenizer.model"]),
        ({"WORLD_SIZE": "24", "DATA_CACHE_PATH": "x", "TIMING_LOG_LEVEL": "1", "HOSTFILE": "h"}, [], []),
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
        ({"LR_WARMUP_FRACTIN": "0.1"}, "LR_WARMUP_FRACTIN: not a variable .* Near: LR_WARMUP_FRACTION"),
        ({"LR_WARMUP_FRAC": "0.1", "LR_WARMUP_FRACTION": "0.2"}, "They mean the same"),
        ({"TRAIN_TOKENS": "2", "TRAIN_ITER": "8"}, "A run has one length"),
        ({"OPT": "sophiag"}, r"OPT: 'sophiag' has no setting here.*optimizer.name"),
        ({"ZERO_STAGE": "3"}, "ZERO_STAGE: '3' has no setting here.*recompute_granularity"),
        ({"DTYPE": "fp16"}, "DTYPE: 'fp16' has no setting here"),
        ({"MODEL_ARCH": "7B"}, "MODEL_ARCH: has no setting here. Name the architecture with --params"),
        ({"NSTAGES": "2"}, "NSTAGES: has no setting here"),
        ({"LR_DECAY_ITERS": "1e4"}, "LR_DECAY_ITERS: '1e4'. A whole number is needed"),
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


# every variable that setParams, set_args and get_training_args of the original read from the environment
ORIGINAL = (
    "TP PP SP SEQ OPT DTYPE BE CCL NCCL WEIGHT_DECAY ADAM_BETA1 ADAM_BETA2 ADAM_EPS CLIP_GRAD LR LR_DECAY_STYLE "
    "LR_WARMUP_FRAC LR_DECAY_ITERS NO_LLAMA NO_TENSORBOARD NO_FLASH_ATTN OVERRIDE_CKPT_OPT_PARAM TRAIN_SPLIT VAL_SPLIT "
    "TEST_SPLIT TIMING_LOG_LEVEL EVAL_INTERVAL EVAL_ITERS SAVE_INTERVAL LOG_INTERVAL SAVE LOAD HEADS NHEADS NLAYERS "
    "NUM_LAYERS HIDDEN NUM_KV_HEAD FFN_HIDDEN_SIZE ZERO_STAGE MICRO_BATCH GRAD_ACC_STEPS GLOBAL_BATCH ACT_CKPT_NUM_LAYERS "
    "USE_ACTIVATION_CHECKPOINTING TRAIN_TOKENS TRAIN_ITERS TRAIN_ITER TOKENIZER_TYPE TOKENIZER_MODEL DATA_FILE_LIST "
    "DATA_CACHE_PATH DS_CONFIG EXEC LAUNCH_CMD LAUNCH_WITH HOSTFILE NGPU_PER_HOST WORLD_SIZE MUP_BASE_WIDTH DEPTH_BASE "
    "INIT_METHOD_STD MIN_LR SEQ_LEN MODEL_ARCH NSTAGES"
).split()


def test_every_variable_of_the_original_is_a_setting_harmless_or_refused_by_name():
    from megatron_cpt.config.settings.schema import RunConfig
    from megatron_cpt.launch.submission import aurora_names as names
    from megatron_cpt.launch.submission.aurora_variables import SPECIAL

    groups = [names.SETTINGS, names.SAME, names.VALUES, names.REFUSED, names.HARMLESS, SPECIAL]
    for name in ORIGINAL:
        assert sum(name in group for group in groups) == 1, name
    sections = {field.name: field.type for field in dataclasses.fields(RunConfig)}
    settings = [*names.SETTINGS.values(), *(item for choice in names.VALUES.values() for item in choice.values())]
    for key in settings:
        section, _, field = key.partition("=")[0].partition(".")
        assert field in {found.name for found in dataclasses.fields(sections[section])}, key


def test_show_config_shows_what_the_variables_become(task):
    names = ["--task", task[0], "--params", task[1], "--size", task[2]]
    shown = run_script(sys.executable, "-m", "megatron_cpt", "show-config", "--from-environment", "--finetune", *names,
                       LR="4e-4", LR_WARMUP_FRAC="4e-7", GRAD_ACC_STEPS="3", OPT="adamw", SP="1")  # fmt: skip
    assert shown.returncode == 0, shown.stderr
    found = yaml.safe_load(shown.stdout)
    assert float(found["optimizer"]["lr"]) == 4e-4
    assert float(found["schedule"]["lr_warmup"]) == 4e-7
    assert found["training"]["global_batch_size"] == 6 and found["init"]["load"] == "weights"
    refused = run_script(
        sys.executable, "-m", "megatron_cpt", "show-config", "--from-environment", *names, ZERO_STAGE="3"
    )
    assert refused.returncode == 2 and "ZERO_STAGE: '3' has no setting here" in refused.stderr
