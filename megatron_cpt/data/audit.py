"""Audit: prove that token files hold exactly their sources' documents, from the files alone.

For each shard: the index fits the `.bin` file and the manifest; lines add up (documents, rejects, blank lines and empty
texts); every document ends with the end-of-document token; the sources, read again, hold the documents and bytes the
manifest counts; sampled documents, encoded again by the reference tokenizer, give the ids on disk, and the ids decode to
the text; documents whose ids repeat are counted.

Of a masked shard (instruction data, packs) the files themselves are checked: the mask fits the tokens and the manifest, every
document starts a piece, and ends with the end-of-document token or is a pack of the stated length, filled as it should be.
Sampled conversations are rendered and encoded again (`data/chat_audit.py`); packs of a tokenized corpus are compared with
nothing, so audit the shard that they were made of.
"""

import glob
import hashlib
import itertools
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_cpt.data.chat_audit import check_conversations
from megatron_cpt.data.documents import Source, list_sources
from megatron_cpt.data.indexed import (
    ShardIndex,
    document_bounds,
    idx_path,
    read_index,
    read_shard_manifest,
    read_tokens,
)
from megatron_cpt.data.masked import LEARNED, PIECE, has_mask, is_mask, read_mask
from megatron_cpt.data.records import BLANK_LINE, EMPTY_TEXT, Parsed
from megatron_cpt.data.streams import Layout, parse_piece, pieces_of
from megatron_cpt.data.tokenizer import Tokenizer, same_tokenizer
from megatron_cpt.errors import DataError
from megatron_cpt.log import Progress


@dataclass
class Audit:
    """What an audit of one shard found."""

    prefix: Path
    documents: int = 0
    tokens: int = 0
    duplicates: int = 0
    """Documents whose ids equal those of an earlier document of the shard."""
    samples: int = 0
    decoded: int = 0
    """Samples whose ids decode to exactly the text (all, unless the tokenizer normalizes)."""
    inner_eod: int = 0
    """Documents with the end-of-document token before their end, from texts that spell it."""
    masked: str = ""
    """What was found in a masked shard, whose texts are not encoded again."""
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        if self.masked:
            verdict = "its mask fits" if not self.problems else f"{len(self.problems)} problems"
            line = f"{self.prefix}: {verdict}; {self.documents:,} documents, {self.tokens:,} tokens, {self.masked}"
            line += (
                f", {self.samples:,} samples encode to the same ids and masks"
                if self.samples
                else ", no texts compared"
            )
            return "\n".join([line, *(f"  {problem}" for problem in self.problems)]) + "\n"
        verdict = "holds its sources" if not self.problems else f"{len(self.problems)} problems"
        line = (
            f"{self.prefix}: {verdict}; {self.documents:,} documents, {self.tokens:,} tokens, "
            f"{self.samples:,} samples encode to the same ids ({self.decoded:,} decode to the same text), "
            f"{self.duplicates:,} duplicate documents, {self.inner_eod:,} with an inner end-of-document token"
        )
        return "\n".join([line, *(f"  {problem}" for problem in self.problems)]) + "\n"


