"""Job scripts: golden files, a strict parser of directives, bash -n, shellcheck."""

import dataclasses
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_cpt.config.loading.resolve import LoadedConfig
from megatron_cpt.config.loading.sources import CHECKOUT, read_yaml
from megatron_cpt.config.settings.schema import (
    CheckpointConfig,
    CorpusConfig,
    DataConfig,
    LaunchConfig,
    ModelConfig,
    PathsConfig,
    RunConfig,
    TrainingConfig,
)
from megatron_cpt.errors import ConfigError, LaunchError
from megatron_cpt.launch.scheduler.choice import scheduler_of
from megatron_cpt.launch.scheduler.job import Dependency, parse_dependency
from megatron_cpt.launch.scheduler.render import render_job
from megatron_cpt.launch.scheduler.site import Site, read_site
from megatron_cpt.launch.submission.submit import Submission, stage_job, training_job
from megatron_cpt.launch.submission.work import Link, Work

GOLDEN = CHECKOUT / "tests" / "golden"
SITES = sorted(CHECKOUT.glob("*/sites/*.yaml"))
SHELLCHECK = shutil.which("shellcheck") or shutil.which("shellcheck", path=str(Path(sys.executable).parent))
MODEL = ModelConfig(num_layers=2, hidden_size=64, ffn_hidden_size=176, num_attention_heads=4, vocab_size=500)

# What qsub and sbatch take: letter or option -> pattern of its value. Anything else is a mistake in a template.
PBS_DIRECTIVES = {
    "N": r"[A-Za-z0-9_.+-]{1,230}",
    "P": r"\S+",
    "q": r"[A-Za-z0-9_@.-]+",
    "l": r"(select=\d+(:[a-z_]+=\w+)*|walltime=\d{2,}:\d\d:\d\d|filesystems=\S+|place=\w+)",
    "J": r"0-\d+",
    "W": r"umask=0?[0-7]{3}",
    "j": "oe",
    "k": "oed",
    "o": r"/[^\s$]+",
    "m": "n",
    "v": r"\w+=\S*",
}
SLURM_DIRECTIVES = {
    "job-name": r"[A-Za-z0-9_.-]+",
    "account": r"\S+",
    "partition": r"\S+",
    "nodes": r"[1-9]\d*",
    "ntasks-per-node": r"[1-9]\d*",
    "cpus-per-task": r"[1-9]\d*",
    "gpus-per-node": r"\d+",
    "gres": r"gpu:\d+",
    "time": r"\d{2,}:\d\d:\d\d",
    "array": r"0-\d+",
    "signal": r"B:USR1@\d+",
    "output": r"/[^\s$]+",
    "open-mode": "append",
    "requeue": "",
    "no-requeue": "",
    "exclusive": "",
}


def submission(site_path: Path, **launch) -> Submission:
    values = read_yaml(site_path)["launch"]
    settings = {"scheduler": values["scheduler"], "gpus_per_node": values["gpus_per_node"], "nodes": 2} | launch
    config = RunConfig(
        task="ja",
        params="8b",
        size="50B",
        model=MODEL,
        training=TrainingConfig(train_iters=1000),
        data=DataConfig(mix={"D1": 1.0}, corpora={"D1": CorpusConfig()}),
        checkpoint=CheckpointConfig(save_interval=100),
        paths=PathsConfig(runs_dir="runs"),
        launch=LaunchConfig(**settings),
    )
    return Submission(
        loaded=LoadedConfig(config, {}),
        site=read_site(site_path, {}, account="my-project", queue="my-queue" if site_path.stem == "generic" else None),
        run_arguments=("--task", "tasks/ja", "--params", "8b", "--size", "50B", "--variant", "main"),
        python="/site/cpt/env/bin/python",
        work_dir=Path("/site/cpt"),
        stamp="20260102T030405",
    )


