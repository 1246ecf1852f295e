"""Settings that follow from others once all layers are merged: the location of weights and the names of held-out parts.

Every relative path of a task, params or site file starts at `paths.data_dir`: those of the data section unchanged, and
`init.from_path`, which is resolved here. On the command line `init.from_path=` starts at the current folder, as a shell
completes it. `..` and absolute paths are allowed everywhere.
"""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path

from megatron_cpt.config.settings.held_out import held_out_documents, held_out_tokens, tokens_of
from megatron_cpt.config.settings.schema import CorpusConfig, PathsConfig, RunConfig


def with_paths(config: RunConfig, origins: Mapping[str, str]) -> RunConfig:
    """Return the configuration with `init.from_path` resolved and the files of held-out parts named."""
    corpora = {name: _with_held_out(name, corpus) for name, corpus in config.data.corpora.items()}
    data = dataclasses.replace(config.data, corpora=corpora)
    source = config.init.from_path
    is_path = source is not None and not source.startswith("variant:")
    if is_path and origins.get("init.from_path") != "command line":
        init = dataclasses.replace(config.init, from_path=data_path(config.paths, str(source)))
        return dataclasses.replace(config, data=data, init=init)
    return dataclasses.replace(config, data=data)


def _with_held_out(name: str, corpus: CorpusConfig) -> CorpusConfig:
    if corpus.held_out is None or corpus.validation or corpus.validation_documents:  # both are refused later
        return corpus
    return dataclasses.replace(
        corpus,
        tokens=corpus.tokens or (tokens_of(name),),
        validation=(held_out_tokens(name),),
        validation_documents=(held_out_documents(name),),
    )


def data_path(paths: PathsConfig, path: str) -> str:
    """Return `path`, which starts at the data folder, without `..` in the middle where that means the same.

    The data folder need not be there: `data/task/../../text` is `text` before the first stage makes `data/task` and after.
    """
    folder = paths.data_dir
    joined = os.path.join(folder, path)
    plain = os.path.normpath(joined)
    is_same = not Path(folder).exists() or os.path.realpath(joined) == os.path.realpath(plain)
    return plain if is_same else joined
