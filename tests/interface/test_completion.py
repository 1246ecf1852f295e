"""Completion scripts complete verbs, sub-verbs and options, as the shells themselves say."""

import shutil
import subprocess

import pytest

from megatron_cpt.verbs.completion_script import command_words, completion_script

ASK = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))
_megatron_cpt
printf '%s\\n' "${COMPREPLY[@]}"
"""
CASES = [
    (["subm"], {"submit"}),
    (["submit", "tr"], {"train"}),
    (["submit", "train", "--dry"], {"--dry-run"}),
    (["submit", "train", "--task", "tasks/demo", "--par"], {"--params"}),
    (["data", "ded"], {"dedup"}),
    (["data", "dedup", "--out"], {"--output", "--output-format"}),
    (["blend", "build"], {"build-index"}),
    (["completion", ""], {"--help", "--quiet", "--output", "bash", "zsh", "fish"}),
    (["no-such-verb", "subm"], {"submit"}),
    (["tokenize", "--skip-bad"], {""}),  # an old name is no suggestion
]


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("completion")
    for shell in ("bash", "zsh", "fish"):
        (folder / shell).write_text(completion_script(shell))
    return folder


@pytest.mark.parametrize(("words", "expected"), CASES)
def test_bash_completes(scripts, words, expected):
    command = ["bash", "--norc", "-c", ASK, "-", str(scripts / "bash"), "megatron-cpt", *words]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    found = set(shown.stdout.split("\n")[:-1])
    assert shown.stderr == "" and found == expected


def test_every_word_is_an_option_or_a_command_of_its_parser(scripts):
    known = dict(command_words())
    assert {"submit train", "data dedup", "blend build-index", "convert latest"} <= set(known)
    text = (scripts / "fish").read_text()
    for path, words in known.items():
        assert words and len(words) == len(set(words)), path
        for word in words:
            assert f"-l {word[2:]}" in text if word.startswith("--") else word in text


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_script_has_the_syntax_of_its_shell(scripts, shell):
    program = shutil.which(shell)
    if program is None:
        pytest.skip(f"{shell} is not on this machine")
    subprocess.run([program, "-n", str(scripts / shell)], check=True, timeout=30)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("megatron-cpt subm", "submit"),
        ("megatron-cpt submit tr", "train"),
        ("megatron-cpt data dedup --sco", "--scope"),
    ],
)
def test_fish_completes(scripts, line, expected):
    if shutil.which("fish") is None:
        pytest.skip("fish is not on this machine")
    command = ["fish", "--no-config", "-c", f"source {scripts / 'fish'}; complete -C '{line}'"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    assert expected in [found.split("\t")[0] for found in shown.stdout.splitlines()], shown


def test_zsh_takes_the_script(scripts):
    if shutil.which("zsh") is None:
        pytest.skip("zsh is not on this machine")
    command = f"autoload -Uz compinit && compinit -D; source {scripts / 'zsh'}; _megatron_cpt_words 'blend'; echo $_comps[megatron-cpt]"
    shown = subprocess.run(["zsh", "-f", "-c", command], capture_output=True, text=True, timeout=30, check=True)
    words, completer = shown.stdout.strip().split("\n")
    assert "build-index" in words.split() and "_megatron_cpt" in completer