def rendered(site_path: Path) -> dict[str, str]:
    """Return every kind of script that a site's jobs can have."""
    chosen = submission(site_path)
    scheduler = chosen.scheduler
    name = f"{scheduler}-{site_path.stem}"
    train = training_job(chosen, Link(number=1))
    arguments = ("tokenize", "--input", "data/D1", "--shard", "{array_index}/{num_array_tasks}")
    array = stage_job(chosen, Work(name="tokenize-D1", stage="tokenize", words=arguments, num_array_tasks=8))
    return {
        f"{name}-train.sh": render_job(train, scheduler),
        f"{name}-tokenize.sh": render_job(array, scheduler),
    }


def without_package_path(text: str) -> str:
    return re.sub(r"^export PYTHONPATH=.*\n", "", text, flags=re.M)


@pytest.mark.parametrize("site_path", SITES, ids=lambda path: f"{path.parts[-3]}-{path.stem}")
def test_rendered_scripts_equal_their_golden_files(site_path):
    for name, text in rendered(site_path).items():
        text = without_package_path(text)
        if os.environ.get("UPDATE_GOLDEN"):
            GOLDEN.mkdir(exist_ok=True)
            (GOLDEN / name).write_text(text)
        assert text == (GOLDEN / name).read_text(), (
            f"{name}: run the tests with UPDATE_GOLDEN=1 and look at the difference"
        )


@pytest.mark.parametrize("site_path", SITES, ids=lambda path: f"{path.parts[-3]}-{path.stem}")
def test_rendered_scripts_pass_a_strict_parser_and_the_shell_checks(site_path, tmp_path):
    for name, text in rendered(site_path).items():
        check_directives(text, "pbs" if name.startswith("pbs") else "slurm")
        script = tmp_path / name
        script.write_text(text)
        subprocess.run(["bash", "-n", str(script)], check=True)
        if SHELLCHECK is None:
            pytest.skip("shellcheck is not installed; bash -n passed")
        checked = subprocess.run([SHELLCHECK, "-e", "SC1091", str(script)], capture_output=True, text=True)
        assert checked.returncode == 0, checked.stdout


def check_directives(text: str, scheduler: str) -> None:
    """Refuse an unknown directive, a bad value, a repeated one, one after the first command, and holes left open."""
    lines = text.splitlines()
    assert lines[0] == "#!/usr/bin/env bash"
    prefix = {"pbs": "#PBS ", "slurm": "#SBATCH "}[scheduler]
    first_command = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    assert not any(line.startswith(("#PBS", "#SBATCH")) for line in lines[first_command:])
    seen = set()
    for line in lines[1:first_command]:
        assert line.startswith(prefix), line
        directive = line.removeprefix(prefix)
        if scheduler == "pbs":
            letter, _, value = directive.removeprefix("-").partition(" ")
            known, key = PBS_DIRECTIVES, f"{letter} {value.split('=')[0]}" if letter in "lv" else letter
        else:
            letter, _, value = directive.removeprefix("--").partition("=")
            known, key = SLURM_DIRECTIVES, letter
        assert letter in known, line
        assert re.fullmatch(known[letter], value), line
        assert key not in seen, f"{line}: stated twice"
        seen.add(key)
    assert not re.search(r"@[A-Z_]+@", text)


def test_the_strict_parser_refuses_what_schedulers_would_take_silently():
    good = rendered(CHECKOUT / "slurm/sites/leonardo.yaml")["slurm-leonardo-train.sh"]
    check_directives(good, "slurm")
    for bad in (
        good.replace("--time=24:00:00", "--time=24h"),
        good.replace("#SBATCH --nodes=2", "#SBATCH --node=2"),
        good.replace("job.out", "$SLURM_JOB_ID.out"),
        good + "#SBATCH --time=01:00:00\n",
        good.replace("#SBATCH --nodes=2\n", "#SBATCH --nodes=2\n#SBATCH --nodes=3\n"),
    ):
        with pytest.raises(AssertionError):
            check_directives(bad, "slurm")


