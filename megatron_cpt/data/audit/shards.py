"""Audit: prove that token files hold exactly their sources' documents, from the files alone.

For each shard: the index fits the `.bin` file and the manifest, its offsets fit its lengths; every id is one of the tokenizer's;
lines add up (documents, rejects, blank lines and empty texts); every document ends with the end-of-document token; the
sources, read again, hold the documents, bytes, rejects and tokens the manifest counts, and the lines of the provenance
sidecar; sampled documents (or all), encoded again by the reference tokenizer, give the ids on disk, and the ids decode to the
text; documents whose ids repeat are counted. A damaged shard is reported like any other, and the next one is looked at. Of an
adopted shard only the files can be checked.

Of a masked shard (instruction data, packs) the files themselves are checked: the mask fits the tokens and the manifest, every
document starts a piece, and ends with the end-of-document token or is a pack of the stated length, filled as it should be.
Sampled conversations are rendered and encoded again (`data/audit/conversations.py`); packs of a tokenized corpus are compared with
nothing, so audit the shard that they were made of.
"""

import contextlib
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

from megatron_cpt.data.audit.conversations import check_conversations
from megatron_cpt.data.reading.documents import Source, list_sources
from megatron_cpt.data.reading.records import BLANK_LINE, CONTROL_TOKEN, EMPTY_TEXT, Parsed
from megatron_cpt.data.reading.streams import Layout, parse_piece, pieces_of
from megatron_cpt.data.shards.checksums import as_text, file_sums
from megatron_cpt.data.shards.indexed import (
    ShardIndex,
    bin_path,
    document_bounds,
    idx_path,
    read_index,
    read_shard_manifest,
    read_tokens,
    shard_options,
)
from megatron_cpt.data.shards.masked import LEARNED, PIECE, PROMPT, has_mask, is_mask, mask_prefix, read_mask
from megatron_cpt.data.tokenize.document_rules import DocumentRules
from megatron_cpt.data.tokenize.shard_writer import provenance_path
from megatron_cpt.data.tokenizer.encoders import EncodeFlat, load_engine
from megatron_cpt.data.tokenizer.interface import Tokenizer, check_same_tokenizer, read_special_tokens
from megatron_cpt.errors import DataError
from megatron_cpt.log import Progress

_CHUNK_TOKENS = 1 << 24
_DECODED_CHARACTERS = 1 << 20


@dataclass
class Audit:
    """Result of the audit of one shard."""

    prefix: Path
    documents: int = 0
    tokens: int = 0
    duplicates: int = 0
    """Documents whose ids equal those of an earlier document of the shard."""
    samples: int = 0
    decoded: int = 0
    """Samples whose ids decode to exactly the text (all, unless the tokenizer normalizes)."""
    too_long_to_decode: int = 0
    """Samples of over a million characters, which are encoded again but not decoded: that takes a hundred times their size."""
    inner_eod: int = 0
    """Documents with the end-of-document token before their end, from texts that spell it."""
    control_tokens: int = 0
    """Documents that spell a control token."""
    masked: str = ""
    """Result for a masked shard, whose texts are not encoded again."""
    is_adopted: bool = False
    """Whether its sources are unknown, since another program made it."""
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
        if self.is_adopted and not self.problems:
            verdict = "adopted, its sources are not known; the files fit"
        not_decoded = f", {self.too_long_to_decode:,} too long to decode" if self.too_long_to_decode else ""
        line = (
            f"{self.prefix}: {verdict}; {self.documents:,} documents, {self.tokens:,} tokens, "
            f"{self.samples:,} samples encode to the same ids ({self.decoded:,} decode to the same text{not_decoded}), "
            f"{self.duplicates:,} duplicate documents, {self.inner_eod:,} with an inner end-of-document token"
        )
        if self.control_tokens:
            line += f", {self.control_tokens:,} spell control tokens"
        return "\n".join([line, *(f"  {problem}" for problem in self.problems)]) + "\n"


