"""Policy as tests: import layers, forbidden constructs, command-line help, shell files, what documents promise."""

import ast
import functools
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_cpt.cli import VERBS
from megatron_cpt.verbs.dispatch import verb_module

ROOT = Path(__file__).resolve().parent.parent
LAYERS = {
    **dict.fromkeys(("__init__", "errors", "log", "files"), 0),
    "config": 1,
    "run": 2,
    **dict.fromkeys(("data", "launch"), 3),
    "checkpoint": 4,
    **dict.fromkeys(("train", "evaluate", "start"), 5),
    **dict.fromkeys(("cli", "verbs", "interface", "__main__"), 6),
}
ROOMS = {
    # rooms of a package; a room imports from its own group's rooms to the left and from earlier groups, never the other way
    "config": "settings < checks, megatron < loading",
    "data": "reading < tokenizer < lists < shards < tokenize < blend < joining < cleaning < chat < audit",
    "checkpoint": "mapping < torch_dist < huggingface < convert < foreign < soup",
    "launch": "node < scheduler < planning < submission",
    "train": "backend < model < samples < state < watch < stage < tools",
    "evaluate": "models < report < page < advice",
}
"""The order of the rooms inside each package; a comma puts rooms on one floor, where neither imports the other."""
HEAVY = {"torch", "megatron", "transformers", "tokenizers", "numpy", "pyarrow", "matplotlib", "mergekit"}
FORBIDDEN_STEMS = re.compile(r"(utils?|helpers?|common|misc|.*_v\d+|new_.*|process_.*|handle_.*|do_.*)$")
SITE_PATH = re.compile(r"(?<![\w.{}$)/-])/(?:home|groups|gpfs|lustre|fs\d*|root|work|leonardo\w*|flare|eagle)/\w")
HELP_CPU_SECONDS = 2.0


@functools.cache
def tracked(*patterns: str) -> tuple[Path, ...]:
    """Return files of the repository (committed or about to be) that match git's patterns."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *patterns]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return tuple(sorted({ROOT / name for name in names if (ROOT / name).is_file()}))


@functools.cache
def library() -> dict[str, Path]:
    """Return dotted module name -> file of the package."""
    return {module_name(path): path for path in tracked("megatron_cpt/*.py")}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imports(path: Path) -> list[tuple[str, int]]:
    """Return (dotted name, line) of every import in a file, also those inside functions."""
    found = []
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            for alias in node.names:
                found.append((f"{node.module}.{alias.name}", node.lineno))
    return found


def layer_of(module: str) -> str:
    """Return the package's part that a module belongs to: `config`, `train`, `errors`."""
    return [*module.split("."), "__init__"][1]


def imported_modules(path: Path) -> dict[str, int]:
    """Return the package's own modules that a file imports, with the line."""
    modules = library()
    found = {}
    for name, line in imports(path):
        if name.split(".")[0] == "megatron_cpt":
            target = name if name in modules else name.rpartition(".")[0]
            assert target in modules, f"{path}:{line}: imports {name}, which does not exist"
            found[target] = line
    return found


def where(path: Path, line: int) -> str:
    return f"{path.relative_to(ROOT)}:{line}"


def test_every_module_belongs_to_a_layer():
    assert {layer_of(module) for module in library()} <= set(LAYERS)


def test_imports_run_one_way_through_the_layers():
    breaches = [
        f"{where(path, line)}: {layer_of(module)} imports {target}"
        for module, path in library().items()
        for target, line in imported_modules(path).items()
        if LAYERS[layer_of(target)] > LAYERS[layer_of(module)]
        or (layer_of(module), layer_of(target)) == ("data", "launch")
    ]
    assert not breaches, "\n".join(breaches)


def room_of(module: str) -> str:
    """Return the folder of a module inside its package (`reading`), or "" for a module that lies at the package's top."""
    folders = library()[module].relative_to(ROOT / "megatron_cpt").parts[1:-1]
    return folders[0] if folders else ""


