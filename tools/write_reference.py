#!/usr/bin/env python3
"""Write docs/reference/ from the code: every setting, every command, every file format; `make docs` calls it.

Example: tools/write_reference.py --check    (exit code 1 when a page is out of date, nothing is written)
"""

import argparse
import ast
import dataclasses
import importlib.util
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_cpt.cli import VERBS
from megatron_cpt.config.loading.explain import field_texts
from megatron_cpt.config.megatron.rows import ROWS
from megatron_cpt.config.settings.fields import default_value, plain, section_fields, sections
from megatron_cpt.launch.scheduler.site import Site, StageResources
from megatron_cpt.verbs.dispatch import load_verb

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = ROOT / "docs" / "reference"
NOTE = "<!-- Written by tools/write_reference.py from the code: `make docs`. Do not edit. -->\n"
FORMATS = (
    ("Token files and their index", "data/shards/indexed.py"),
    ("When a shard is complete", "data/shards/discovery.py"),
    ("Masked and packed shards", "data/shards/masked.py"),
    ("Data lists", "data/lists/data_list.py"),
    ("Shell data lists", "data/lists/shell.py"),
    ("Documents to skip", "data/shards/skip_list.py"),
    ("The replay buffer", "data/blend/replay.py"),
    ("Checkpoints", "checkpoint/torch_dist/mcore.py"),
    ("Soups", "checkpoint/soup/mean.py"),
    ("The ledger of jobs", "run/ledger.py"),
    ("Metrics of a run", "evaluate/report/stages.py"),
    ("Sweeps", "launch/submission/sweep.py"),
    ("Locks", "run/lock.py"),
)