def audit_shard(prefix: Path, tokenizer: Tokenizer, num_samples: int | None = 200, seed: int = 0) -> Audit:
    """Return what is wrong with a shard, if anything; the sources are read again.

    `num_samples` documents are encoded again; None: all.

    Raises: DataError when the shard is damaged beyond reading, or was made by another tokenizer.
    """
    index, manifest = read_index(prefix), read_shard_manifest(prefix)
    found = Audit(prefix, index.num_documents, index.num_tokens)
    check_same_tokenizer(prefix, manifest["tokenizer"], tokenizer.identity)
    bounds, tokens = document_bounds(index), read_tokens(index)
    _check_checksums(index, manifest, tokens, found)
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
                index, manifest, tokens, mask, sources, tokenizer.path, _number_of(num_samples, index), seed
            )
            found.problems += problems
        return found
    options = shard_options(manifest)
    bos_ids = options.get("bos_ids", [])
    _check_ids(tokens, tokenizer, found)
    _check_starts(bounds, tokens, bos_ids, found)
    if options.get("append_eod"):
        _check_ends(bounds, tokens, tokenizer.eod_id, len(bos_ids), found)
    found.duplicates = _duplicates(bounds, tokens)
    if manifest["options"].get("adopted"):
        found.is_adopted = True
        return found
    _check_counts(index, manifest, found)
    read_special_tokens(tokenizer, "token" if options["special_tokens"] == "token" else "text")
    rules = DocumentRules(manifest, tokenizer)
    chosen = set(random.Random(seed).sample(range(index.num_documents), _number_of(num_samples, index)))
    encode = load_engine(tokenizer, "reference").encode
    sidecar = provenance_path(prefix)
    rows = np.load(sidecar, mmap_mode="r") if sidecar.exists() else None
    if manifest["options"].get("provenance") and (rows is None or rows.shape != (index.num_documents, 2)):
        found.problems.append(f"{sidecar}: does not hold a line for each of the {index.num_documents:,} documents")
        rows = None
    number = 0
    for source_number, entry in enumerate(manifest["sources"]):
        first, last = min(number, index.num_documents), min(number + entry["documents"], index.num_documents)
        in_shard = int(bounds[last] - bounds[first])
        if in_shard != entry["tokens"]:
            found.problems.append(f"{entry['path']}: has {in_shard:,} tokens; the manifest counts {entry['tokens']:,}")
        source = source_of(entry, manifest)
        if source is None:
            found.problems.append(f"{entry['path']}: is gone or changed since; its documents cannot be compared")
            number += entry["documents"]
            continue
        documents = text_bytes = rejects = 0
        is_traced = True
        control = without_tokens = 0
        for before, parsed in read_source(source, source_number, layout_of(manifest)):
            texts, lines = rules.documents(parsed, entry)
            text_bytes += sum(len(text) if text.isascii() else len(text.encode()) for text in texts)
            rejects += len(parsed.problems)
            control += rules.control.count(texts)[0]
            without_tokens += rules.num_left_out
            numbers = [first + documents + i for i in range(len(texts)) if first + documents + i in chosen]
            for sample in numbers:
                ids = tokens[bounds[sample] : bounds[sample + 1]]
                text = texts[sample - first - documents]
                _check_sample(sample, text, ids[len(bos_ids) :], tokenizer, encode, manifest, found)
            if rows is not None and is_traced:
                expected = before + 1 + np.array(lines, dtype=np.int64)
                mine = rows[first + documents : first + documents + len(texts)]
                is_traced = len(mine) == len(expected) and bool(
                    (mine == np.stack([np.full_like(expected, source_number), expected], 1)).all()
                )
            documents += len(texts)
        if not is_traced:
            found.problems.append(f"{sidecar}: tells other lines of {entry['path']} than hold its documents")
        stated = {"documents": entry["documents"], "bytes": entry["bytes"], "rejects": sum(entry["rejects"].values())}
        counts = [("documents", documents), ("bytes", text_bytes), ("rejects", rejects)]
        found.control_tokens += control
        if rules.are_stated:
            stated |= {"texts without tokens": entry["without_tokens"]}
            stated |= {"texts with control tokens": entry["notes"].get(CONTROL_TOKEN, 0)}
            counts += [("texts without tokens", without_tokens), ("texts with control tokens", control)]
        for name, count in counts:
            if count != stated[name]:
                found.problems.append(f"{entry['path']}: holds {count:,} {name}; the manifest counts {stated[name]:,}")
        number += entry["documents"]
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


def audit_all(prefixes: list[Path], tokenizer: Tokenizer, num_samples: int | None) -> list[Audit]:
    """Audit several shards, with progress; one that is damaged beyond reading does not keep the others from it."""
    progress = Progress("audit", len(prefixes), "shards")
    audits = []
    for prefix in prefixes:
        try:
            audits.append(audit_shard(prefix, tokenizer, num_samples))
        except DataError as problem:
            audits.append(Audit(prefix, problems=[str(problem)]))
        progress.add(1)
    return audits


