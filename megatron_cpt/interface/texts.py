"""Text: duplicates out, documents to token shards, and a shard as a sequence of documents."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from megatron_cpt.data.audit.trace import Origin, trace_document
from megatron_cpt.data.cleaning.dedup import DedupOptions, deduplicate
from megatron_cpt.data.cleaning.signatures import MinHashOptions
from megatron_cpt.data.reading.documents import list_sources
from megatron_cpt.data.reading.record_files import Reading
from megatron_cpt.data.shards import indexed
from megatron_cpt.data.tokenize import driver
from megatron_cpt.data.tokenize.options import TokenizeOptions
from megatron_cpt.data.tokenizer.interface import Tokenizer, load_tokenizer
from megatron_cpt.errors import ConfigError
from megatron_cpt.interface.html import html_table


@dataclass(frozen=True)
class Deduplicated:
    """Result of `dedup`; `report` is the content of report.json."""

    output: Path
    report: Mapping[str, Any]

    def _repr_html_(self) -> str:
        rows = [(name, row) for name, row in self.report.items() if isinstance(row, int | float | str)]
        return html_table(("", ""), rows, str(self.output))


@dataclass(frozen=True)
class Tokenized:
    """The shards that `tokenize` has made, and its report."""

    prefixes: list[Path]
    report: Mapping[str, Any]

    def shards(self) -> "list[Shard]":
        """Return the shards, opened."""
        return [Shard(prefix) for prefix in self.prefixes]

    def _repr_html_(self) -> str:
        rows = [(shard.prefix, f"{len(shard):,}", f"{shard.num_tokens:,}") for shard in self.shards()]
        return html_table(("shard", "documents", "tokens"), rows)


@dataclass(frozen=True)
class Shard:
    """A `.bin/.idx` pair as a sequence of documents: `len(shard)`, `shard[i]` (token ids), `shard.text(i)`, `shard.origin(i)`."""

    prefix: Path
    tokenizer_path: Path | None = None

    @cached_property
    def _index(self) -> indexed.ShardIndex:
        return indexed.read_index(self.prefix)

    @cached_property
    def _tokens(self) -> np.ndarray:
        return indexed.read_tokens(self._index)

    @cached_property
    def _bounds(self) -> np.ndarray:
        return indexed.document_bounds(self._index)

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        if self.tokenizer_path is None:
            raise ConfigError(f"{self.prefix}: no tokenizer. Text needs one: shard(prefix, tokenizer=DIR).")
        return load_tokenizer(self.tokenizer_path)

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def __getitem__(self, document: int) -> np.ndarray:
        number = document + len(self) if document < 0 else document
        if not 0 <= number < len(self):
            raise IndexError(f"{self.prefix}: document {document} of {len(self)}")
        return self._tokens[int(self._bounds[number]) : int(self._bounds[number + 1])]

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[number] for number in range(len(self)))

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents."""
        return int(self._bounds[-1])

    def text(self, document: int) -> str:
        """Return a document's text, its end-of-document token as the tokenizer spells it."""
        return self._tokenizer.decode(self[document])

    def origin(self, document: int) -> Origin:
        """Return the file and line that a document came from."""
        number = document + len(self) if document < 0 else document
        return trace_document(self.prefix, number, self._tokenizer if self.tokenizer_path else None)

    def _repr_html_(self) -> str:
        rows = [("documents", f"{len(self):,}"), ("tokens", f"{self.num_tokens:,}")]
        return html_table(("", ""), rows, str(self.prefix))


def dedup(
    corpora: Mapping[str, str | Sequence[str]],
    *,
    output: str | Path,
    key: str = "text",
    scope: Literal["all", "corpus"] = "all",
    keep: Literal["first", "longest"] = "first",
    exact: bool = False,
    threshold: float = 0.85,
    on_bad_line: Literal["fail", "skip"] = "fail",
    workers: int | None = None,
) -> Deduplicated:
    """Write the documents of each corpus without near duplicates below `output`."""
    sources = {name: list_sources([one] if isinstance(one, str) else list(one)) for name, one in corpora.items()}
    report = deduplicate(
        sources,
        Path(output),
        Reading(key=key, skip_bad_lines=on_bad_line == "skip"),
        DedupOptions(minhash=MinHashOptions(threshold=threshold, is_exact_only=exact), scope=scope, keep=keep),
        workers=workers or _cores(),
    )
    return Deduplicated(Path(output), report)


def tokenize(
    documents: str | Path | Sequence[str | Path],
    *,
    tokenizer: str | Path,
    output_prefix: str | Path | None = None,
    output_dir: str | Path | None = None,
    keys: Sequence[str] = ("text",),
    on_bad_line: Literal["fail", "skip", "strict"] = "fail",
    workers: int | None = None,
) -> Tokenized:
    """Turn documents into token shards: one at `output_prefix`, or a tree that mirrors the files below `output_dir`."""
    if (output_prefix is None) == (output_dir is None):
        raise ConfigError("tokenize: exactly one of output_prefix and output_dir is needed.")
    inputs = [documents] if isinstance(documents, str | Path) else list(documents)
    report = driver.tokenize(
        [str(one) for one in inputs],
        Path(tokenizer),
        output_prefix=None if output_prefix is None else Path(output_prefix),
        output_dir=None if output_dir is None else Path(output_dir),
        options=TokenizeOptions(keys=list(keys), on_bad_line=on_bad_line),
        workers=workers or _cores(),
    )
    if output_prefix is not None:
        place = Path(output_prefix)
        found = sorted(place.parent.glob(f"{place.name}_*_document.idx"))
    else:
        found = sorted(Path(str(output_dir)).rglob("*_document.idx"))
    return Tokenized([path.with_suffix("") for path in found], vars(report) if hasattr(report, "__dict__") else {})


def shard(prefix: str | Path, *, tokenizer: str | Path | None = None) -> Shard:
    """Return a token shard by its prefix (without `.bin`); `tokenizer` is needed for its text."""
    place = Path(str(prefix).removesuffix(".bin").removesuffix(".idx"))
    found = Shard(place, None if tokenizer is None else Path(tokenizer))
    len(found)  # what is missing or damaged is said here, not at the first document
    return found


def _cores() -> int:
    return len(os.sched_getaffinity(0))
