"""A tree with params, task and site files in a temporary folder, and a way to load it."""

from collections.abc import Callable
from pathlib import Path
from textwrap import dedent

import pytest
from hypothesis import settings

from megatron_cpt.config.loading import sources
from megatron_cpt.config.loading.resolve import LoadedConfig, load_config

settings.register_profile("shared-machine", deadline=None, derandomize=True)
settings.load_profile("shared-machine")

PARAMS = """
description: tiny
model: {num_layers: 4, hidden_size: 64, ffn_hidden_size: 128, num_attention_heads: 8, num_query_groups: 4, vocab_size: 1000}
training: {seq_length: 64, micro_batch_size: 2, global_batch_size: 16}
optimizer: {lr: 3e-4}
"""
TASK = """
description: a task
data:
  corpora:
    D0: {tokens: [d0], validation: [v0]}
    D1: {tokens: [d1], validation: v1}
  mix: {D0: 0.25, D1: 0.75}
sizes:
  1M: {training: {train_tokens: 1M}}
  short: {training: {train_iters: 10}}
variants:
  main:
  replay:
    optimizer: {lr: 1e-4}
    data: {mix: {D1: 1.0}}
"""
SITE = """
site: {queue: any}
launch: {scheduler: pbs, gpus_per_node: 8, walltime: 24:00:00}
"""


class Tree:
    """Configuration files in a folder that is the current one."""

    def __init__(self, root: Path):
        self.root = root
        self.write("params/tiny.yaml", PARAMS)
        self.write("tasks/ja/task.yaml", TASK)
        self.write("pbs/sites/abci.yaml", SITE)

    def write(self, name: str, text: str) -> Path:
        """Write a file, its text freed of common indentation."""
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(dedent(text))
        return path

    def load(self, *overrides: str, size: str = "1M", variant: str = "main", site: str | None = None) -> LoadedConfig:
        """Load the tree's one task."""
        return load_config(Path("tasks/ja"), "tiny", size, variant, site, overrides)


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tree:
    """Return a tree that the current folder is in; the checkout's own files are out of reach."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sources, "CHECKOUT", tmp_path / "checkout")
    return Tree(tmp_path)


@pytest.fixture
def refused(tree: Tree) -> Callable[..., str]:
    """Return a function that loads the tree with overrides and gives the error's message back."""
    from megatron_cpt.errors import ConfigError

    def message(*overrides: str, **choice: str) -> str:
        with pytest.raises(ConfigError) as error:
            tree.load(*overrides, **choice)
        return str(error.value)

    return message
