"""The interpretation of a corpus's `documents`, shared by checks, the graph, tokenizing and evaluation.

A path is taken from the data folder unless it is absolute; it is a file, a folder or a glob, as `tokenize --input` reads it.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from megatron_cpt.config.loading.paths import data_path
from megatron_cpt.config.settings.derived import stage_corpora
from megatron_cpt.config.settings.held_out import DOCUMENTS, VALIDATION, split_dir, training_documents
from megatron_cpt.config.settings.schema import PathsConfig, RunConfig
from megatron_cpt.data.reading.documents import Source, list_sources
from megatron_cpt.errors import DataError
from megatron_cpt.files import read_json


def document_inputs(paths: PathsConfig, patterns: Sequence[str]) -> list[str]:
    """Return paths, folders and globs of documents as `tokenize --input` and `evaluate --text` take them."""
    return [data_path(paths, pattern) for pattern in patterns]


def document_problems(config: RunConfig) -> list[str]:
    """Return what is wrong with the documents that the configuration names, a line each."""
    problems = []
    for name, corpus in config.data.corpora.items():
        # what is held out is made by a stage
        for key in ("documents", *(() if corpus.held_out else ("validation_documents",))):
            for pattern in getattr(corpus, key):
                try:
                    list_sources(document_inputs(config.paths, [pattern]))
                except (DataError, OSError) as problem:
                    problems.append(f"data.corpora.{name}.{key}: {pattern}: {problem}")
    return problems


def untokenized(config: RunConfig) -> dict[str, list[str]]:
    """Return corpus -> documents that its token files were not made of, or not in the size that they have now.

    Only what can be known counts: a corpus whose documents are not here (any more), whose token files have no manifest with
    sources, or were made of other files altogether (cleaned copies, say), has no entry.
    """
    found = {}
    for name in stage_corpora(config.data):
        corpus = config.data.corpora[name]
        try:
            documents = training_documents(name, corpus)
            sources = list_sources(document_inputs(config.paths, documents)) if documents else []
        except (DataError, OSError):
            continue
        made_of = _made_of(config.paths, corpus.tokens)
        if made_of is None:
            continue
        missing = _unsplit(config, name) or _missing(sources, made_of)
        if missing:
            found[name] = missing
    return found


def _unsplit(config: RunConfig, name: str) -> list[str]:
    """Return documents of a corpus with `held_out` that came, or changed, after its documents were split."""
    corpus = config.data.corpora[name]
    record = Path(config.paths.data_dir) / split_dir(name) / f"{VALIDATION}.json"
    if corpus.held_out is None or not record.is_file():
        return []
    made_of = (read_json(record, DataError).get("made_of") or {}).get(DOCUMENTS)
    try:
        sources = list_sources(document_inputs(config.paths, corpus.documents))
    except (DataError, OSError):
        return []
    known = Counter((Path(entry["path"]).name, entry["size"]) for entry in made_of["sources"]) if made_of else None
    return [] if known is None else _missing(sources, known)


def check_tokenized(config: RunConfig) -> None:
    """Raise DataError where documents of a corpus are not in its token files: a job that made them failed, or they are new."""
    problems = [
        f"data.corpora.{name}: {len(paths)} of its documents are not in its token files, such as {paths[0]}. Tokens of all "
        "documents are needed. Tokenize them (`submit pipeline --only tokenize`), or take them out of `documents`."
        for name, paths in untokenized(config).items()
    ]
    if problems:
        raise DataError("\n".join(problems))


def _missing(sources: Sequence[Source], made_of: Counter[tuple[str, int]]) -> list[str]:
    names = {name for name, _ in made_of}
    if not any(source.path.name in names for source in sources):
        return []
    left, missing = Counter(made_of), []
    for source in sources:
        key = (source.path.name, source.size)
        if left[key]:
            left[key] -= 1
        else:
            missing.append(str(source.path))
    return missing


def _made_of(paths: PathsConfig, tokens: Sequence[str]) -> Counter[tuple[str, int]] | None:
    """Return (file name, size) of the sources of token files, None if one does not record them."""
    from megatron_cpt.data.shards.discovery import find_shards  # numpy
    from megatron_cpt.data.shards.indexed import manifest_path

    made_of: Counter[tuple[str, int]] = Counter()
    for prefix in find_shards(tokens, Path(paths.data_dir))[0]:
        path = manifest_path(Path(prefix))
        manifest = read_json(path, DataError) if path.is_file() else {}
        if not manifest.get("sources"):
            return None
        made_of.update((Path(entry["path"]).name, entry["size"]) for entry in manifest["sources"])
    return made_of
