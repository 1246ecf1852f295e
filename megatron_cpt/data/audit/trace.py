"""Trace: from a document or token of a shard back to file and line.

Of a packed shard the pieces of a pack are told, each with its place in it.

With a provenance sidecar (`tokenize --provenance`) the answer is one read; without it the source is read again up to
the document, since the manifest contains the sources and their document counts.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_cpt.data.audit.shards import layout_of, read_source, source_of
from megatron_cpt.data.shards.form import read_shard_form
from megatron_cpt.data.shards.indexed import (
    ShardIndex,
    document_bounds,
    read_index,
    read_shard_manifest,
    read_tokens,
    shard_options,
)
from megatron_cpt.data.shards.masked import PIECE, has_mask, read_mask
from megatron_cpt.data.tokenize.document_rules import DocumentRules
from megatron_cpt.data.tokenize.shard_writer import provenance_path
from megatron_cpt.data.tokenizer.interface import Tokenizer, check_same_tokenizer, read_special_tokens
from megatron_cpt.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Origin of a document."""

    document: int
    path: str
    line: int
    """Line or table row, counted from 1."""
    num_tokens: int
    ids: np.ndarray
    position: int | None = None
    """Token of its pack at which a piece starts; None where documents are not packed."""

    def __str__(self) -> str:
        if self.position is not None:
            where = f"pack {self.document:,}, token {self.position:,} ({self.num_tokens:,} tokens)"
            return f"{where}: {self.path}:{self.line}"
        return f"document {self.document:,} ({self.num_tokens:,} tokens): {self.path}:{self.line}"


def trace_documents(prefix: Path, document: int, tokenizer: Tokenizer | None = None) -> list[Origin]:
    """Return the origin of a document, counted from 0, or those of the pieces of a pack.

    Raises: DataError as `trace_document`.
    """
    if read_shard_form(prefix).packed_seq_length is None:
        return [trace_document(prefix, document, tokenizer)]
    index = read_index(prefix)
    if not 0 <= document < index.num_documents:
        raise DataError(f"{prefix}: has no pack {document:,}. It has {index.num_documents:,}, counted from 0.")
    start, end = document_bounds(index)[document : document + 2].tolist()
    return _pieces(prefix, index, document, start, end)


def trace_document(prefix: Path, document: int, tokenizer: Tokenizer | None = None) -> Origin:
    """Return the origin of a document, counted from 0.

    Without a sidecar the `tokenizer` is needed where some texts of the source are no documents.

    Raises: DataError when the shard has no such document, another tokenizer made it, or its source is gone and there is no
    sidecar.
    """
    index, manifest = read_index(prefix), read_shard_manifest(prefix)
    if tokenizer is not None:
        check_same_tokenizer(prefix, manifest["tokenizer"], tokenizer.identity)
    if not 0 <= document < index.num_documents:
        raise DataError(f"{prefix}: has no document {document:,}. It has {index.num_documents:,}, counted from 0.")
    bounds = document_bounds(index)
    ids = read_tokens(index)[bounds[document] : bounds[document + 1]]
    sidecar = provenance_path(prefix)
    if not sidecar.exists() and has_mask(prefix):
        raise DataError(
            f"{sidecar}: no such file. The lines of a masked shard stand there alone. Make the shard again."
        )
    if sidecar.exists():
        source_number, line = np.load(sidecar, mmap_mode="r")[document].tolist()
        path = manifest["sources"][source_number]["path"]
    else:
        path, line = _search(prefix, manifest, document, tokenizer)
    return Origin(document=document, path=path, line=line, num_tokens=len(ids), ids=ids)


def trace_token(prefix: Path, token: int, tokenizer: Tokenizer | None = None) -> Origin:
    """Return the origin of the document that holds a token, counted from 0.

    Raises: DataError as `trace_document`.
    """
    index = read_index(prefix)
    if not 0 <= token < index.num_tokens:
        raise DataError(f"{prefix}: has no token {token:,}. It has {index.num_tokens:,}, counted from 0.")
    document = int(np.searchsorted(document_bounds(index), token, side="right")) - 1
    if read_shard_form(prefix).packed_seq_length is None:
        return trace_document(prefix, document, tokenizer)
    position = token - int(document_bounds(index)[document])
    before = [piece for piece in trace_documents(prefix, document) if (piece.position or 0) <= position]
    if position >= (before[-1].position or 0) + before[-1].num_tokens:
        raise DataError(f"{prefix}: token {token:,} is filling. It has no origin.")
    return before[-1]


def _pieces(prefix: Path, index: ShardIndex, pack: int, start: int, end: int) -> list[Origin]:
    """Return the pieces of a pack, without filling; the k-th row of the sidecar is the k-th start of a piece."""
    sidecar = provenance_path(prefix)
    if not sidecar.exists():
        raise DataError(
            f"{sidecar}: no such file. Lines of packed documents stand there alone. "
            "Tokenize with --provenance before you pack."
        )
    mask, tokens = read_mask(index), read_tokens(index)
    starts = start + np.flatnonzero(mask[start:end] & PIECE)
    first = int(np.count_nonzero(mask[:start] & PIECE))
    rows = np.load(sidecar, mmap_mode="r")[first : first + len(starts)].tolist()
    sources = read_shard_manifest(prefix)["sources"]
    return [
        Origin(
            document=pack,
            path=sources[source]["path"],
            line=line,
            num_tokens=stop - begin,
            ids=tokens[begin:stop],
            position=begin - start,
        )
        for (source, line), begin, stop in zip(rows, starts.tolist(), [*starts[1:].tolist(), end], strict=True)
        if source >= 0
    ]


def _search(prefix: Path, manifest: dict, document: int, tokenizer: Tokenizer | None) -> tuple[str, int]:
    before = 0
    if tokenizer is not None:
        how = shard_options(manifest).get("special_tokens")
        read_special_tokens(tokenizer, "token" if how == "token" else "text")
    rules = DocumentRules(manifest, tokenizer)
    for number, entry in enumerate(manifest["sources"]):
        if document >= before + entry["documents"]:
            before += entry["documents"]
            continue
        source = source_of(entry, manifest)
        if source is None:
            raise DataError(
                f"{entry['path']}: is gone or changed, and {prefix} has no provenance sidecar. "
                "The line cannot be told. Tokenize with --provenance to keep it."
            )
        if rules.needs_tokenizer(entry) and rules.tokenizer is None:
            raise DataError(
                f"{entry['path']}: some of its texts are no documents of {prefix}, and {prefix} has no provenance sidecar. "
                "The line cannot be told without the tokenizer. Give --tokenizer."
            )
        for first_line, parsed in read_source(source, number, layout_of(manifest)):
            _, lines = rules.documents(parsed, entry)
            if document < before + len(lines):
                return entry["path"], first_line + lines[document - before] + 1
            before += len(lines)
    raise DataError(f"{prefix}: its manifest counts fewer documents than its index. Run `megatron-cpt data audit`.")