def test_every_room_has_its_place_in_the_order_of_its_package():
    found = {(layer_of(module), room_of(module)) for module in library() if layer_of(module) != "verbs"}
    known = {(layer, room) for layer, order in ROOMS.items() for room in re.findall(r"\w+", order)}
    assert {pair for pair in found if pair[1]} == known


def test_imports_run_one_way_through_the_rooms_of_a_package():
    floors = {
        (layer, room): floor
        for layer, order in ROOMS.items()
        for floor, rooms in enumerate(order.split(" < "))
        for room in rooms.split(", ")
    }
    breaches = []
    for module, path in library().items():
        layer, room = layer_of(module), room_of(module)
        for target, line in imported_modules(path).items():
            other = room_of(target)
            if layer_of(target) == layer and room and other and other != room:
                if floors[layer, other] >= floors[layer, room]:
                    breaches.append(f"{where(path, line)}: {layer}/{room} imports {layer}/{other}")
    assert not breaches, "\n".join(breaches)


def test_the_page_of_the_architecture_names_every_room_in_its_order():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    for package, order in ROOMS.items():
        row = next(line for line in text.splitlines() if line.startswith(f"| `{package}` |"))
        named = re.findall(r"`(\w+)`", row.split("|")[2])
        floors = [set(re.findall(r"\w+", rooms)) for rooms in order.split(" < ")]
        assert set(named) == set().union(*floors), f"{package}: {named}"
        place = {room: floor for floor, rooms in enumerate(floors) for room in rooms}
        assert sorted(named, key=lambda room: place[room]) == named, f"{package}: {named} is not the order {order}"


def test_there_is_no_import_cycle():
    graph = {module: set(imported_modules(path)) - {"megatron_cpt"} for module, path in library().items()}
    while leaves := {module for module, targets in graph.items() if not targets & graph.keys()}:
        for leaf in leaves:
            del graph[leaf]
    assert not graph, f"modules in or above a cycle: {', '.join(sorted(graph))}"


def test_config_and_launch_name_no_heavy_package():
    breaches = [
        f"{where(path, line)}: {name}"
        for module, path in library().items()
        if layer_of(module) in ("config", "run", "launch")
        for name, line in imports(path)
        if name.split(".")[0] in HEAVY
        # a login node may read a checkpoint's or a shard's index, once it is asked to
        and not (layer_of(module) == "launch" and name.split(".")[0] == "numpy" and is_inside_function(path, line))
    ]
    assert not breaches, "\n".join(breaches)


def is_inside_function(path: Path, line: int) -> bool:
    functions = [node for node in ast.walk(tree(path)) if isinstance(node, ast.FunctionDef)]
    return any(node.lineno < line <= (node.end_lineno or 0) for node in functions)


def test_megatron_is_imported_in_train_only():
    users = {
        module
        for module, path in library().items()
        for name, _ in imports(path)
        if name.split(".")[0] == "megatron" and layer_of(module) != "train"
    }
    assert not users


@pytest.mark.parametrize(
    ("layers", "heavy"), [(("config", "run", "launch"), HEAVY), (("cli", "verbs"), HEAVY - {"numpy"})]
)
def test_importing_every_light_module_loads_no_heavy_package(layers, heavy):
    modules = [module for module in library() if layer_of(module) in layers]
    program = (
        f"import importlib, sys\nfor name in {modules!r}: importlib.import_module(name)\n"
        f"print(*sorted({heavy!r} & set(sys.modules)))"
    )
    answer = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.strip() == ""


def test_the_library_neither_prints_nor_edits_sys_path_nor_imports_a_star():
    breaches = []
    for path in library().values():
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
                breaches.append(f"{where(path, node.lineno)}: print")
            if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("sys.path."):
                breaches.append(f"{where(path, node.lineno)}: edits sys.path")
            if isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names):
                breaches.append(f"{where(path, node.lineno)}: star import")
    assert not breaches, "\n".join(breaches)


def test_every_module_and_public_function_says_what_it_is():
    breaches = []
    for module, path in library().items():
        if ast.get_docstring(tree(path)) is None and path.name != "__init__.py":
            breaches.append(f"{where(path, 1)}: no module docstring")
        for node in tree(path).body:
            public = isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
            verb_hook = layer_of(module) == "verbs" and public and node.name in ("add_arguments", "run")
            if public and not verb_hook and ast.get_docstring(node) is None:
                breaches.append(f"{where(path, node.lineno)}: {node.name} has no docstring")
    assert not breaches, "\n".join(breaches)