def audit_shard(prefix: Path, tokenizer: Tokenizer, num_samples: int = 200, seed: int = 0) -> Audit:
    """Return what is wrong with a shard, if anything; the sources are read again."""
    index, manifest = read_index(prefix), read_shard_manifest(prefix)
    found = Audit(prefix, index.num_documents, index.num_tokens)
    if not same_tokenizer(manifest["tokenizer"], tokenizer.identity):
        raise DataError(
            f"{prefix}: was tokenized with {manifest['tokenizer']['name']} (hash {manifest['tokenizer']['hash'][:8]}), "
            f"not with {tokenizer.identity['name']} ({tokenizer.identity['hash'][:8]}). Give the tokenizer that made it."
        )
    bounds, tokens = document_bounds(index), read_tokens(index)
    if "mask" in manifest or has_mask(prefix):
        mask = _check_mask(index, manifest, bounds, tokens, found)
        if mask is not None and "text" in manifest.get("template", {}) and not found.problems:
            sources = [source_of(entry, manifest) for entry in manifest["inputs"]]
            found.problems += [
                f"{entry['path']}: is gone or changed since; its conversations cannot be compared"
                for entry, source in zip(manifest["inputs"], sources, strict=True)
                if source is None
            ]
            found.samples, problems = check_conversations(
                index, manifest, tokens, mask, sources, tokenizer.path, num_samples, seed
            )
            found.problems += problems
        return found
    _check_counts(index, manifest, found)
    if manifest["options"]["append_eod"]:
        _check_ends(bounds, tokens, tokenizer.eod_id, found)
    found.duplicates = _duplicates(bounds, tokens)
    chosen = set(random.Random(seed).sample(range(index.num_documents), min(num_samples, index.num_documents)))
    number = 0
    for source_number, entry in enumerate(manifest["sources"]):
        source = source_of(entry, manifest)
        if source is None:
            found.problems.append(f"{entry['path']}: is gone or changed since; its documents cannot be compared")
            number += entry["documents"]
            continue
        documents = text_bytes = 0
        for _, parsed in read_source(source, source_number, layout_of(manifest)):
            texts = parsed.texts[manifest["options"]["keys"].index(manifest["key"])]
            for text in texts:
                text_bytes += len(text) if text.isascii() else len(text.encode())
                if number in chosen:
                    _check_sample(number, text, tokens[bounds[number] : bounds[number + 1]], tokenizer, manifest, found)
                number += 1
            documents += len(texts)
        for name, count in (("documents", documents), ("bytes", text_bytes)):
            if count != entry[name]:
                found.problems.append(f"{entry['path']}: holds {count:,} {name}; the manifest counts {entry[name]:,}")
    return found


def shard_prefixes(inputs: Sequence[str | Path]) -> list[Path]:
    """Return the prefixes that prefixes, folders and globs name, each input's sorted; several keep their order.

    Raises: DataError when one names no shard.
    """
    found: dict[Path, None] = {}
    for item in inputs:
        path = Path(item)
        if path.is_dir():
            files = sorted(path.rglob("*.idx"))
        elif idx_path(path).is_file():
            files = [idx_path(path)]
        else:
            files = sorted(file for file in map(Path, glob.glob(str(item), recursive=True)) if file.suffix == ".idx")
            files = files or [Path(name) for name in sorted(glob.glob(f"{item}.idx", recursive=True))]
        if not files:
            raise DataError(f"{item}: names no shard. Name prefixes of .bin and .idx files, folders or globs of them.")
        found.update((file.with_name(file.name.removesuffix(".idx")), None) for file in files)
    return [prefix for prefix in found if not is_mask(prefix)]


def source_of(entry: dict[str, Any], manifest: dict[str, Any]) -> Source | None:
    """Return the source of a manifest's entry, or None when it is gone or changed."""
    try:
        source = list_sources([entry["path"]], format=entry.get("format"))[0]
    except DataError:
        return None
    is_same = (source.size, source.mtime_ns) == (entry["size"], entry["mtime_ns"])
    return source if is_same else None


def layout_of(manifest: dict[str, Any]) -> Layout:
    """Return how the documents of a shard lay in their files."""
    options = manifest["options"]
    return Layout(
        keys=tuple(options["keys"]),
        txt_documents=options["txt_documents"],
        max_document_bytes=options["max_document_bytes"],
    )


def read_source(source: Source, number: int, layout: Layout) -> Iterator[tuple[int, Parsed]]:
    """Yield (line before the piece, what it holds) of a source in order."""
    before = 0
    for piece in pieces_of(source, number, layout):
        parsed = parse_piece(piece, layout)
        if piece.descriptor is not None:
            os.close(piece.descriptor)
        yield before, parsed
        before += parsed.num_lines


def audit_all(prefixes: list[Path], tokenizer: Tokenizer, num_samples: int) -> list[Audit]:
    """Audit several shards, with progress."""
    progress = Progress("audit", len(prefixes), "shards")
    audits = []
    for prefix in prefixes:
        audits.append(audit_shard(prefix, tokenizer, num_samples))
        progress.add(1)
    return audits


def _check_counts(index: ShardIndex, manifest: dict[str, Any], found: Audit) -> None:
    for name, count in (("documents", index.num_documents), ("tokens", index.num_tokens)):
        in_sources = sum(source[name] for source in manifest["sources"])
        if not count == manifest[name] == in_sources:
            found.problems.append(
                f"{name}: {count:,} in the index, {manifest[name]:,} in the manifest, {in_sources:,} over its sources"
            )
    for source in manifest["sources"]:
        notes = source["notes"]
        accounted = source["documents"] + sum(source["rejects"].values()) + notes.get(BLANK_LINE, 0)
        accounted += notes.get(EMPTY_TEXT, 0)
        if accounted != source["lines"]:
            found.problems.append(
                f"{source['path']}: {source['lines']:,} lines, of which {accounted:,} are accounted for"
            )


