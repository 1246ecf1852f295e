"""One vocabulary over the verbs, its earlier names, and what a mistyped word is answered."""

import argparse
import json
import logging
import shlex
from pathlib import Path

import pytest

from megatron_cpt.cli import VERBS, main
from megatron_cpt.verbs.dispatch import examples, load_verb, parse_words
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


def sub_commands() -> list[tuple[str, str]]:
    """Return every sub-command of every verb that parses its own (`submit train`)."""
    found = []
    for verb in VERBS:
        for action in load_verb(verb, f"megatron-cpt {verb}")[1]._actions:
            if isinstance(action, argparse._SubParsersAction):
                found += [(verb, name) for name in action.choices]
    return found


def commands_of(program: str, text: str) -> list[list[str]]:
    return [shlex.split(example.replace("\\\n", " "), comments=True) for example in examples(text, program)]


@pytest.mark.parametrize(("verb", "name"), sub_commands(), ids=" ".join)
def test_every_sub_command_explains_itself_with_an_example(verb, name):
    parser = load_verb(verb, f"megatron-cpt {verb}")[1]
    (choices,) = (action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    text = choices[name].format_help()
    assert f"megatron-cpt {verb} {name} " in text, text
    assert len(choices[name].description.splitlines()[0]) > 8


@pytest.mark.parametrize("verb", VERBS)
def test_every_example_of_a_verb_is_understood_by_its_parser(verb):
    module, parser = load_verb(verb, f"megatron-cpt {verb}")
    found = commands_of(f"megatron-cpt {verb}", module.__doc__ or "")
    for words in found:
        arguments = parse_words(parser, words[2:])
        if hasattr(arguments, "sub_verb"):
            sub = load_verb(f"{verb} {arguments.sub_verb}", "")[1]
            parse_words(sub, arguments.rest)


def sub_verbs() -> list[tuple[str, str]]:
    found = []
    for verb in VERBS:
        module = load_verb(verb, verb)[0]
        found += [(verb, name) for name in getattr(module, "SUB_VERBS", ())]
    return found


@pytest.mark.parametrize(("verb", "name"), sub_verbs(), ids=" ".join)
def test_every_sub_verb_has_an_example_that_its_parser_understands(verb, name):
    module, parser = load_verb(f"{verb} {name}", f"megatron-cpt {verb} {name}")
    found = commands_of(f"megatron-cpt {verb} {name}", module.__doc__ or "")
    assert found, f"megatron-cpt {verb} {name} --help shows no example"
    for words in found:
        parse_words(parser, words[3:])