def test_package_files_reexport_nothing():
    breaches = [
        where(path, 1)
        for path in tracked("megatron_cpt/*__init__.py")
        if any(
            isinstance(node, ast.Import | ast.ImportFrom)
            # the root makes four of its packages callable, which takes the standard library
            and (node.module if isinstance(node, ast.ImportFrom) else node.names[0].name) not in sys.stdlib_module_names
            for node in tree(path).body
        )
    ]
    assert not breaches, breaches


def test_no_file_has_a_forbidden_or_standard_library_name():
    programs = tracked("*.py", "*.sh")
    breaches = [str(path.relative_to(ROOT)) for path in programs if FORBIDDEN_STEMS.match(path.stem)]
    scripts = tracked("tools/*.py", "benchmarks/*.py", "installers/*.py", "tasks/*.py")
    breaches += [str(path.relative_to(ROOT)) for path in scripts if path.stem in sys.stdlib_module_names]
    assert not breaches, breaches


def test_no_site_path_stands_in_code_or_settings():
    files = tracked("*.py", "*.sh", "*.yaml", "*.j2", "*.template", "Makefile", "pyproject.toml", "*.txt", "*.in")
    breaches = [
        f"{where(path, number)}: {line.strip()[:100]}"
        for path in files
        if "tests" not in path.relative_to(ROOT).parts
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if SITE_PATH.search(line)
    ]
    assert not breaches, "\n".join(breaches)


PROBE = """
import argparse, contextlib, importlib, io, json, resource, sys
for name in HEAVY: sys.modules[name] = None  # an import of any of them fails
from megatron_cpt.cli import main
def help_text(argv):
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
        main([*argv, "--help"])
    return output.getvalue()
from megatron_cpt.verbs.dispatch import verb_module
module = importlib.import_module(verb_module(VERB))
parser = argparse.ArgumentParser()
module.add_arguments(parser)
parts = list(getattr(module, "SUB_VERBS", ()))
for action in parser._actions:
    if isinstance(action, argparse._SubParsersAction): parts += list(action.choices)
texts = {part: help_text([VERB, part]) for part in parts}
texts[""] = help_text([VERB])
print(json.dumps({"texts": texts, "seconds": resource.getrusage(resource.RUSAGE_SELF).ru_utime}))
"""


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself_with_an_example_quickly_and_without_heavy_packages(verb):
    program = f"HEAVY, VERB = {sorted(HEAVY - {'numpy'})!r}, {verb!r}\n{PROBE}"
    answer = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert answer.returncode == 0, answer.stderr
    found = json.loads(answer.stdout)
    for part, text in found["texts"].items():
        assert text.startswith("usage: "), f"{verb} {part} --help: {text!r}"
    description = found["texts"][""].split("\n\n", 1)[1]
    assert re.search(f"megatron[-_]cpt {verb} ", description), f"{verb} --help shows no example"
    assert found["seconds"] < HELP_CPU_SECONDS


def test_every_verb_module_is_reachable_from_the_command_line():
    reachable = set()
    for verb in VERBS:
        module = verb_module(verb)
        assert module in library(), f"{module} is missing"
        reachable.add(module)
        for node in tree(library()[module]).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "SUB_VERBS":
                reachable |= {verb_module(f"{verb} {name}") for name in ast.literal_eval(node.value)}
    verbs = {module: path for module, path in library().items() if layer_of(module) == "verbs"}
    shared = {target for path in verbs.values() for target in imported_modules(path)}
    packages = {module for module, path in verbs.items() if path.name == "__init__.py"}
    assert not verbs.keys() - reachable - shared - packages


TOOLS = tracked("tools/*.sh", "tools/*.py", "pbs/*.sh", "slurm/*.sh")


