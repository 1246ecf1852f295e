"""Any verb as a job of its own: `submit job`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_cpt.config.sources import CHECKOUT
from megatron_cpt.errors import LaunchError
from megatron_cpt.launch.tool_job import command_words

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
