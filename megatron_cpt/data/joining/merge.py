"""Merge: several shards become one; indexes are rewritten, bytes are moved by the kernel (`copy_file_range`).

A merge that is killed, or runs out of disk space, keeps the joined shards and resumes when it is run again.
"""

import errno
import logging
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_cpt.data.joining.journal import MergeJournal
from megatron_cpt.data.lists.entry import shard_path
from megatron_cpt.data.shards.checksums import COLUMNS, as_text, from_text, placed, sampled_hash
from megatron_cpt.data.shards.indexed import (
    PART,
    ShardIndex,
    bin_path,
    idx_path,
    manifest_path,
    read_index,
    read_shard_manifest,
    shard_options,
    write_index,
)
from megatron_cpt.data.shards.masked import has_mask, mask_prefix, read_mask
from megatron_cpt.data.tokenize.shard_writer import provenance_path, rejects_path
from megatron_cpt.data.tokenizer.interface import same_tokenizer
from megatron_cpt.errors import DataError
from megatron_cpt.files import sync_dir, whole_file, write_json
from megatron_cpt.log import Progress

logger = logging.getLogger(__name__)

_MAX_COPY_BYTES = 1 << 30


def find_parts(output_prefix: Path) -> list[Path]:
    """Return the prefixes of the parts `<base>-00000-of-00008_<key>_document` of a shard, in order.

    Raises: DataError naming the parts that are missing.
    """
    parts: dict[int, dict[int, Path]] = {}
    for path in output_prefix.parent.glob("*.json"):
        match = PART.fullmatch(path.name.removesuffix(".json"))
        if match and match["base"] + match["rest"] == output_prefix.name:
            prefix = path.with_name(path.name.removesuffix(".json"))
            parts.setdefault(int(match["count"]), {})[int(match["number"])] = prefix
    if len(parts) != 1:
        found = f"parts of {sorted(parts)} members" if parts else "no parts"
        raise DataError(
            f"{output_prefix}: {found} found. Parts come from `tokenize --shard I/N`. Name them with --input."
        )
    ((count, members),) = parts.items()
    if missing := sorted(set(range(count)) - set(members)):
        names = ", ".join(f"{number}/{count}" for number in missing[:10])
        raise DataError(f"{output_prefix}: parts {names} are missing. Run `tokenize --shard` for them first.")
    return [members[number] for number in range(count)]


def merge_shards(prefixes: Sequence[Path], output_prefix: Path, *, replace: bool = False) -> dict[str, Any]:
    """Join shards in the given order under `output_prefix`; return the manifest.

    A killed merge resumes with its current shard; an existing result of the same shards is kept. With `replace`, an
    older result of other documents is overwritten.

    Raises: DataError when a shard is damaged, they differ in tokenizer, token type or options, hold the same source, or
    the output is something else.
    """
    if not prefixes:
        raise DataError(f"{output_prefix}: no shards to merge.")
    if shard_path(os.fspath(output_prefix)) in [shard_path(os.fspath(prefix)) for prefix in prefixes]:
        raise DataError(f"{output_prefix}: is one of the shards to merge. Choose another output.")
    indexes = [read_index(prefix) for prefix in prefixes]
    manifests = [read_shard_manifest(prefix) for prefix in prefixes]
    _check_alike(prefixes, indexes, manifests)
    _check_apart(prefixes, manifests)
    masks = [has_mask(prefix) for prefix in prefixes]
    if all(masks):
        for index in indexes:
            read_mask(index)
    manifest = _joined_manifest(manifests, indexes)
    if manifest_path(output_prefix).exists():
        found = read_shard_manifest(output_prefix)
        if _without_sample(found) == manifest:
            read_index(output_prefix)
            return found
        if not replace:
            raise DataError(
                f"{output_prefix}: exists already, of other shards or documents. Remove it, replace it (--replace) or choose "
                "another output."
            )
        remove_shards([output_prefix])
    progress = Progress("merge", sum(index.num_tokens * index.dtype.itemsize for index in indexes) / 1e6, "MB")
    with MergeJournal(output_prefix, prefixes) as journal:
        if all(masks):
            names = [mask_prefix(prefix) for prefix in prefixes]
            _join(mask_prefix(output_prefix), names, indexes, np.uint8, journal, progress)
        _join(output_prefix, prefixes, indexes, indexes[0].dtype, journal, progress)
        _merge_provenance(prefixes, manifests, output_prefix)
        _merge_rejects(prefixes, manifests[0].get("key"), output_prefix)
        if "checksums" in manifest:
            manifest["checksums"]["sampled"] = sampled_hash(bin_path(output_prefix))
        write_json(manifest_path(output_prefix), manifest)
    return manifest