def _number_of(num_samples: int | None, index: ShardIndex) -> int:
    return index.num_documents if num_samples is None else min(num_samples, index.num_documents)


def _check_checksums(index: ShardIndex, manifest: dict[str, Any], tokens: np.ndarray, found: Audit) -> None:
    """Compare all tokens with the sums that were taken when they were written; an earlier release took none."""
    stated = manifest.get("checksums", {}).get("columns")
    if stated is not None and as_text(file_sums(tokens)) != stated:
        found.problems.append(f"{bin_path(index.prefix)}: holds other tokens than were written (its checksum differs)")
    of_mask = manifest.get("checksums", {}).get("mask")
    if of_mask is not None and has_mask(index.prefix):
        with contextlib.suppress(DataError):  # a mask that does not fit is told of elsewhere
            if as_text(file_sums(read_mask(index))) != of_mask:
                path = bin_path(mask_prefix(index.prefix))
                found.problems.append(f"{path}: holds another mask than was written (its checksum differs)")


def _check_starts(bounds: np.ndarray, tokens: np.ndarray, bos_ids: list[int], found: Audit) -> None:
    starts = bounds[:-1][np.diff(bounds) > 0]
    for place, bos in enumerate(bos_ids):
        at = starts + place
        without = int(np.count_nonzero(tokens[at[at < len(tokens)]] != bos)) + int(np.count_nonzero(at >= len(tokens)))
        if without:
            found.problems.append(f"{without:,} documents do not begin with token {bos}")
            return


def _check_ids(tokens: np.ndarray, tokenizer: Tokenizer, found: Audit) -> None:
    for start in range(0, len(tokens), _CHUNK_TOKENS):
        chunk = tokens[start : start + _CHUNK_TOKENS]
        wrong = np.flatnonzero((chunk < 0) | (chunk >= tokenizer.vocab_size))
        if len(wrong):
            place = start + int(wrong[0])
            found.problems.append(
                f"token {place:,} is {int(tokens[place])}; the tokenizer has {tokenizer.vocab_size:,} tokens"
            )
            return


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
    if "prompt" in stated:
        counts["prompt"] = int(np.count_nonzero(mask & PROMPT))
    for name, count in counts.items():
        if stated.get(name) != count:
            found.problems.append(f"{name}: {count:,} in the files, {stated.get(name)} in the manifest")
    starts = bounds[:-1][np.diff(bounds) > 0]
    if without := int(np.count_nonzero(~(mask[starts] & PIECE).astype(bool))):
        found.problems.append(f"{without:,} documents do not start a piece; they would see those before them")
    eod_id, packed = manifest["tokenizer"]["eod_id"], manifest.get("packed")
    if packed is None:
        _check_ends(bounds, tokens, eod_id, 0, found)
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


def _check_ends(bounds: np.ndarray, tokens: np.ndarray, eod_id: int, num_bos: int, found: Audit) -> None:
    """Look for documents without an end, and for ends within one; a document without tokens has neither."""
    is_eod = np.flatnonzero(tokens == eod_id)
    starts, ends = bounds[:-1][np.diff(bounds) > 0], bounds[1:][np.diff(bounds) > 0] - 1
    without = np.setdiff1d(ends, is_eod, assume_unique=True)
    if len(without):
        document = int(np.searchsorted(bounds, without[0], side="right")) - 1
        found.problems.append(f"{len(without):,} documents do not end with token {eod_id}; the first is {document:,}")
    begins = [starts + place for place in range(num_bos)]  # BOS is the same token in some families
    inner = np.setdiff1d(is_eod, np.concatenate([ends, *begins]))
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
    number: int,
    text: str,
    ids: np.ndarray,
    tokenizer: Tokenizer,
    encode: EncodeFlat,
    manifest: dict[str, Any],
    found: Audit,
) -> None:
    if manifest["options"]["append_eod"]:
        ids, end = ids[:-1], ids[-1:]
        is_same = len(end) == 1 and int(end[0]) == tokenizer.eod_id
    else:
        is_same = True
    expected, _ = encode([text])
    if not is_same or not np.array_equal(expected, ids):
        found.problems.append(f"document {number:,} is not what its source gives: {text[:60]!r}")
        return
    found.samples += 1
    if len(text) <= _DECODED_CHARACTERS and tokenizer.decode(ids) == text:
        found.decoded += 1
    elif len(text) > _DECODED_CHARACTERS:
        found.too_long_to_decode += 1
