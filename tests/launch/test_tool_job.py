"""Any verb as a job of its own: `submit job`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_cpt.config.loading.sources import CHECKOUT
from megatron_cpt.errors import LaunchError
from megatron_cpt.launch.submission.tool_job import command_words
from tests.launch.test_render import check_directives

TASK = """\
data: {corpora: {chat: {tokens: [tokens/chat_chat_document]}}, mix: {chat: 1.0}}
sizes: {S: {training: {train_epochs: 2}}}
"""


def submit_job(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    task = folder / "t"
    task.mkdir(exist_ok=True)
    (task / "task.yaml").write_text(TASK)
    command = [
        sys.executable,
        "-m",
        "megatron_cpt",
        "submit",
        "job",
        "--task",
        task,
        "--params",
        "demo-5m",
        "--size",
        "S",
    ]
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    return subprocess.run([*command, *words], cwd=folder, env=environment, capture_output=True, text=True, timeout=60)


def test_a_command_is_read_as_a_shell_would_with_or_without_the_programs_name():
    assert command_words("megatron-cpt data pack --input 'a b'") == ["data", "pack", "--input", "a b"]
    assert command_words("doctor") == ["doctor"]


@pytest.mark.parametrize(
    ("command", "message"), [("", "no verb"), ("megatron-cpt", "no verb"), ("data 'x", "quotation")]
)
def test_a_command_without_a_verb_or_with_an_open_quote_is_refused(command, message):
    with pytest.raises(LaunchError, match=message):
        command_words(command)


def test_a_job_takes_the_resources_of_the_sites_stage_and_needs_no_tokens_yet(tmp_path):
    site = ("--site", "leonardo", "--account", "PLACEHOLDER", "--dry-run")
    answer = submit_job(tmp_path, *site, "--name", "prepare", "--command", "data prepare-chat --input 'a b'")
    assert answer.returncode == 0, answer.stderr
    assert "--partition=lrd_all_serial" in answer.stdout and "--gres" not in answer.stdout
    assert "megatron_cpt data prepare-chat" in answer.stdout and "'a b'" in answer.stdout
    assert not (tmp_path / "runs").exists()


def test_on_this_machine_the_command_runs_and_its_exit_code_comes_back(tmp_path):
    answer = submit_job(tmp_path, "--name", "look", "--command", "blend formats")
    assert answer.returncode == 0 and "llm-jp" in answer.stdout
    assert submit_job(tmp_path, "--name", "look", "--command", "blend list missing").returncode == 2


def test_a_verb_on_every_rank_has_the_training_jobs_nodes_gpus_and_launcher(tmp_path):
    command = "lr-find --lr-min 1e-6 --task 'a b'"
    batch = "training.global_batch_size=192"
    chosen = ("--dry-run", "--ranks", "--name", "look", "--command", command, "launch.nodes=3", batch)
    slurm = submit_job(tmp_path, "--site", "slurm/sites/generic.yaml", "--queue", "q", *chosen)
    assert slurm.returncode == 0, slurm.stderr
    check_directives(slurm.stdout[slurm.stdout.index("#!") : slurm.stdout.index("\n$ sbatch")], "slurm")
    for line in (
        "#SBATCH --nodes=3", "#SBATCH --gpus-per-node=8", "--nodes 3", "--gpus-per-node 8", "-m megatron_cpt lr-find",
        "--launcher 'srun --kill-on-bad-exit=1 --nodes=3 --ntasks=3 --ntasks-per-node=1'", "--task 'a b'", "--stage lr-find",
    ):  # fmt: skip
        assert line in slurm.stdout, line
    assert "--chain" not in slurm.stdout and "--train-iters" not in slurm.stdout  # it is no link of a chain
    pbs = submit_job(tmp_path, "--site", "abci", "--account", "PLACEHOLDER", *chosen)
    assert pbs.returncode == 0, pbs.stderr
    assert "select=3" in pbs.stdout and "--nodes 3" in pbs.stdout and "$ qsub" in pbs.stdout
    check_directives(pbs.stdout[pbs.stdout.index("#!") : pbs.stdout.index("\n$ qsub")], "pbs")


def test_on_this_machine_a_verb_on_every_rank_says_how_many(tmp_path):
    answer = submit_job(
        tmp_path, "--dry-run", "--ranks", "--name", "look", "--command", "doctor", "launch.gpus_per_node=2",
        "training.global_batch_size=64",
    )  # fmt: skip
    assert answer.stdout == "$ megatron-cpt doctor  # on 2 local ranks\n", answer.stderr
