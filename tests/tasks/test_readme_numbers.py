"""Numbers beside a `megatron-cpt plan` command in a recipe's README are those that the command prints."""

import re
import shlex
from decimal import ROUND_HALF_DOWN, ROUND_HALF_UP, Decimal
from pathlib import Path

import pytest

from megatron_cpt.cli import main
from megatron_cpt.config.loading.sources import CHECKOUT

READMES = sorted(
    path for path in CHECKOUT.glob("tasks/*/README.md") if re.search(r"^megatron-cpt plan ", path.read_text(), re.M)
)
WORDS = {"one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10}
NUMBER = r"([\d,]+(?:\.\d+)?)"
KINDS = {
    # what it is: as a README says it, as `plan` prints it
    "iterations": (rf"{NUMBER}\s+iterations", rf"= {NUMBER} iterations"),
    "memory": (rf"{NUMBER} of [\d.]+ GiB", rf"(?:fits|DOES NOT FIT): {NUMBER} GiB"),
    "memory of a GPU": (rf"[\d.]+ of {NUMBER} GiB", rf"GiB in {NUMBER} GiB"),
    "time": (r"(\d+h\d\dm)", r"time +(?:\d+ d )?(\d+h\d\dm) at"),
    "node hours": (rf"{NUMBER}\s+node\s+hours", rf"{NUMBER} node hours"),
    "jobs": (rf"\b({'|'.join(WORDS)}) (?:jobs|links)\b", r"jobs +(\d+) of"),
    "a checkpoint": (rf"checkpoints of {NUMBER} GiB", rf"checkpoint +{NUMBER} GiB each"),
}


def command_and_text(path: Path) -> tuple[list[str], str]:
    """Return the one `plan` command of a README and the paragraph after its block."""
    ((command, text),) = re.findall(r"^megatron-cpt (plan .*)\n```\n(.*?)(?:\n\n|\Z)", path.read_text(), re.M | re.S)
    return shlex.split(command), text


def is_rounded(stated: str, printed: str) -> bool:
    """Return whether the stated number is the printed one, or it with fewer decimals."""
    if re.fullmatch(r"\d+h\d\dm", stated):
        return stated == printed
    if stated in WORDS:
        return WORDS[stated] == int(printed)
    value, exact = Decimal(stated.replace(",", "")), Decimal(printed.replace(",", ""))
    # what is printed was rounded itself, so that a half may have come from either side
    return value in {exact.quantize(value, rounding=rounding) for rounding in (ROUND_HALF_UP, ROUND_HALF_DOWN)}


def planned(words: list[str], capsys) -> str:
    """Return what `plan` prints."""
    with pytest.raises(SystemExit):
        main(words)
    return capsys.readouterr().out


@pytest.mark.parametrize("path", READMES, ids=lambda path: path.parent.name)
def test_a_readme_says_what_plan_prints(path, capsys, monkeypatch):
    monkeypatch.chdir(CHECKOUT)
    words, text = command_and_text(path)
    printed = planned(words, capsys)
    checked = []
    for kind, (in_text, in_plan) in KINDS.items():
        stated, shown = re.search(in_text, text), re.search(in_plan, printed)
        if stated:
            assert shown, f"{path}: {kind} is stated as {stated[1]} and not printed:\n{printed}"
            assert is_rounded(stated[1], shown[1]), f"{path}: {kind} is stated as {stated[1]}, printed as {shown[1]}"
            checked.append(kind)
    assert {"iterations", "memory", "time", "node hours"} <= set(checked), checked


@pytest.mark.parametrize("path", READMES, ids=lambda path: path.parent.name)
def test_a_readme_says_what_plan_prints_for_other_settings_and_sizes(path, capsys, monkeypatch):
    """`95.5 with the original's <setting>` is memory, `50B: 222 node hours` the hours of another size."""
    monkeypatch.chdir(CHECKOUT)
    words, text = command_and_text(path)
    for value, setting in re.findall(r"\(([\d.]+) with [^()]*?`(\S+=\S+)`\)", text):
        shown = re.search(KINDS["memory"][1], planned([*words, setting], capsys))
        assert shown and is_rounded(value, shown[1]), f"{path}: {setting}: {value} is stated, {shown} printed"
    for size, value in re.findall(rf"\b(\d+[MBT]): {NUMBER}(?=\s+node|\.)", text):
        other = list(words)
        other[other.index("--size") + 1] = size
        shown = re.search(KINDS["node hours"][1], planned(other, capsys))
        assert shown and is_rounded(value, shown[1]), f"{path}: {size}: {value} is stated, {shown} printed"


def test_a_wrong_number_is_found():
    assert is_rounded("49.6", "49.6") and is_rounded("783", "782.5") and is_rounded("three", "3")
    assert not is_rounded("50.4", "49.6") and not is_rounded("784", "782.5") and not is_rounded("12h13m", "12h14m")
