"""How a verb's module becomes a parser, and how a verb hands on to its sub-verbs.

A verb module has `add_arguments(parser)` and `run(arguments) -> int | None`; its docstring's first line is the help, the
rest, with an example, the description. A verb with sub-verbs has a table of them, and a module for each.
"""

import argparse
import difflib
import importlib
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import NoReturn

from megatron_cpt.log import configure_logging


class Parser(argparse.ArgumentParser):
    """A parser that names the nearest word there is for one that there is not."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong and leave with exit code 2."""
        choice = re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message)
        known = (
            re.findall(r"[\w.-]+", choice[2])
            if choice
            else [name for name in self._option_string_actions if name[:2] == "--"]
        )
        unknown = re.search(r"unrecognized arguments:.*?(--[\w-]+)", message)
        word = choice[1] if choice else unknown[1] if unknown else ""
        close = difflib.get_close_matches(word, known, n=1, cutoff=0.6) if word else []
        hint = f" Did you mean {close[0]}?" if close else ""
        super().error(f"{message}.{hint}" if hint else message)


def load_verb(name: str, program: str) -> tuple[ModuleType, argparse.ArgumentParser]:
    """Import the module of a verb (`data dedup` is `verbs/data/dedup.py`) and return it with its parser."""
    module = importlib.import_module(verb_module(name))
    summary, _, description = (module.__doc__ or "").partition("\n")
    parser = Parser(
        prog=program,
        description=f"{summary}\n{description}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress, warnings and errors only")
    module.add_arguments(parser)
    _describe_sub_commands(parser, program, module.__doc__ or "")
    return module, parser


def examples(text: str, command: str) -> list[str]:
    """Return the examples of a command in a verb's docstring, each with its continued lines."""
    found: list[str] = []
    lines = iter(text.splitlines())
    for line in lines:
        start = re.search(rf"{re.escape(command)}(?= |$).*", line)
        if start is None:
            continue
        example = start[0]
        while example.endswith("\\"):
            example += "\n" + next(lines)
        found.append(example)
    return found


def _describe_sub_commands(parser: argparse.ArgumentParser, program: str, text: str) -> None:
    """Give each sub-command's help its summary and its examples from the verb's docstring."""
    for action in parser._actions:
        if not isinstance(action, argparse._SubParsersAction):
            continue
        summaries = {choice.dest: choice.help or "" for choice in action._choices_actions}
        for name, part in action.choices.items():
            shown = "\n".join(f"  {example}" for example in examples(text, f"{program} {name}"))
            summary = summaries.get(name, "").replace("%%", "%")
            part.description = f"{summary}\n\nExample:\n{shown}" if shown else summary
            part.formatter_class = argparse.RawDescriptionHelpFormatter


def parse_words(parser: argparse.ArgumentParser, words: Sequence[str]) -> argparse.Namespace:
    """Return the arguments of a verb; settings (`key=value`) can be on both sides of an option, which argparse alone
    refuses."""
    arguments, rest = parser.parse_known_args(words)
    if rest:
        if not hasattr(arguments, "overrides") or any(word.startswith("-") for word in rest):
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        arguments.overrides = [*arguments.overrides, *rest]
    return arguments


def verb_module(name: str) -> str:
    """Return the dotted module of a verb; a verb with a folder has its table of sub-verbs in `sub_verbs.py` there."""
    path = name.replace("-", "_").replace(" ", ".")
    is_folder = (Path(__file__).parent / path).is_dir()
    return f"{__package__}.{path}.sub_verbs" if is_folder else f"{__package__}.{path}"


def add_sub_verbs(parser: argparse.ArgumentParser, sub_verbs: Mapping[str, str]) -> None:
    """Let a verb's parser take one of `sub_verbs` (name -> help) and leave what follows to it."""
    parser.epilog = "sub-verbs:\n" + "\n".join(f"  {name:<20} {text}" for name, text in sub_verbs.items())
    parser.add_argument("sub_verb", choices=list(sub_verbs), metavar="SUB_VERB", help="what to do")
    parser.add_argument("rest", nargs=argparse.REMAINDER, help="arguments of the sub-verb")


def run_sub_verb(verb: str, sub_verb: str, rest: Sequence[str]) -> int | None:
    """Run `megatron-cpt VERB SUB_VERB REST`."""
    module, parser = load_verb(f"{verb} {sub_verb}", f"megatron-cpt {verb} {sub_verb}")
    arguments = parse_words(parser, rest)
    if arguments.quiet:
        configure_logging(logging.WARNING)
    code: int | None = module.run(arguments)
    return code