def test_a_value_that_a_directive_cannot_hold_is_refused_by_name():
    chosen = submission(CHECKOUT / "pbs/sites/abci.yaml")
    job = training_job(chosen, Link(number=1, is_last=False))
    for value in ("two words", "a$b", "a'b", "", "line\nbreak"):
        with pytest.raises(LaunchError, match="queue is"):
            render_job(dataclasses.replace(job, queue=value), "pbs")


def test_words_with_spaces_and_quotes_reach_the_program_unharmed(tmp_path):
    job = training_job(submission(CHECKOUT / "slurm/sites/generic.yaml"), Link(number=1, is_last=False))
    words = ("printf", "%s\n", "a b", "it's", "$HOME", "--flag", "--", "data.mix={D0: 1.0}")
    script = tmp_path / "job.sh"
    script.write_text(render_job(dataclasses.replace(job, command=words, work_dir=tmp_path), "slurm"))
    printed = subprocess.run(["bash", str(script)], capture_output=True, text=True, check=True)
    assert printed.stdout.splitlines() == list(words[2:])


def test_dependencies_read_alike_in_both_schedulers_and_slurm_cancels_what_can_never_start():
    parents = parse_dependency("afterok:1.pbs1:20[].pbs1", "pbs")
    assert parents == (Dependency("afterok", ("1.pbs1", "20[].pbs1")),)
    assert scheduler_of("pbs").submit_command(Path("/j.sh"), parents) == [
        "qsub",
        "-W",
        "depend=afterok:1.pbs1:20[].pbs1",
        "/j.sh",
    ]
    command = scheduler_of("slurm").submit_command(Path("/j.sh"), parse_dependency("afterok:1:2,afterany:3", "slurm"))
    assert command[2:4] == ["--dependency=afterok:1:2,afterany:3", "--kill-on-invalid-dep=yes"]


@pytest.mark.parametrize(
    ("text", "scheduler", "message"),
    [
        ("afterokay:1", "slurm", "'afterokay' is not a kind"),
        ("afterok", "slurm", "no job id is given"),
        ("afterok:", "pbs", "'' is not a pbs job id"),
        ("afterok:1.pbs1", "slurm", "'1.pbs1' is not a slurm job id"),
        ("aftercorr:1", "pbs", "'aftercorr' is not a kind"),
    ],
)
def test_a_wrong_dependency_is_refused_before_submission(text, scheduler, message):
    with pytest.raises(LaunchError, match=re.escape(message)):
        parse_dependency(text, scheduler)


def test_account_and_queue_come_from_command_line_then_environment_then_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("site: {queue: file, account: file}\n")
    assert read_site(path, {}).queue == "file"
    assert read_site(path, {"MEGATRON_CPT_QUEUE": "variable"}).queue == "variable"
    assert read_site(path, {"MEGATRON_CPT_QUEUE": "variable"}, queue="line").queue == "line"
    assert read_site(None, {}) == Site()


def test_every_mistake_of_a_site_section_is_named_at_once(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("site: {quue: x, max_walltime: 1h, processes: gpu, stages: {tokenize: {wall: 1}}}\n")
    with pytest.raises(ConfigError) as refused:
        read_site(path, {})
    text = str(refused.value)
    assert "site.quue: unknown key. Did you mean queue?" in text
    assert "site.max_walltime: '1h' is not a walltime" in text
    assert "site.processes: 'gpu' is not one of node, rank" in text
    assert "site.stages.tokenize.wall: unknown key" in text


def test_no_site_file_holds_an_account_or_an_absolute_path():
    for path in SITES:
        values = read_yaml(path)
        assert "account" not in values["site"], path
        text = re.sub(r"source[ =]/(etc|dev)/\S+", "", path.read_text())
        assert not re.search(r"[\s\"'=]/\w", text), path
