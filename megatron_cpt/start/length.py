"""A length in epochs of corpora that may not be tokenized yet: where token files are missing, it follows from a look at the documents.

The estimate serves what is said and checked beforehand (`plan`, `submit`). The stage itself counts its token files when it
starts.
"""

from pathlib import Path

from megatron_cpt.config.loading.paths import data_path
from megatron_cpt.config.loading.resolve import LoadedConfig
from megatron_cpt.config.settings.derived import stage_corpora
from megatron_cpt.config.settings.schema import RunConfig
from megatron_cpt.data.blend.epochs import with_iterations
from megatron_cpt.errors import DataError


def with_length(loaded: LoadedConfig) -> tuple[LoadedConfig, str]:
    """Return the configuration with its length in iterations, and if it is an estimate how it was found.

    Raises: ConfigError, DataError when the epochs can be neither counted nor estimated.
    """
    if loaded.config.training.train_epochs is None:
        return loaded, ""
    corpora = _untokenized_corpora(loaded.config)
    if not corpora:
        return with_iterations(loaded), ""
    estimated = with_iterations(loaded, {corpus: _estimate(loaded.config, corpus) for corpus in corpora})
    origin = estimated.origins["training.train_iters"].replace(" by an estimate", "")
    return estimated, (
        f"an estimate: {origin}; the token files of {', '.join(corpora)} are not made yet "
        "and are counted when training starts"
    )


def _untokenized_corpora(config: RunConfig) -> list[str]:
    """Return the corpora of the stage that have documents and a place for token files, but no token files."""
    from megatron_cpt.data.shards.discovery import find_shards  # heavy: numpy; only where a length is in epochs

    if config.data.train_data_path is not None:
        return []
    corpora, data_dir = config.data.corpora, Path(config.paths.data_dir)
    return [
        name
        for name in stage_corpora(config.data)
        if corpora[name].documents and corpora[name].tokens and not find_shards(corpora[name].tokens, data_dir)[0]
    ]


def _estimate(config: RunConfig, name: str) -> int:
    """Return about how many tokens a corpus's documents will give, without those that are held out."""
    from megatron_cpt.data.shards.corpus_documents import document_inputs
    from megatron_cpt.data.tokenizer.interface import load_tokenizer  # heavy: the tokenizer's library
    from megatron_cpt.start.look import look_at

    corpus = config.data.corpora[name]
    if config.data.tokenizer is None or not Path(data_path(config.paths, config.data.tokenizer)).exists():
        raise DataError(
            f"training.train_epochs: {name} has no token files, and data.tokenizer {config.data.tokenizer} is not in "
            f"{config.paths.data_dir}. A tokenizer is needed to estimate the tokens of its documents. Set data.tokenizer."
        )
    tokenizer = load_tokenizer(Path(data_path(config.paths, config.data.tokenizer)))
    return round(
        look_at(name, document_inputs(config.paths, corpus.documents), tokenizer).tokens * (1 - (corpus.held_out or 0))
    )
