"""One vocabulary over the verbs, its earlier names, and what a mistyped word is answered."""

import argparse
import json
import logging
from pathlib import Path

import pytest

from megatron_cpt.cli import main
from megatron_cpt.verbs.dispatch import load_verb, parse_words
from megatron_cpt.verbs.vocabulary import keys_of, skips_bad_lines

OUTPUT = ["--output", "out"]
BAD_LINE_VERBS = {
    "data dedup": ["in", *OUTPUT],
    "data sample": ["in", *OUTPUT],
    "data languages": ["in", *OUTPUT],
    "data split": ["in", "--fraction", "1/10", *OUTPUT],
    "data decontaminate": ["in", "--against", "x", *OUTPUT],
}
KEY_VERBS = {
    "tokenize": ["--input", "in", "--tokenizer", "t", "--output-prefix", "out"],
    "data validate": ["--input", "in"],
    "data repair": ["--input", "in", "--output-dir", "out"],
}


def parsed(verb: str, words: list[str]) -> argparse.Namespace:
    return parse_words(load_verb(verb, verb)[1], words)


@pytest.mark.parametrize("verb", BAD_LINE_VERBS)
def test_bad_lines_have_one_option_and_its_earlier_name(verb):
    words = BAD_LINE_VERBS[verb]
    assert not skips_bad_lines(parsed(verb, words))
    assert skips_bad_lines(parsed(verb, [*words, "--on-bad-line", "skip"]))
    assert skips_bad_lines(parsed(verb, [*words, "--skip-bad-lines"]))
    assert "--skip-bad-lines" not in load_verb(verb, verb)[1].format_help()


@pytest.mark.parametrize("verb", KEY_VERBS)
def test_keys_have_one_option_that_may_come_again_and_its_earlier_name(verb):
    words = KEY_VERBS[verb]
    assert keys_of(parsed(verb, words)) == ("text",)
    assert keys_of(parsed(verb, [*words, "--key", "title", "--key", "body"])) == ("title", "body")
    assert keys_of(parsed(verb, [*words, "--json-keys", "title", "body"])) == ("title", "body")
    assert "--json-keys" not in load_verb(verb, verb)[1].format_help()


def answer(capsys, *words: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(list(words))
    assert ended.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["tokenise"], "tokenize"),
        (["data", "dedupe"], "dedup"),
        (["blend", "plna"], "plan"),
        (["submit", "pipline", "t"], "pipeline"),
        (["report", "runs", "--ouput", "x"], "--output"),
        (["convert", "hf-to-mcor"], "hf-to-mcore"),
    ],
)
def test_a_mistyped_word_is_answered_with_the_nearest(capsys, words, meant):
    assert f"Did you mean {meant}?" in answer(capsys, *words)


def test_a_word_like_none_is_answered_without_a_guess(capsys):
    assert "Did you mean" not in answer(capsys, "xyzzy")


@pytest.mark.parametrize("words", [["data", "dedup", "-q"], ["data", "-q", "dedup"]])
def test_quiet_leaves_out_what_is_no_warning(tmp_path, monkeypatch, capsys, words):
    monkeypatch.chdir(tmp_path)
    Path("a.jsonl").write_text("".join(json.dumps({"text": f"document {number}"}) + "\n" for number in range(9)))
    with pytest.raises(SystemExit) as ended:
        main([*words, "a=a.jsonl", "--output", "out", "--workers", "1"])
    assert not ended.value.code
    assert logging.getLogger().level == logging.WARNING
    assert capsys.readouterr().err == ""
