"""The recipes: real sizes load and render for real sites, and each mini runs, in its short form."""

import importlib
import os
import re
import shlex
import string
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from tokenizers import Tokenizer, models

from megatron_cpt.config.loading.resolve import load_config
from megatron_cpt.config.settings.derived import train_iters
from megatron_cpt.data.shards.masked import MaskedShardWriter
from megatron_cpt.launch.planning.plan import plan_run
from megatron_cpt.verbs.dispatch import load_verb
from tests.tolerances import assert_fp64_rounding

ROOT = Path(__file__).resolve().parents[2]
TASKS = ROOT / "tasks"
PARAMS = {
    "llmjp-v4-midtraining": ("llm-jp-7.7b", "llm-jp-1.3b", "llm-jp-13b"),
    "aurora-cpt": ("auroragpt-7b",),
    "openseek-cpt": ("openseek-1.4b-a0.4b",),
    "snakmodel-danish": ("llama2-7b",),
    "latxa-instruct": ("llama3-8b",),
}
SITES = {"abci": "pbs", "aurora": "pbs", "leonardo": "slurm"}
GPU_GIB = {
    "llmjp-v4-midtraining": 140,
    "aurora-cpt": 64,
    "openseek-cpt": 80,
    "snakmodel-danish": 80,
    "latxa-instruct": 64,
}
"""Memory of the accelerator that each system runs on."""
FIRST_VARIANT = {"llmjp-v4-midtraining": "decay", "aurora-cpt": "D1"}
# Iterations that the systems themselves state, and a length where it is counted from token files.
PUBLISHED_ITERATIONS = {
    ("llmjp-v4-midtraining", "80B"): 9958,
    ("snakmodel-danish", "26B"): 12500,
    ("openseek-cpt", "7.5M"): 7325,
}


IDENTITY = {"name": "t", "kind": "huggingface", "hash": "0", "vocab_size": 8192, "eod_id": 0}
SMALL = ("model.num_layers=8", "model.hidden_size=1280", "model.ffn_hidden_size=1280", "model.vocab_size=8192")


def names_of(task: str, part: str) -> list[str]:
    return [name for name in yaml.safe_load((TASKS / task / "task.yaml").read_text())[part] if name != "mini"]


def real_runs() -> list[tuple[str, str, str, str]]:
    return [
        (task, params, size, variant)
        for task, models in PARAMS.items()
        for params in models
        for size in names_of(task, "sizes")
        for variant in names_of(task, "variants")
    ]


def length_of(task: str) -> list[str]:
    return ["training.train_iters=1144"] if task == "latxa-instruct" else []


@pytest.mark.parametrize(("task", "params", "size", "variant"), real_runs(), ids=lambda value: value)
def test_each_variant_of_each_real_size_is_a_valid_run_that_fits_its_accelerators(task, params, size, variant):
    config = load_config(TASKS / task, params, size, variant, overrides=length_of(task)).config
    plan = plan_run(config, gpu_memory_bytes=GPU_GIB[task] << 30)
    assert plan.fits_memory, f"{plan.peak_bytes / 2**30:.0f} GiB"
    if (task, size) in PUBLISHED_ITERATIONS and params == PARAMS[task][0]:
        assert train_iters(config.training) == PUBLISHED_ITERATIONS[task, size]


@pytest.mark.parametrize("task", PARAMS)
def test_each_variant_of_the_mini_is_a_valid_run(task):
    recipe = importlib.import_module(f"tasks.{task}.mini").RECIPE
    for variant in names_of(task, "variants"):
        settings = [f"training.train_iters={30}"] if task == "latxa-instruct" else []
        if variant == "D0":
            settings.append("schedule.lr_hold=1e-3")  # the mini scales the rates
        config = load_config(TASKS / task, recipe.params, "mini", variant, overrides=settings).config
        assert_fp64_rounding(sum(config.data.mix.values()), 1.0 if config.data.mix else 0.0)
        assert config.training.precision == "fp32" and config.launch.nodes == 1


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("task", [task for task in PARAMS if task != "latxa-instruct"])
def test_the_pipeline_of_a_real_size_renders_for_real_sites(task, site, tmp_path):
    answer = submit(tmp_path, task, "pipeline", site, "--chain", "2")
    assert directive(site) in answer
    assert answer.count("-m megatron_cpt tokenize") >= 1
    assert answer.count("-m megatron_cpt train") == 2


@pytest.mark.parametrize("site", SITES)
def test_preparing_chats_is_a_cpu_job_of_its_own_and_training_follows_it(site, tmp_path):
    command = "data prepare-chat --input raw/*.jsonl --tokenizer t --output-prefix p"
    answer = submit(tmp_path, "latxa-instruct", "job", site, "--name", "prepare-chat", "--command", command)
    assert directive(site) in answer and "-m megatron_cpt data prepare-chat" in answer
    if site == "leonardo":
        assert "--partition=lrd_all_serial" in answer and "--gres" not in answer
    for name in ("chat-1M_chat", "text-packed_text", "chat-1M_held_out_eu_chat", "chat-1M_held_out_en_chat"):
        write_packs(tmp_path / "data" / "tokens" / f"{name}_document", 4000)
    answer = submit(
        tmp_path, "latxa-instruct", "train", site, settings=("data.tokenizer=null", "training.seq_length=32")
    )
    assert directive(site) in answer and answer.count("-m megatron_cpt train") == 1