def main() -> int:
    """Write the pages, or compare them; return an exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 when a page is out of date")
    arguments = parser.parse_args()
    old = {}
    for name, text in pages().items():
        path = OUTPUT / name
        if path.exists() and path.read_text(encoding="utf-8") == text:
            continue
        old[name] = path
        if not arguments.check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    for path in old.values():
        sys.stdout.write(
            f"{path.relative_to(ROOT)}: {'out of date; run make docs' if arguments.check else 'written'}\n"
        )
    return 1 if old and arguments.check else 0


def pages() -> dict[str, str]:
    """Return the file name and text of every page."""
    return {
        "configuration.md": "\n".join(configuration_page()),
        "commands.md": "\n".join(commands_page()),
        "formats.md": "\n".join(formats_page()),
        "models.md": "\n".join(models_page()),
    }


def models_page() -> Iterator[str]:
    """Yield the lines of the page of models: architectures that convert, and public models with the result for each."""
    # torch: only for this page
    from megatron_cpt.checkpoint.huggingface.quantized import quantization
    from megatron_cpt.checkpoint.huggingface.read_config import family_of_config, model_config_from_hf
    from megatron_cpt.checkpoint.mapping.families.known import FAMILIES
    from megatron_cpt.errors import CheckpointError

    yield NOTE
    yield "# Models\n"
    yield (
        "Each architecture converts both ways bit for bit, trains under Megatron-Core, and exports for transformers 4.57 and 5.\n"
    )
    yield "| architecture | `model_type` | what it is |\n|---|---|---|"
    for family in FAMILIES.values():
        what = sys.modules[family.read.__module__].__doc__ or ""
        kinds = ", ".join(f"`{kind}`" for kind in (family.model_type, *family.other_types))
        yield f"| `{family.architecture}` | {kinds} | {' '.join(what.split()).rstrip('.')} |"
    yield (
        "\n## Public models\n\nThe complete keys of each model's config.json (`tests/checkpoint/public_configs.py`), read as a "
        "conversion reads them.\n"
    )
    yield "| model | architecture | result |\n|---|---|---|"
    for name, config in _public_configs():
        plain_keys = {key: value for key, value in config.items() if key != "quantization_config"}
        try:
            quantization(config, "config.json")
            model_config_from_hf(plain_keys)
            result = f"converts as `{family_of_config(config).model_type}`"
        except CheckpointError as problem:
            reason = re.split(
                r" (?:Known: |Every key must be|This model cannot)", str(problem).removeprefix("config.json: ")
            )[0]
            result = f"refused: {reason}".replace("|", "\\|")
        yield f"| {name} | `{(config.get('architectures') or [None])[0]}` | {result} |"
    yield ""


def _public_configs() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield name and config.json of each public model of the tests' table."""
    path = ROOT / "tests" / "checkpoint" / "public_configs.py"
    spec = importlib.util.spec_from_file_location("public_configs", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield from module.CONVERTS.items()
    yield from ((name, config) for name, (config, _) in module.REFUSED.items())


def configuration_page() -> Iterator[str]:
    """Yield the lines of the page of settings: those of a run, then those of a site file."""
    texts = field_texts()
    flags = {row.setting: row.flag for row in ROWS}
    yield NOTE
    yield "# Settings"
    yield ""
    yield "Any of them may stand in a params file, a task, a size, a variant, a site file, or on the command line as `key=value`;"
    yield "`megatron-cpt show-config --explain KEY` says what a run has and from where. The last column is Megatron-LM's flag."
    for section, kind in sections().items():
        yield from ["", f"## {section}", "", one_line(kind.__doc__ or ""), ""]
        yield from ["| setting | default | meaning | flag |", "|---|---|---|---|"]
        for name, (_, field) in section_fields(kind).items():
            key = f"{section}.{name}"
            default = default_value(field)
            shown = "required" if default is dataclasses.MISSING else f"`{plain(default)}`"
            flag = f"`{flags[key]}`" if flags.get(key) else ""
            yield f"| `{key}` | {cell(shown)} | {cell(texts[key])} | {flag} |"
    for kind, title in ((Site, "site"), (StageResources, "site.stages.STAGE")):
        yield from ["", f"## {title}", "", "In a site file only." if kind is Site else one_line(kind.__doc__ or ""), ""]
        yield from ["| key | default | meaning |", "|---|---|---|"]
        described = attribute_texts(ROOT / "megatron_cpt" / "launch" / "scheduler" / "site.py", kind.__name__)
        for item in dataclasses.fields(kind):
            default = item.default if item.default is not dataclasses.MISSING else {}
            yield f"| `{item.name}` | `{cell(str(default))}` | {cell(described[item.name])} |"
    yield ""


def commands_page() -> Iterator[str]:
    """Yield the lines of the page of commands."""
    yield NOTE
    yield "# Commands"
    yield ""
    yield "`megatron-cpt VERB --help` says the same. Exit codes: 0 done, 1 found something (a check), 2 a mistake that the message"
    yield "names, 130 interrupted; those of jobs are in [recovery.md](../recovery.md)."
    for verb, summary in VERBS.items():
        module, parser = load_verb(verb, f"megatron-cpt {verb}")
        yield from ["", f"## megatron-cpt {verb}", "", f"{sentence(summary)}", ""]
        yield from described(parser.description or "")
        yield from options(parser)
        for name in getattr(module, "SUB_VERBS", ()):
            _, sub = load_verb(f"{verb} {name}", f"megatron-cpt {verb} {name}")
            yield from ["", f"### megatron-cpt {verb} {name}", ""]
            yield from described(sub.description or "")
            yield from options(sub)
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                helps = {choice.dest: choice.help for choice in action._choices_actions}
                for name, sub in action.choices.items():
                    yield from ["", f"### megatron-cpt {verb} {name}", "", sentence(helps.get(name) or ""), ""]
                    yield from options(sub)
    yield ""


def described(text: str) -> Iterator[str]:
    """Yield a description as it is printed."""
    yield from ["```text", *text.strip().splitlines(), "```", ""]


def options(parser: argparse.ArgumentParser) -> Iterator[str]:
    """Yield a table of a parser's arguments."""
    rows = []
    for action in parser._actions:
        hidden = (argparse._HelpAction, argparse._SubParsersAction)
        if isinstance(action, hidden) or action.help == argparse.SUPPRESS or action.dest in ("sub_verb", "rest"):
            continue
        names = ", ".join(f"`{name}`" for name in action.option_strings)
        value = action.metavar or (action.choices and "{" + ",".join(map(str, action.choices)) + "}") or ""
        if not value and action.nargs != 0:
            value = action.dest.upper()
        value = " ".join(value) if isinstance(value, tuple) else str(value)
        many = (
            " ..."
            if action.nargs in ("*", "+", argparse.REMAINDER) or isinstance(action, argparse._AppendAction)
            else ""
        )
        shown = " ".join(filter(None, [names, f"`{value}{many}`" if value else ""]))
        text = (action.help or "") % {**vars(action), "prog": parser.prog} if action.help else ""
        required = "**required**; " if action.required and action.option_strings else ""
        rows.append(f"| {cell(shown)} | {required}{cell(text)} |")
    if rows:
        yield from ["| argument | meaning |", "|---|---|", *rows, ""]


def formats_page() -> Iterator[str]:
    """Yield the lines of the page of file formats: what the modules that read and write them say."""
    yield NOTE
    yield "# File formats"
    yield ""
    yield 'JSON files of ours carry `"format": 1`. `megatron-cpt blend formats` prints a sample of every data list.'
    yield from ["", "## The run directory", "", "`<runs_dir>/<task>/<params>/<size>/<variant>/`", ""]
    yield from ["| path | what it is |", "|---|---|"]
    for name, text in run_paths():
        yield f"| `{name}` | {cell(text)} |"
    for title, module in FORMATS:
        text = ast.get_docstring(ast.parse((ROOT / "megatron_cpt" / module).read_text(encoding="utf-8"))) or ""
        yield from ["", f"## {title}", "", f"`megatron_cpt/{module}`", ""]
        yield from described(text)
    yield ""


def run_paths() -> Iterator[tuple[str, str]]:
    """Yield each path of a run directory with what its property says of it."""
    tree = ast.parse((ROOT / "megatron_cpt" / "run" / "directory.py").read_text(encoding="utf-8"))
    kind = next(node for node in tree.body if isinstance(node, ast.ClassDef))
    for node in kind.body:
        if isinstance(node, ast.FunctionDef):
            returned = next(item for item in ast.walk(node) if isinstance(item, ast.Return))
            path = re.search(r"'([^']+)'", ast.unparse(returned))
            yield path[1] if path else node.name, ast.get_docstring(node) or ""


def attribute_texts(path: Path, kind: str) -> dict[str, str]:
    """Return the text under each field of a class; a field without one has that of the next that has."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    body = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == kind).body
    texts: dict[str, str] = {}
    for statement, following in zip(body, [*body[1:], ast.Pass()], strict=True):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            value = following.value if isinstance(following, ast.Expr) else None
            texts[statement.target.id] = str(value.value) if isinstance(value, ast.Constant) else ""
    return texts


def cell(text: str) -> str:
    """Return text that stands in one cell of a table."""
    return (
        one_line(text).replace("|", "\\|").replace("<", "&lt;")
        if "`" not in text
        else one_line(text).replace("|", "\\|")
    )


def one_line(text: str) -> str:
    """Return text without line breaks."""
    return " ".join(textwrap.dedent(text).split())


def sentence(text: str) -> str:
    """Return a help text as a sentence."""
    return f"{text[:1].upper()}{text[1:]}." if text else ""


if __name__ == "__main__":
    sys.exit(main())