@pytest.mark.parametrize("path", TOOLS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_tool_answers_help_and_refuses_nothing_but_help(path):
    command = [sys.executable, path] if path.suffix == ".py" else ["bash", path]
    answer = subprocess.run([*command, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert answer.returncode == 0, answer.stderr
    assert re.search("usage|example", answer.stdout, re.IGNORECASE), answer.stdout


def shell_files() -> list[Path]:
    scripts = [path for path in tracked() if path.suffix in ("", ".sh") and path.name != "Makefile"]
    return [path for path in scripts if path.suffix == ".sh" or path.read_bytes().startswith(b"#!/usr/bin/env bash")]


@pytest.mark.parametrize("path", shell_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_shell_file_parses_stops_at_errors_and_is_executable(path):
    text = path.read_text(encoding="utf-8")
    parsed = subprocess.run(["bash", "-n", path], capture_output=True, text=True)
    assert parsed.returncode == 0, parsed.stderr
    assert text.startswith("#!/usr/bin/env bash\n")
    assert re.search(r"^set -(eu|u)o pipefail$", text, re.MULTILINE)
    if "golden" not in path.parts:
        assert path.stat().st_mode & 0o100, f"{path} is not executable"


def test_shellcheck_finds_nothing():
    shellcheck = Path(sys.executable).with_name("shellcheck")
    found = str(shellcheck) if shellcheck.exists() else shutil.which("shellcheck")
    assert found, "shellcheck is missing; make venv installs it"
    answer = subprocess.run([found, *shell_files()], capture_output=True, text=True)
    assert answer.returncode == 0, answer.stdout


DOCUMENTS = tracked("README.md", "CONTRIBUTING.md", "docs/*.md", "tasks/*.md", "installers/*.md")
FOLDERS = "megatron_cpt|tests|tools|params|tasks|pbs|slurm|installers|benchmarks|docs|\\.ci"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_path_and_link_in_a_document_exists(document):
    text = document.read_text(encoding="utf-8")
    links = {target for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text) if "://" not in target}
    missing = [target for target in links if not (document.parent / target).exists()]
    for path in re.findall(rf"(?<![\w./-])((?:{FOLDERS})/[\w./-]*\w)", text):
        # tasks/NAME is a placeholder, and tasks/ja the task of the guides (tests/guide_scratch.py)
        if not (ROOT / path).exists() and not re.search("/[A-Z_]+([./]|$)", path) and path != "tasks/ja":
            missing.append(path)
    assert not missing, f"{document.name} names what does not exist: {sorted(set(missing))}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_command_in_a_document_exists(document):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    unknown = []
    for command in documented_commands(document.read_text(encoding="utf-8")):
        if command[:1] == ["make"]:
            unknown += [f"make {word}" for word in command[1:] if "=" not in word and word not in targets]
        if "megatron-cpt" in command[0] and len(command) > 1 and re.fullmatch("[a-z][a-z-]*", command[1]):
            unknown += [f"megatron-cpt {command[1]}"] if command[1] not in VERBS else []
    assert not unknown, unknown


def documented_commands(text: str) -> list[list[str]]:
    """Return the words of each line in code blocks and of each inline code that begins a command."""
    lines = [
        line
        for block in re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
        for line in block.splitlines()
    ]
    lines += re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))
    commands = []
    for line in lines:
        try:
            words = shlex.split(line.strip().removeprefix("$ "), comments=True)
        except ValueError:  # half a line of prose or of a longer command
            continue
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words.pop(0)
        if words:
            commands.append(words)
    return commands


DIALECT = {
    r"\b(?:go|goes|going|went) on\b": "continue, resume",
    r"\bmend(?:s|ed|ing)?\b": "fix, repair",
    r"\bstands? in\b|\bstand-ins?\b|\bas it stands\b": "is in, replaces, unchanged",
    r"\bbeside\b": "next to, in addition to",
    r"\btaken for\b": "read as",
    r"\bsays?\b|\bsaid\b": "prints, returns, contains, states",
    r"\bmay\b": "can, is allowed to; must not for may not",
    r"(?:^|[.:;] |^[-|] ?|\*\* ?)(?:What|Who|Whoever|Whatever|Where)\b[^.?|\n]*\.": "a noun as the subject of the sentence",
}
"""Phrases that the documents avoid -> plain words for them."""


def dialect(text: str) -> list[str]:
    """Return the phrases of a document's prose (not of its code) that `DIALECT` refuses, with line and replacement."""
    prose = re.sub(r"^```.*?^```", lambda block: "\n" * block[0].count("\n"), text, flags=re.MULTILINE | re.DOTALL)
    prose = re.sub(r"`[^`\n]*`", "`code`", prose)
    return [
        f"{prose.count(chr(10), 0, match.start()) + 1}: {match[0].strip()!r} (use: {plain})"
        for pattern, plain in DIALECT.items()
        for match in re.finditer(pattern, prose, re.MULTILINE)
    ]


@pytest.mark.parametrize(
    "document",
    [path for path in DOCUMENTS if "reference" not in path.parts],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_every_document_is_written_in_plain_english(document):
    found = dialect(document.read_text(encoding="utf-8"))
    assert not found, f"{document.relative_to(ROOT)}:\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("The run goes on where it stopped.", 1),
        ("What is killed is repaired.", 1),
        ("Kept beside the file, and mended.", 2),
        ("A stage may read it; status says so.", 2),
        ("## What there is to see", 0),
        ("What does it learn?", 0),
        ("```bash\necho beside\n```\n`goes on` is code", 0),
        ("The run continues where it stopped.", 0),
    ],
)
def test_the_dialect_is_found_in_prose_and_not_in_code(text, count):
    assert len(dialect(text)) == count


