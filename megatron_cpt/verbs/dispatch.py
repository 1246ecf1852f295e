"""How a verb's module becomes a parser, and how a verb hands on to its sub-verbs.

A verb module has `add_arguments(parser)` and `run(arguments) -> int | None`; its docstring's first line is the help, the
rest, with an example, the description. A verb with sub-verbs has a table of them, and a module for each.
"""

import argparse
import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType


def load_verb(name: str, program: str) -> tuple[ModuleType, argparse.ArgumentParser]:
    """Import the module of a verb (`data dedup` is `verbs/data/dedup.py`) and return it with its parser."""
    module = importlib.import_module(verb_module(name))
    summary, _, description = (module.__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        prog=program,
        description=f"{summary}\n{description}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    return module, parser


def parse_words(parser: argparse.ArgumentParser, words: Sequence[str]) -> argparse.Namespace:
    """Return the arguments of a verb; settings (`key=value`) may stand on both sides of an option, which argparse alone refuses."""
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
    code: int | None = module.run(parse_words(parser, rest))
    return code
