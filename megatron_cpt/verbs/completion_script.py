"""Completion scripts for bash, zsh and fish, written from the parsers of all verbs."""

import argparse
import shlex
from collections.abc import Iterator

from megatron_cpt.verbs.dispatch import load_verb

_BASH = """\
# Completion of megatron-cpt; written by `megatron-cpt completion {shell}`.
_megatron_cpt_words() {{
    case "$1" in
{cases}
    esac
}}
_megatron_cpt() {{
    local word path="" longer current="${{COMP_WORDS[COMP_CWORD]}}" index
    for ((index = 1; index < COMP_CWORD; index++)); do
        word="${{COMP_WORDS[index]}}"
        longer="${{path:+$path }}$word"
        [[ -n $(_megatron_cpt_words "$longer") ]] && path="$longer"
    done
    COMPREPLY=($(compgen -W "$(_megatron_cpt_words "$path")" -- "$current"))
}}
complete -o default -F _megatron_cpt megatron-cpt
"""
_FISH = """\
# Completion of megatron-cpt; written by `megatron-cpt completion fish`.
function __megatron_cpt_path
    set -l path
    set -l words (commandline -opc)
    for word in $words[2..-1]
        set -l longer (string trim -- "$path $word")
        contains -- "$longer" $__megatron_cpt_paths; and set path "$longer"
    end
    string trim -- "$path"
end
set -g __megatron_cpt_paths {paths}
{lines}
"""


def completion_script(shell: str) -> str:
    """Return the script of `bash`, `zsh` or `fish`."""
    words = dict(command_words())
    if shell == "fish":
        return _fish(words)
    cases = "\n".join(f'        {shlex.quote(path)}) echo "{" ".join(known)}" ;;' for path, known in words.items())
    script = _BASH.format(shell=shell, cases=cases)
    return script if shell == "bash" else f"autoload -Uz bashcompinit && bashcompinit\n{script}"


def command_words() -> Iterator[tuple[str, list[str]]]:
    """Yield a command's path (empty, `submit`, `submit train`) and the words that can follow it: sub-verbs, options."""
    from megatron_cpt.cli import (
        VERBS,
    )  # it imports this package's dispatch, and only at this moment is the table needed

    yield "", [*VERBS, "--help", "--version"]
    for verb in VERBS:
        yield from _words_of(verb, load_verb(verb, f"megatron-cpt {verb}")[1])


def _words_of(path: str, parser: argparse.ArgumentParser) -> Iterator[tuple[str, list[str]]]:
    words: list[str] = []
    below: list[tuple[str, list[str]]] = []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            words += list(action.choices)
            for name, part in action.choices.items():
                below += _words_of(f"{path} {name}", part)
        elif action.dest == "sub_verb":
            words += list(action.choices or ())
            for name in action.choices or ():
                below += _words_of(f"{path} {name}", load_verb(f"{path} {name}", f"megatron-cpt {path} {name}")[1])
        elif not action.option_strings:
            words += [str(choice) for choice in action.choices or ()]
        elif action.help != argparse.SUPPRESS:  # an old name is no suggestion
            words += [option for option in action.option_strings if option.startswith("--")]
    yield path, words
    yield from below


def _fish(words: dict[str, list[str]]) -> str:
    lines = []
    for path, known in words.items():
        condition = shlex.quote(
            f'test (__megatron_cpt_path) = "{path}"' if path else 'test -z "$(__megatron_cpt_path)"'
        )
        plain = " ".join(word for word in known if not word.startswith("--"))
        if plain:
            lines.append(f"complete -c megatron-cpt -n {condition} -f -a {shlex.quote(plain)}")
        lines += [f"complete -c megatron-cpt -n {condition} -l {word[2:]}" for word in known if word.startswith("--")]
    return _FISH.format(paths=" ".join(shlex.quote(path) for path in words if path), lines="\n".join(lines))