def remove_shards(prefixes: Sequence[Path]) -> None:
    """Remove shards and their side files, the manifest first: a shard without a manifest is ignored."""
    for prefix in prefixes:
        key = read_shard_manifest(prefix).get("key")
        beside = [rejects_path(_base_path(prefix, key))] if key else []
        masks = [bin_path(mask_prefix(prefix)), idx_path(mask_prefix(prefix))]
        for path in (
            manifest_path(prefix),
            *masks,
            idx_path(prefix),
            bin_path(prefix),
            provenance_path(prefix),
            *beside,
        ):
            path.unlink(missing_ok=True)


def _join(
    output: Path,
    prefixes: Sequence[Path],
    indexes: Sequence[ShardIndex],
    dtype: Any,
    journal: MergeJournal,
    progress: Progress,
) -> None:
    """Write the pair of several pairs that have these indexes (a mask has those of its tokens)."""
    path, partial = bin_path(output), output.with_name(f".{output.name}.bin.merging")
    num_joined = journal.num_joined.get(path.name, 0)
    sizes = [bin_path(prefix).stat().st_size for prefix in prefixes]
    try:
        if num_joined < len(prefixes) or not path.exists():
            descriptor = os.open(partial, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                if os.fstat(descriptor).st_size < sum(sizes[:num_joined]):
                    num_joined = 0
                os.ftruncate(descriptor, os.lseek(descriptor, sum(sizes[:num_joined]), os.SEEK_SET))
                progress.add(sum(sizes[:num_joined]) / 1e6)
                for number, prefix in enumerate(prefixes[num_joined:], num_joined + 1):
                    _append(descriptor, bin_path(prefix), progress)
                    os.fsync(descriptor)
                    journal.num_joined[path.name] = number
                    journal.write()
            finally:
                os.close(descriptor)
            os.replace(partial, path)
            sync_dir(path.parent)
        write_index(
            idx_path(output),
            np.dtype(dtype),
            np.concatenate([index.sequence_lengths for index in indexes]),
            _joined_documents(indexes),
        )
    except OSError as problem:
        raise DataError(
            f"{path}: cannot be written ({problem.strerror}). Make room and give the command again; it resumes."
        ) from None


def _check_apart(prefixes: Sequence[Path], manifests: Sequence[dict[str, Any]]) -> None:
    """Refuse shards that hold the same source: parts of a job array whose members saw different files."""
    owners: dict[tuple[Any, ...], Path] = {}
    for prefix, manifest in zip(prefixes, manifests, strict=True):
        for source in manifest["sources"]:
            key = (source["path"], source.get("size"), source.get("mtime_ns"))
            owner = owners.setdefault(key, prefix)
            if owner is not prefix:
                raise DataError(
                    f"{prefix}: holds {source['path']}, which {owner} holds as well. Files were added between the parts. "
                    "Tokenize all parts again, or name shards of different documents."
                )


def _check_alike(prefixes: Sequence[Path], indexes: Sequence[ShardIndex], manifests: Sequence[dict[str, Any]]) -> None:
    first = manifests[0]
    for prefix, index, manifest in zip(prefixes, indexes, manifests, strict=True):
        if (index.num_documents, index.num_tokens) != (manifest["documents"], manifest["tokens"]):
            raise DataError(f"{prefix}: its manifest does not fit its index. Tokenize the shard again.")
        if not same_tokenizer(manifest["tokenizer"], first["tokenizer"]):
            raise DataError(
                f"{prefix}: was tokenized with another tokenizer than {prefixes[0]}. They must not be mixed."
            )
        if (
            index.dtype != indexes[0].dtype
            or shard_options(manifest) != shard_options(first)
            or manifest.get("key") != first.get("key")
        ):
            raise DataError(f"{prefix}: was tokenized with other options than {prefixes[0]}. They must not be mixed.")
        if has_mask(prefix) != has_mask(prefixes[0]) or _form(manifest) != _form(first):
            raise DataError(
                f"{prefix}: has another form than {prefixes[0]} (a mask, packs of a length, a chat template, held out). "
                "Only shards of one form become one."
            )


def _form(manifest: dict[str, Any]) -> tuple[Any, ...]:
    return (
        manifest.get("packed", {}).get("seq_length"),
        manifest.get("template", {}).get("hash"),
        manifest.get("is_held_out"),
    )


def _append(descriptor: int, path: Path, progress: Progress) -> None:
    with path.open("rb") as source:
        remaining = os.fstat(source.fileno()).st_size
        while remaining:
            try:
                moved = os.copy_file_range(source.fileno(), descriptor, min(remaining, _MAX_COPY_BYTES))
            except OSError as problem:
                if problem.errno not in (errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
                    raise
                with os.fdopen(os.dup(descriptor), "wb") as target:
                    shutil.copyfileobj(source, target, 1 << 22)
                moved = remaining
            if not moved:
                raise DataError(f"{path}: became shorter while it was copied.")
            remaining -= moved
            progress.add(moved / 1e6)


def _joined_documents(indexes: Sequence[ShardIndex]) -> np.ndarray:
    joined = [np.zeros(1, dtype=np.int64)]
    sequences = 0
    for index in indexes:
        joined.append(index.document_indices[1:] + sequences)
        sequences += len(index.sequence_lengths)
    return np.concatenate(joined)


def _merge_provenance(prefixes: Sequence[Path], manifests: Sequence[dict[str, Any]], output_prefix: Path) -> None:
    without = [prefix for prefix in prefixes if not provenance_path(prefix).exists()]
    if without:
        if len(without) < len(prefixes):
            logger.warning("%s: no provenance, as %s has none", output_prefix, without[0])
        return
    rows, sources = [], 0
    for prefix, manifest in zip(prefixes, manifests, strict=True):
        found = np.load(provenance_path(prefix))
        found[found[:, 0] >= 0, 0] += sources  # -1 is filling of a pack
        rows.append(found)
        sources += len(manifest["sources"])
    with whole_file(provenance_path(output_prefix), "wb") as file:
        np.save(file, np.concatenate(rows))


def _merge_rejects(prefixes: Sequence[Path], key: str | None, output_prefix: Path) -> None:
    if key is None:
        return  # adopted shards have none
    files = [rejects_path(_base_path(prefix, key)) for prefix in prefixes]
    files = [path for path in files if path.exists()]
    if files:
        with whole_file(rejects_path(_base_path(output_prefix, key)), "wb") as target:
            for path in files:
                target.write(path.read_bytes())


def _without_sample(manifest: dict[str, Any]) -> dict[str, Any]:
    """Return a manifest without the hash of blocks, which is known when the shard is there."""
    sums = {name: value for name, value in manifest.get("checksums", {}).items() if name != "sampled"}
    return manifest | ({"checksums": sums} if sums else {})


def _joined_manifest(manifests: Sequence[dict[str, Any]], indexes: Sequence[ShardIndex]) -> dict[str, Any]:
    joined = dict(manifests[0])
    if all("columns" in manifest.get("checksums", {}) for manifest in manifests):
        sums, tokens = np.zeros(COLUMNS, f"<u{indexes[0].dtype.itemsize}"), 0
        for manifest, index in zip(manifests, indexes, strict=True):
            sums += placed(from_text(manifest["checksums"]["columns"], index.dtype), tokens)
            tokens += index.num_tokens
        joined["checksums"] = {"columns": as_text(sums)}
    else:
        joined.pop("checksums", None)
    if "sources" in joined and "options" in joined:
        joined["options"] = shard_options(joined)
    if any("control_tokens" in manifest for manifest in manifests):
        spelled = sum((Counter(manifest.get("control_tokens", {})) for manifest in manifests), Counter[str]())
        joined["control_tokens"] = dict(sorted(spelled.items()))
    for name in ("documents", "tokens", "bytes", "lines"):
        if name in joined:
            counts = [manifest[name] for manifest in manifests]
            joined[name] = None if None in counts else sum(counts)  # adopted shards may not know their bytes
    for name in ("rejects", "notes"):
        if name in joined:
            joined[name] = dict(sum((Counter(manifest[name]) for manifest in manifests), Counter()))
    joined["sources"] = [source for manifest in manifests for source in manifest["sources"]]
    if "mask" in joined:
        joined["mask"] = _sums([manifest["mask"] for manifest in manifests])
        if not all("prompt" in manifest["mask"] for manifest in manifests):
            joined["mask"].pop("prompt", None)  # of some the prompts are not marked
    if "statistics" in joined:
        joined["statistics"] = _sums([manifest["statistics"] for manifest in manifests])
        joined["inputs"] = [entry for manifest in manifests for entry in manifest["inputs"]]
        joined |= {"held_out_shards": [], "held_out": {"bounds": {}}}
    if "packed" in joined:
        fields = ("real_tokens", "lost_tokens", "split_documents", "truncated_documents", "dropped_documents")
        totals = {name: sum(manifest["packed"].get(name, 0) for manifest in manifests) for name in fields}
        joined["packed"] = {key: joined["packed"][key] for key in ("seq_length", "method")} | totals
        joined["packed"]["fill"] = totals["real_tokens"] / max(joined["tokens"], 1)
    return joined


def _sums(trees: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return trees of counts, added up leaf by leaf."""
    names = dict.fromkeys(name for tree in trees for name in tree)
    values = {name: [tree[name] for tree in trees if name in tree] for name in names}
    return {name: _sums(found) if isinstance(found[0], dict) else sum(found) for name, found in values.items()}


def _base_path(prefix: Path, key: str) -> Path:
    return prefix.with_name(prefix.name.removesuffix(f"_{key}_document"))
