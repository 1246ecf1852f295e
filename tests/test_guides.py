"""Every command block of the guides is run, in order, in a scratch folder; what cannot be run here is parsed at least.

A block ```bash ... ``` in docs/ or in a task's README is run unless the line before it is `<!-- not run: REASON -->`; then its
`megatron-cpt` commands must still parse. Lines that only call megatron-cpt run in this process, which has imported
torch already; others run in bash, with `megatron-cpt` on the PATH. Training on this machine runs on the test-suite's ranks
instead of torchrun's, which would import torch anew for every command.
"""

import argparse
import contextlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_cpt.cli import VERBS, main
from megatron_cpt.run.directory import RunDir
from megatron_cpt.run.ledger import append_record
from megatron_cpt.verbs.dispatch import load_verb
from tests.guide_scratch import build_scratch, train_here, train_stage
from tests.tiers import in_full

ROOT = Path(__file__).resolve().parent.parent
GUIDES = sorted([*(ROOT / "docs").glob("*.md"), *(ROOT / "docs" / "migrate").glob("*.md")])
BLOCK = re.compile(r"(?:^<!-- (?P<mark>[^>]*?) -->\n+)?^```(?P<kind>\w*)\n(?P<text>.*?)^```", re.MULTILINE | re.DOTALL)
SHELL_CHARACTERS = re.compile(r"[|<>;&`$*]|^(cp|mkdir|touch|cat|echo|rm|sed|mv|export) ")
PROCESS_OF_ITS_OWN = ("--logits", "lr-find")
"""They run megatron-core's model, for which a process without a GPU substitutes CUDA for good."""
SHELL_KINDS = ("bash", "sh", "shell", "console")


@dataclass(frozen=True)
class Block:
    """One block of commands."""

    line: int
    text: str
    reason: str | None
    """Why it is not run; None: it is."""


def blocks(guide: Path) -> list[Block]:
    """Return the command blocks of a guide."""
    text = guide.read_text(encoding="utf-8")
    found = []
    for match in BLOCK.finditer(text):
        if match["kind"] not in SHELL_KINDS:
            continue
        mark = (match["mark"] or "").removeprefix("not run: ") if match["mark"] else None
        found.append(Block(text[: match.start("text")].count("\n") + 1, match["text"], mark))
    return found