def _check_mask(
    index: ShardIndex, manifest: dict[str, Any], bounds: np.ndarray, tokens: np.ndarray, found: Audit
) -> np.ndarray | None:
    try:
        mask = read_mask(index)
    except DataError as problem:
        found.masked = "a mask that does not fit"
        found.problems.append(str(problem))
        return None
    learned, pieces = int(np.count_nonzero(mask & LEARNED)), int(np.count_nonzero(mask & PIECE))
    found.masked = f"{learned:,} learned, {pieces:,} pieces"
    counts = {"documents": index.num_documents, "tokens": index.num_tokens}
    stated = {name: manifest[name] for name in counts} | manifest.get("mask", {})
    counts |= {"learned": learned, "pieces": pieces}
    for name, count in counts.items():
        if stated.get(name) != count:
            found.problems.append(f"{name}: {count:,} in the files, {stated.get(name)} in the manifest")
    starts = bounds[:-1][np.diff(bounds) > 0]
    if without := int(np.count_nonzero(~(mask[starts] & PIECE).astype(bool))):
        found.problems.append(f"{without:,} documents do not start a piece; they would see those before them")
    eod_id, packed = manifest["tokenizer"]["eod_id"], manifest.get("packed")
    if packed is None:
        _check_ends(bounds, tokens, eod_id, found)
        return mask
    if wrong := int(np.count_nonzero(np.diff(bounds) != packed["seq_length"])):
        found.problems.append(f"{wrong:,} packs do not hold {packed['seq_length']:,} tokens")
    real = index.num_tokens - _filling(bounds, tokens, mask, eod_id)
    if real != packed["real_tokens"]:
        found.problems.append(f"packs hold {real:,} tokens besides filling, {packed['real_tokens']:,} in the manifest")
    return mask


def _filling(bounds: np.ndarray, tokens: np.ndarray, mask: np.ndarray, eod_id: int) -> int:
    """Return the number of tokens that fill packs: from a piece's start to the pack's end, none learned, all eod."""
    starts = np.flatnonzero((mask & (PIECE | LEARNED)) == PIECE)
    starts = starts[tokens[starts] == eod_id]
    ends = bounds[np.searchsorted(bounds, starts, side="right")]
    return sum(
        int(end - start)
        for start, end in zip(starts.tolist(), ends.tolist(), strict=True)
        if np.all(tokens[start:end] == eod_id) and not mask[start + 1 : end].any()
    )


def _check_ends(bounds: np.ndarray, tokens: np.ndarray, eod_id: int, found: Audit) -> None:
    is_eod = np.flatnonzero(tokens == eod_id)
    ends = bounds[1:] - 1
    without = np.setdiff1d(ends, is_eod, assume_unique=True)
    if len(without):
        document = int(np.searchsorted(ends, without[0]))
        found.problems.append(f"{len(without):,} documents do not end with token {eod_id}; the first is {document:,}")
    inner = np.setdiff1d(is_eod, ends, assume_unique=True)
    found.inner_eod = len(np.unique(np.searchsorted(ends, inner)))


def _duplicates(bounds: np.ndarray, tokens: np.ndarray) -> int:
    hashes = np.fromiter(
        (
            int.from_bytes(hashlib.blake2b(tokens[start:end].tobytes(), digest_size=8).digest(), "little")
            for start, end in itertools.pairwise(bounds.tolist())
        ),
        dtype=np.uint64,
        count=len(bounds) - 1,
    )
    return len(hashes) - len(np.unique(hashes))


def _check_sample(
    number: int, text: str, ids: np.ndarray, tokenizer: Tokenizer, manifest: dict[str, Any], found: Audit
) -> None:
    expected = tokenizer.encode_batch([text])[0]
    if manifest["options"]["append_eod"]:
        expected = [*expected, tokenizer.eod_id]
    found.samples += 1
    if expected != ids.tolist():
        found.samples -= 1
        found.problems.append(f"document {number:,} is not what its source gives: {text[:60]!r}")
    elif tokenizer.decode(ids[:-1] if manifest["options"]["append_eod"] else ids) == text:
        found.decoded += 1