def submit(folder: Path, task: str, stage: str, site: str, *words: str, settings: tuple[str, ...] = ()) -> str:
    """Return what a dry run of a recipe's first real size says, for a small model: disks of tests are small."""
    size, params, variant = names_of(task, "sizes")[0], PARAMS[task][0], FIRST_VARIANT.get(task, "main")
    config = load_config(TASKS / task, params, size, variant).config
    settings = (*place_inputs(config, folder), *SMALL, *settings)
    if site == "aurora":
        settings = (*settings, "training.global_batch_size=3072")  # twelve tiles a node
    run = ["--task", f"tasks/{task}", "--params", params, "--size", size, "--variant", variant]
    command = [sys.executable, "-m", "megatron_cpt", "submit", stage, "--dry-run", *run, "--site", site]
    command += ["--account", "PLACEHOLDER", *words, *settings]
    answer = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=60)
    assert answer.returncode == 0, answer.stderr
    assert not (folder / "runs").exists()
    return answer.stdout


def directive(site: str) -> str:
    return {"pbs": "#PBS -P PLACEHOLDER", "slurm": "#SBATCH --account=PLACEHOLDER"}[SITES[site]]


def place_inputs(config, folder: Path) -> list[str]:
    """Make files where a run looks for its inputs before anything is queued; return the settings that point there."""
    data, base = folder / "data", folder / "base"
    for corpus in config.data.corpora.values():
        for name in (*corpus.documents, *corpus.validation_documents):
            (data / name).mkdir(parents=True, exist_ok=True)
            (data / name / "part.jsonl").write_text('{"text": "x"}\n')
    folder = data / config.data.tokenizer
    folder.mkdir(parents=True, exist_ok=True)
    Tokenizer(models.WordLevel({"x": 0, "<end>": 1}, unk_token="x")).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')
    base.mkdir(parents=True, exist_ok=True)
    (base / "config.json").write_text("{}")
    return [f"paths.data_dir={data}", f"init.from_path={base}", "checkpoint.keep_last=1"]


def write_packs(prefix: Path, number: int) -> None:
    """Write a packed shard of `number` packs of 32 tokens, all learned."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    with MaskedShardWriter(prefix, np.dtype(np.uint16)) as writer:
        mask = np.tile(np.array([3] + [1] * 31, np.uint8), number)
        writer.add(np.ones(32 * number, np.uint16), mask, np.full(number, 32))
        writer.finish({"tokenizer": IDENTITY, "packed": {"seq_length": 32, "method": "best-fit"}})


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    """Where the short forms make their runs: the base model of the first serves the others."""
    return tmp_path_factory.mktemp("recipes")


@pytest.mark.slow
@pytest.mark.full
@pytest.mark.parametrize("task", PARAMS)
def test_the_short_form_of_each_mini_runs_and_its_checks_hold(task, directory):
    command = [sys.executable, "-m", f"tasks.{task}.mini", "--short", "--directory", directory]
    answer = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=280)
    assert answer.returncode == 0, (answer.stdout + answer.stderr)[-3000:]
    assert f"{task}: all done and checked" in answer.stdout


def test_make_recipes_runs_every_recipe_and_nothing_else():
    answer = subprocess.run(["make", "-n", "recipes"], cwd=ROOT, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    assert all(task in answer.stdout for task in PARAMS)
    assert {path.parent.name for path in TASKS.glob("*/mini.py")} == set(PARAMS)


@pytest.mark.parametrize("task", PARAMS)
def test_each_readme_says_question_data_commands_cost_and_result(task):
    text = (TASKS / task / "README.md").read_text()
    for heading in ("## Question", "## Data", "## Commands", "## Cost", "## The mini"):
        assert heading in text, heading
    for word in ("hub download", "HF_ENDPOINT", "pbs/run_", "slurm/run_", "megatron-cpt plan", "--account"):
        assert word in text, word


@pytest.mark.parametrize("task", PARAMS)
def test_each_command_of_a_readme_has_arguments_that_its_verb_takes(task):
    """They name clusters and data sets that are not here, so they are parsed and not run."""
    blocks = re.findall(r"^```bash\n(.*?)^```", (TASKS / task / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    variables: dict[str, str] = {}
    commands = []
    for line in "".join(blocks).replace("\\\n", " ").splitlines():
        words = shlex.split(string.Template(line).safe_substitute(variables), comments=True)
        while words and re.fullmatch(r"[A-Za-z_]+=.*", words[0], re.DOTALL):
            name, _, value = words.pop(0).partition("=")
            variables[name] = value
        commands += [words] if words and words[0] not in ("export", "cp") else []
    assert commands
    for words in commands:
        if words[0] == "megatron-cpt":
            parse(words[1:])
        else:
            assert (ROOT / words[0]).is_file(), words[0]
        if "--command" in words:
            parse(shlex.split(words[words.index("--command") + 1]))


def parse(words: list[str]) -> None:
    """Parse a verb's arguments; a parser that refuses them ends the program."""
    _, parser = load_verb(words[0], words[0])
    arguments = parser.parse_args(words[1:])
    if "sub_verb" in arguments:
        parse([f"{words[0]} {arguments.sub_verb}", *arguments.rest])
