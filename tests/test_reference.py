"""The generated reference is what the code says now, and complete."""

import importlib.util
from pathlib import Path

import pytest

from megatron_cpt.cli import VERBS
from megatron_cpt.config.settings.fields import setting_keys

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    spec = importlib.util.spec_from_file_location("write_reference", ROOT / "tools" / "write_reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.pages()


@pytest.mark.parametrize("name", ["configuration.md", "commands.md", "formats.md", "models.md"])
def test_the_reference_is_up_to_date(pages, name):
    written = (ROOT / "docs" / "reference" / name).read_text(encoding="utf-8")
    assert pages[name] == written, f"docs/reference/{name} is out of date. Run `make docs` and commit it."


def test_every_setting_verb_and_run_path_is_in_it(pages):
    missing = [key for key in setting_keys() if "." in key and f"`{key}`" not in pages["configuration.md"]]
    assert not missing
    assert all(f"## megatron-cpt {verb}\n" in pages["commands.md"] for verb in VERBS)
    assert "### megatron-cpt submit sweep" in pages["commands.md"] and "`--grid" in pages["commands.md"]
    assert "| `metrics.jsonl` |" in pages["formats.md"]


def test_no_description_is_empty(pages):
    empty = [line for text in pages.values() for line in text.splitlines() if line.endswith("|  |") and "`" in line]
    allowed = [line for line in empty if line.count("|") > 3]  # the last column of settings is a flag that need not be
    assert not set(empty) - set(allowed), sorted(set(empty) - set(allowed))