CLOSENESS = {
    "allclose",
    "assert_allclose",
    "assert_close",
    "assert_array_almost_equal",
    "assert_almost_equal",
    "isclose",
    "approx",
}
TOLERANCES = {"rtol", "atol", "rel_tol", "abs_tol"}


def closeness(path: Path) -> list[str]:
    """Return the places where a test says itself how close two floating-point results have to be."""
    found = []
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func).rpartition(".")[2]
            given = TOLERANCES & {keyword.arg for keyword in node.keywords}
            found += [f"{where(path, node.lineno)}: {name}"] if name in CLOSENESS or given else []
        if isinstance(node, ast.Dict):  # TOLERANCE = {"rtol": ...}, **TOLERANCE
            names = {key.value for key in node.keys if isinstance(key, ast.Constant)}
            found += [f"{where(path, node.lineno)}: a dictionary of tolerances"] if names & TOLERANCES else []
        if isinstance(node, ast.Compare) and len(node.ops) == 1 and isinstance(node.ops[0], ast.Lt | ast.LtE):
            left, right = ast.unparse(node.left), node.comparators[0]
            limits = [part.value for part in ast.walk(right) if isinstance(part, ast.Constant)]
            # a distance of 1 and more is a promise about counts
            is_small = any(isinstance(value, float) and value < 0.1 for value in limits)
            found += (
                [f"{where(path, node.lineno)}: {left} < {ast.unparse(right)}"] if "abs(" in left and is_small else []
            )
    return found


def test_how_close_results_have_to_be_is_said_in_one_module_with_its_reason():
    """A limit that one machine happened to keep is broken by the next processor: see tests/tolerances.py."""
    files = [path for path in tracked("tests/*.py") if path.name != "tolerances.py"]
    found = [breach for path in files for breach in closeness(path)]
    assert not found, "use a function of tests/tolerances.py instead of:\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("text", "is_found"),
    [
        ("np.testing.assert_allclose(a, b, 1e-5)", True),
        ("assert a == pytest.approx(b)", True),
        ("compare(a, b, rtol=1e-5)", True),
        ("T = {'rtol': 1e-5}", True),
        ("assert abs(a - b) < 1e-6", True),
        ("assert (a - b).abs().max() <= 2e-7 * n", True),
        ("assert abs(count - share) < 1", False),
        ("assert abs(a - b) > 1e-4", False),
        ("assert_fp32_rounding(a, b)", False),
    ],
)
def test_a_bare_tolerance_is_found(tmp_path, monkeypatch, text, is_found):
    path = tmp_path / "test_x.py"
    path.write_text(text)
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    assert bool(closeness(path)) == is_found
