"""The choices of tokenizing: what changes the shards, the files that are read, or how a bad line is treated."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_cpt.data.reading.records import POLICIES
from megatron_cpt.data.reading.streams import MAX_DOCUMENT_BYTES, Layout
from megatron_cpt.data.tokenizer.control_tokens import SPECIAL_TOKENS
from megatron_cpt.errors import ConfigError

BOS = ("auto", "on", "off")
"""auto: the ids that the tokenizer's post-processor puts before a text; on: those, or the bos_token; off: none."""


@dataclass(frozen=True, kw_only=True)
class TokenizeOptions:
    """Choices that change the shards, the files that are read, or how a bad line is treated."""

    keys: Sequence[str] = ("text",)
    """Keys or columns that hold text; each gets a shard of its own."""
    append_eod: bool = True
    eod_token: str | None = None
    """The end-of-document token where the tokenizer's eos_token is not the one."""
    bos: str = "auto"
    """auto (as the tokenizer's post-processor writes it), on or off."""
    special_tokens: str | None = None
    """Control tokens written in a text: text, token or reject; None: text, or what an output of an earlier release began with."""
    shard_tokens: int | None = None
    """Files are grouped into shards of about this many tokens, within their folder."""
    num_shards: int | None = None
    """All files are grouped into this many shards of similar size."""
    is_across_folders: bool = False
    """Whether `shard_tokens` groups files of different folders."""
    on_bad_line: str = "fail"
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    format: str | None = None
    """What the files are, whatever their names say."""
    txt_documents: str = "line"
    max_document_bytes: int = MAX_DOCUMENT_BYTES
    provenance: bool = False
    """Whether file and line of each document are kept."""
    engine: str = "auto"

    def __post_init__(self) -> None:
        """Raise ConfigError for values that are none of the choices."""
        if self.on_bad_line not in POLICIES:
            raise ConfigError(f"tokenize: on_bad_line is {self.on_bad_line!r}. Choose one of {', '.join(POLICIES)}.")
        if self.special_tokens not in (None, *SPECIAL_TOKENS) or self.bos not in BOS:
            raise ConfigError(
                f"tokenize: special_tokens is {self.special_tokens!r} and bos {self.bos!r}. Choose one of "
                f"{', '.join(SPECIAL_TOKENS)}, and one of {', '.join(BOS)}."
            )
        if self.num_shards is not None and (self.num_shards < 1 or self.shard_tokens or self.is_across_folders):
            raise ConfigError(
                f"tokenize: num_shards is {self.num_shards}. A number from 1 on is needed, which says alone how files are grouped."
            )
        if self.is_across_folders and not self.shard_tokens:
            raise ConfigError("tokenize: files of different folders are grouped by shard_tokens. Give --shard-tokens.")

    @property
    def layout(self) -> Layout:
        """How documents are found in files."""
        return Layout(
            keys=tuple(self.keys), txt_documents=self.txt_documents, max_document_bytes=self.max_document_bytes
        )

    def recorded(self) -> dict[str, Any]:
        """Return what a shard's manifest says of them; control tokens and BOS depend on the tokenizer and come later."""
        return {
            "keys": list(self.keys),
            "append_eod": self.append_eod,
            "txt_documents": self.txt_documents,
            "max_document_bytes": self.max_document_bytes,
            "on_bad_line": self.on_bad_line,
            "provenance": self.provenance,
            "shard_tokens": self.shard_tokens,
            **({"num_shards": self.num_shards} if self.num_shards else {}),
            **({"across_folders": True} if self.is_across_folders else {}),
        }
