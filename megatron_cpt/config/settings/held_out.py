"""Names of the files of a corpus with `held_out`, relative to `paths.data_dir`.

A stage of the pipeline splits the documents by their hashes (`data split`) into `split/CORPUS/documents/train`
and `.../validation`; the first are tokenized for training, the second for the validation and for bits per byte.
"""

from megatron_cpt.config.settings.schema import CorpusConfig

VALIDATION = "validation"
DOCUMENTS = "documents"
"""Name of the corpus for `data split`, whose output folder belongs to one corpus."""
_SUFFIX = "_text_document"


def training_documents(name: str, corpus: CorpusConfig) -> tuple[str, ...]:
    """Return the documents that a corpus's tokens are made of: those that are not held out."""
    return corpus.documents if corpus.held_out is None else (f"{split_dir(name)}/{DOCUMENTS}/train",)


def held_out_documents(name: str) -> str:
    """Return the folder of a corpus's held-out documents."""
    return f"{split_dir(name)}/{DOCUMENTS}/{VALIDATION}"


def split_dir(name: str) -> str:
    """Return where `data split` writes a corpus's two sides."""
    return f"split/{name}"


def tokens_of(name: str) -> str:
    """Return the prefix of a corpus's tokens, where the task states none."""
    return f"tokens/{name}{_SUFFIX}"


def held_out_tokens(name: str) -> str:
    """Return the prefix of a corpus's held-out tokens."""
    return f"tokens/{name}.{VALIDATION}{_SUFFIX}"