def command_lines(text: str) -> list[str]:
    """Return the commands of a block: continued lines joined, comments and blank lines left out."""
    joined = re.sub(r"\s*\\\n\s*", " ", text)
    lines = [line.strip() for line in joined.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


@pytest.fixture(scope="session")
def prepared(tmp_path_factory, ranks) -> Path:
    """A scratch folder with two trained stages, made once; guides work on copies."""
    root = tmp_path_factory.mktemp("guides") / "scratch"
    root.mkdir()
    with contextlib.chdir(root):
        build_scratch(root)
    for variant in ("base", "main"):
        assert ranks.run(train_stage, 1, str(root), variant) == ["finished"]
    return root


@pytest.fixture
def scratch(prepared, ranks, tmp_path, monkeypatch) -> Path:
    """A copy of the prepared folder as the current one, with the checkout's scripts and `megatron-cpt` on the PATH."""
    root = tmp_path / "scratch"
    shutil.copytree(prepared, root, symlinks=True)
    for name in ("tools", "pbs", "slurm", "installers", "megatron_cpt", "params"):
        (root / name).symlink_to(ROOT / name)
    for name in ("demo", "template"):
        (root / "tasks" / name).symlink_to(ROOT / "tasks" / name)
    (root / ".bin" / "megatron-cpt").write_text(
        f'#!/usr/bin/env bash\nPYTHONPATH="{ROOT}" exec {sys.executable} -m megatron_cpt "$@"\n'
    )
    (root / ".bin" / "megatron-cpt").chmod(0o755)
    monkeypatch.setenv("PATH", f"{root / '.bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    for name in ("MEGATRON_CPT_ACCOUNT", "MEGATRON_CPT_QUEUE", "MEGATRON_CPT_SITE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(root)

    def run_here(run: RunDir, arguments: Sequence[str], *, num_ranks: int, **_options: object) -> int:
        append_record(run.jobs, f"local-{uuid.uuid4().hex[:8]}", stage="train", scheduler="local", state="finished")
        assert set(ranks.run(train_here, num_ranks, str(root), list(arguments))) == {0}
        return 0

    monkeypatch.setattr("megatron_cpt.launch.scheduler.local.run_local", run_here)
    return root


def run_line(line: str) -> None:
    """Run one command of a guide; it must end with exit code 0."""
    is_alone = SHELL_CHARACTERS.search(unquoted(line)) or any(word in line.split() for word in PROCESS_OF_ITS_OWN)
    if line.startswith("megatron-cpt ") and not is_alone:
        words = shlex.split(line, comments=True)
        errors = io.StringIO()
        with contextlib.redirect_stderr(errors), pytest.raises(SystemExit) as ended:
            main(words[1:])
        assert not ended.value.code, f"$ {line}\nexit code {ended.value.code}\n{errors.getvalue()}"
        return
    answer = subprocess.run(["bash", "-euo", "pipefail", "-c", line], capture_output=True, text=True, timeout=120)
    assert answer.returncode == 0, f"$ {line}\n{answer.stdout[-2000:]}\n{answer.stderr[-3000:]}"


def unquoted(line: str) -> str:
    """Return a line without what stands in quotes or behind a `#`."""
    return re.sub(r"'[^']*'|\"[^\"]*\"", "", line).partition(" #")[0]


def parse_line(line: str) -> None:
    """Parse a command that is not run: each megatron-cpt call in it must have a known verb and valid arguments."""
    for part in re.split(r"\||&&|;|>", line):
        with contextlib.suppress(ValueError):
            words = shlex.split(part, comments=True)
            while words and re.fullmatch(r"[A-Za-z_]+=.*", words[0]):
                words.pop(0)
            if words[:1] == ["megatron-cpt"] and len(words) > 1:
                parse_words(words[1:])


def parse_words(words: list[str]) -> None:
    """Parse a verb's arguments without running it."""
    assert words[0] in VERBS, f"{words[0]} is no verb"
    _, parser = load_verb(words[0], f"megatron-cpt {words[0]}")
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(errors):
        try:
            arguments: argparse.Namespace = parser.parse_args(words[1:])
            if "sub_verb" in arguments:
                _, parser = load_verb(f"{words[0]} {arguments.sub_verb}", f"megatron-cpt {words[0]}")
                parser.parse_args(arguments.rest)
        except SystemExit as ended:
            assert not ended.code, f"megatron-cpt {shlex.join(words)}\n{errors.getvalue()}"


LONG_GUIDES = {"evaluation.md", "change-the-cluster-size.md", "convert.md", "snakmodel.md"}
"""Guides whose commands train or evaluate for long."""


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "guide",
    [in_full(guide) if guide.name in LONG_GUIDES else guide for guide in GUIDES if blocks(guide)],
    ids=lambda path: str(path.relative_to(ROOT / "docs")),
)
def test_every_command_of_a_guide_runs(guide, scratch):
    for block in blocks(guide):
        for line in command_lines(block.text):
            if block.reason is None:
                run_line(line)
            else:
                parse_line(line)


@pytest.mark.full
def test_advice_on_a_run_that_really_trained_has_numbers_and_commands_that_run(scratch, capsys):
    run_line(
        "megatron-cpt submit train --task tasks/ja --params llama3-8b --size 50B --variant main+held schedule.lr_cooldown=0"
    )
    with pytest.raises(SystemExit) as ended:
        main(["advise", "runs/ja/llama3-8b/50B/main+held"])
    assert not ended.value.code
    printed = capsys.readouterr().out
    assert re.search(r"training loss: \w+: \d+\.\d+, where the stage before was heading \d", printed), printed
    assert "held-out D0 (old): " in printed and "held-out D1 (new): -" in printed
    commands = [line for line in printed.splitlines() if line.startswith("megatron-cpt submit train ")]
    assert commands and "main+held_cooldown" in commands[0], printed
    for command in commands:
        run_line(command)
    assert (scratch / "runs/ja/llama3-8b/50B/main+held_cooldown/metrics.jsonl").is_file()


@pytest.mark.parametrize("verb", VERBS)
def test_the_examples_that_a_verb_shows_parse(verb):
    module, _ = load_verb(verb, f"megatron-cpt {verb}")
    names = [verb, *(f"{verb} {name}" for name in getattr(module, "SUB_VERBS", ()))]
    examples = []
    for name in names:
        text = (load_verb(name, name)[0].__doc__ or "").replace("\\\n", " ")
        text = re.sub(r"\n +(?=--)", " ", text)  # an option on a line of its own belongs to the one before
        examples += re.findall(r"^(?:Examples?:)? *(megatron-cpt [a-z][^`\n]*)$", text, re.MULTILINE)
    for example in examples:  # tests/test_policy.py asserts that there is one
        parse_line(example)


def test_a_block_is_run_unless_a_reason_stands_before_it():
    for guide in GUIDES:
        for block in blocks(guide):
            assert block.reason is None or len(block.reason) > 10, f"{guide.name}:{block.line}: no reason"


def test_no_command_block_hides_behind_another_kind():
    """A block without a language, or with another one, may not begin with our command: it would not be run."""
    hidden = []
    for guide in GUIDES:
        for match in BLOCK.finditer(guide.read_text(encoding="utf-8")):
            first = match["text"].strip().partition("\n")[0]
            if match["kind"] not in SHELL_KINDS and re.match(r"\$ |megatron-cpt ", first) and match["kind"] != "text":
                hidden.append(f"{guide.name}: {first}")
    assert not hidden, hidden


def test_the_harness_finds_commands_and_their_marks(tmp_path):
    guide = tmp_path / "guide.md"
    guide.write_text(
        "a\n```bash\nmegatron-cpt doctor \\\n    --deep\n# no\n```\n\n<!-- not run: needs a network -->\n```sh\nx | y\n```\n"
        "```yaml\na: b\n```\n"
    )
    first, second = blocks(guide)
    assert command_lines(first.text) == ["megatron-cpt doctor --deep"] and first.reason is None
    assert (second.reason, second.line) == ("needs a network", 10)
    parse_line("LR=1 megatron-cpt doctor --deep | cat")
    with pytest.raises(AssertionError, match="unrecognized arguments: --dep"):
        parse_line("megatron-cpt doctor --dep")
    with pytest.raises(AssertionError):
        parse_line("megatron-cpt data dedup --no-such x=y --output z")


def test_every_message_in_the_troubleshooting_stands_in_the_code():
    """The parts of a quoted message between its `...` must be in the sources, in order of appearance in one literal."""
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    sources = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "megatron_cpt").rglob("*.py"))
    literals = re.sub(r'"\s*\n\s*f?"', "", sources)  # one literal over several lines is one message
    literals = re.sub(r"\{[^{}]*\}", "...", literals)
    missing = []
    for line in text.splitlines():
        quoted = re.match(r"\| [^|`]*(?:`[^`.]*`[^|`]*)*?`([^`|]*(?:\.\.\.|\. )[^`|]*)`", line)
        if quoted and not all(part.strip() in literals for part in quoted[1].split("...") if part.strip()):
            missing.append(quoted[1])
    assert not missing, missing
