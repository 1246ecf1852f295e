"""Instruction data: conversations in, masked shards out (`data/shards/masked.py`); restartable, deterministic, in bounded memory.

Training goes to `<prefix>_chat_document`, validation sets to `<prefix>_held_out_<value>_chat_document`. If
conversations are selected (`data/chat/selection.py`), the inputs are read twice; about 40 bytes per conversation are
kept in between. Shards are written atomically, the training shard last: its existence means that all are complete. The
output does not depend on `workers`.
"""

import datetime
import logging
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_cpt.data.chat.encode import (
    EMPTY_ANSWER,
    LOST_REASONING,
    ON_LONG,
    REWRITTEN,
    TRAIN_ON,
    ChatEncoder,
    ChatJob,
    Survey,
)
from megatron_cpt.data.chat.pool import ChatPool
from megatron_cpt.data.chat.selection import bounds_record, read_bounds, select
from megatron_cpt.data.chat.tokens import TRAIN_ON_EOS
from megatron_cpt.data.chat.writing import ChatWriting, chat_pieces, chat_rejects_path, listed, shard_prefix
from megatron_cpt.data.joining.packing import PackOptions, pack_shard
from megatron_cpt.data.reading.documents import Source
from megatron_cpt.data.reading.turns import ON_EMPTY_ANSWER
from megatron_cpt.data.shards.indexed import manifest_path, read_index, read_shard_manifest
from megatron_cpt.data.shards.masked import read_mask
from megatron_cpt.data.tokenizer.interface import same_tokenizer
from megatron_cpt.errors import ConfigError, DataError
from megatron_cpt.files import file_hash, write_json
from megatron_cpt.log import Progress

logger = logging.getLogger(__name__)

_OLDER_OPTIONS = {"on_empty_answer": "reject", "ignored_keys": [], "unroll": False}
"""Values of older shards, from before these options existed."""
_KEPT_ALL_THE_SAME = {
    REWRITTEN: "conversations have earlier answers that the template writes otherwise than it asks the model for them "
    "(reasoning left out, for instance), and those are learned. --train-on last learns only the last answer, --unroll "
    "each answer as it was asked for",
    LOST_REASONING: "conversations have reasoning in their last answer that the template does not write",
    EMPTY_ANSWER: "answers are empty",
}
"""Notes about conversations that are in the shard."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Which conversations are taken."""

    dedup_prompts: bool = False
    number: int | None = None
    """Conversations drawn at random for training; None: all."""
    held_out: int = 0
    """Conversations of each validation set."""
    bounds_path: Path | None = None
    """File of an earlier run with the bounds of the validation sets."""

    @property
    def is_all(self) -> bool:
        """Whether everything goes to training, so that one pass is enough."""
        return not self.dedup_prompts and self.number is None and not self.held_out


def prepare_chat(
    sources: Sequence[Source],
    output_prefix: Path,
    job: ChatJob,
    choice: Choice,
    *,
    pack: PackOptions | None = None,
    on_bad: str = "fail",
    workers: int = 1,
) -> dict[Path, dict[str, Any]]:
    """Write the shards of conversations, packed if `pack` is given; return each manifest by prefix, training first.

    Shards that are whole already, of the same inputs, tokenizer, template and options, are kept. `pack.max_packs` counts
    for training only.

    Raises: DataError for bad conversations under the policy, and when the shards there were made otherwise.
    """
    _check_options(job, choice, on_bad)
    prefix = shard_prefix(output_prefix)
    job = replace(job, date=job.date or _stated_date(prefix))
    if pack is not None and job.max_length is None:
        job = replace(job, max_length=pack.seq_length)
    pool = ChatPool(job, workers)
    with pool as encoder:
        identity = _identity(sources, encoder, job, choice, on_bad)
        identity["options"]["pack"] = None if pack is None else vars(pack)
        if kept := _finished(prefix, identity):
            _write_bounds(output_prefix, kept[prefix])
            return kept
        bounds_path = choice.bounds_path or _bounds_path(output_prefix)
        known = read_bounds(bounds_path, choice.held_out, job.held_out_by) if choice.held_out else {}
        work = output_prefix if pack is None else _unpacked_dir(output_prefix) / output_prefix.name
        made = None if pack is None else _unpacked(work, identity)
        if made is None:
            selection = None
            if not choice.is_all:
                selection = select(
                    _surveys(pool, sources, job),
                    dedup=choice.dedup_prompts,
                    held_out=choice.held_out,
                    held_out_by=job.held_out_by,
                    known_bounds=known,
                    number=choice.number,
                )
            bounds = bounds_record(selection.bounds if selection else {}, choice.held_out, job.held_out_by)
            stated = identity | {"held_out": bounds}
            made = ChatWriting(sources, work, encoder, stated, selection, on_bad).run(pool)
    if pack is not None:
        made = _packed(made, output_prefix, pack)
    _write_bounds(output_prefix, made[prefix])
    return made


def _write_bounds(output_prefix: Path, manifest: dict[str, Any]) -> None:
    """Write the bounds of the validation sets next to a complete shard: a failed run writes none."""
    if manifest["held_out"]["bounds"] and not _bounds_path(output_prefix).exists():
        write_json(_bounds_path(output_prefix), manifest["held_out"])


def _unpacked(work: Path, identity: dict[str, Any]) -> dict[Path, dict[str, Any]] | None:
    """Return the unpacked shard that an interrupted run of the same command left; the shard of another command is
    rewritten."""
    try:
        return _finished(shard_prefix(work), identity)
    except DataError:
        shutil.rmtree(work.parent)
        return None


def _packed(unpacked: dict[Path, dict[str, Any]], output_prefix: Path, pack: PackOptions) -> dict[Path, dict[str, Any]]:
    """Pack the shards into the output's folder, training last, and remove the unpacked ones."""
    made = {}
    training = shard_prefix(output_prefix)
    for prefix in reversed(unpacked):
        target = output_prefix.with_name(prefix.name)
        options = pack if target == training else replace(pack, max_packs=None)
        made[target], _ = pack_shard(prefix, target, options)
    folder = _unpacked_dir(output_prefix)
    rejects = chat_rejects_path(folder / output_prefix.name)
    if rejects.exists():
        rejects.replace(chat_rejects_path(output_prefix))
    shutil.rmtree(folder)
    return dict(reversed(made.items()))


def _stated_date(prefix: Path) -> datetime.date | None:
    """Return the date that an earlier run's template used, so that the same command on another day is the same."""
    if not manifest_path(prefix).exists():
        return None
    stated = read_shard_manifest(prefix).get("template", {}).get("date")
    return datetime.date.fromisoformat(stated) if stated else None


def _unpacked_dir(output_prefix: Path) -> Path:
    return output_prefix.with_name(f".{output_prefix.name}.unpacked")


def _bounds_path(output_prefix: Path) -> Path:
    return output_prefix.with_name(output_prefix.name + ".held_out.json")


def _check_options(job: ChatJob, choice: Choice, on_bad: str) -> None:
    for name, value, allowed in (
        ("on_bad", on_bad, ("fail", "skip")),
        ("on_long", job.on_long, ON_LONG),
        ("train_on", job.train_on, TRAIN_ON),
        ("on_empty_answer", job.layout.on_empty_answer, ON_EMPTY_ANSWER),
        ("train_on_eos", job.train_on_eos, TRAIN_ON_EOS),
    ):
        if value not in allowed:
            raise ConfigError(f"prepare-chat: {name} is {value!r}. Choose one of {', '.join(allowed)}.")
    if job.unroll and job.train_on != "assistant":
        raise ConfigError(
            f"prepare-chat: --unroll learns each answer in a document of its own, --train-on {job.train_on} other tokens. "
            "Give one of them."
        )
    if job.held_out_by and not choice.held_out:
        raise ConfigError("prepare-chat: a field to hold out by is given, but no number. Give --held-out N as well.")
    if choice.bounds_path and not choice.bounds_path.exists():
        raise DataError(
            f"{choice.bounds_path}: no such file. The bounds of an earlier run's validation sets are needed."
        )


def _identity(
    sources: Sequence[Source], encoder: ChatEncoder, job: ChatJob, choice: Choice, on_bad: str
) -> dict[str, Any]:
    """Return what a shard is made of: the same again means the same shard."""
    template, turn_end = encoder.template, encoder.turn_end()
    bounds = choice.bounds_path
    return {
        "tokenizer": encoder.tokenizer.identity,
        "template": {
            "name": template.name,
            "hash": template.hash,
            "turn_end": turn_end,
            "text": template.source,
            "variables": template.variables,
            "date": str(template.date) if template.uses_date else None,
        },
        "options": {
            "keys": list(job.layout.message_keys),
            "text_key": job.layout.text_key,
            "append_eod": True,
            "max_document_bytes": job.layout.max_document_bytes,
            "on_empty_answer": job.layout.on_empty_answer,
            "ignored_keys": list(job.layout.ignored_keys),
            "train_on": job.train_on,
            "unroll": job.unroll,
            "train_on_eos": job.train_on_eos,
            "max_length": job.max_length,
            "on_long": job.on_long,
            "where": list(job.where),
            "drop": list(job.drop),
            "dedup_prompts": choice.dedup_prompts,
            "number": choice.number,
            "seed": job.seed,
            "held_out": choice.held_out,
            "held_out_by": job.held_out_by,
            "held_out_bounds": file_hash(bounds) if bounds else None,
            "on_bad": on_bad,
        },
        "inputs": [source.identity() for source in sources],
    }


def _finished(prefix: Path, identity: dict[str, Any]) -> dict[Path, dict[str, Any]] | None:
    """Return the manifests of shards that are whole; None where there are none.

    Raises: DataError when they were made of something else.
    """
    if not manifest_path(prefix).exists():
        return None
    manifest = read_shard_manifest(prefix)
    check_same(prefix, manifest, identity)
    found = {prefix: manifest}
    for name in manifest["held_out_shards"]:
        found[prefix.with_name(name)] = read_shard_manifest(prefix.with_name(name))
    for each, its in found.items():
        index = read_index(each)
        read_mask(index)
        if (index.num_tokens, index.num_documents) != (its["tokens"], its["documents"]):
            return None
    logger.info("%s: is whole already, of the same inputs, tokenizer, template and options; kept", prefix)
    return found


def check_same(prefix: Path, manifest: dict[str, Any], identity: dict[str, Any]) -> None:
    """Check that a shard was made of just this. Raises: DataError naming what differs."""
    advice = "Remove the old shards or choose another output."
    if not same_tokenizer(manifest["tokenizer"], identity["tokenizer"]):
        raise DataError(f"{prefix}: was made with another tokenizer ({manifest['tokenizer'].get('name')}). {advice}")
    if manifest.get("template", {}).get("hash") != identity["template"]["hash"]:
        raise DataError(f"{prefix}: was made with another chat template, or other variables of it. {advice}")
    if manifest["template"]["date"] != identity["template"]["date"]:
        raise DataError(f"{prefix}: was made with the date {manifest['template']['date']} in its template. {advice}")
    for name, value in identity["options"].items():
        found = manifest["options"].get(name, _OLDER_OPTIONS.get(name))
        if found != value:
            raise DataError(f"{prefix}: was made with {name}={found!r}, not {value!r}. {advice}")
    made_of = [(Path(entry["path"]).name, entry["size"], entry["mtime_ns"]) for entry in manifest["inputs"]]
    if made_of != [(Path(entry["path"]).name, entry["size"], entry["mtime_ns"]) for entry in identity["inputs"]]:
        raise DataError(f"{prefix}: was made of other inputs, or they changed since. {advice}")


def _surveys(pool: ChatPool, sources: Sequence[Source], job: ChatJob) -> list[Survey]:
    progress = Progress("prepare-chat: looking", sum(source.size for source in sources) / 1e6, "MB")
    surveys = []
    tasks = ((piece,) for number, source in enumerate(sources) for piece in chat_pieces(source, number, job))
    for piece, survey in pool.results("survey", tasks):
        surveys.append(survey)
        progress.add(piece.disk_bytes / 1e6)
    return surveys


def report_text(manifests: dict[Path, dict[str, Any]]) -> str:
    """Return what `data prepare-chat` prints about the shards."""
    lines = []
    for prefix, manifest in manifests.items():
        found, learned = manifest["statistics"], manifest["mask"]["learned"]
        turns = ", ".join(f"{count:,} {role}" for role, count in found["turns"].items() if count)
        lines.append(
            f"{prefix}: {found['conversations']:,} conversations ({turns or 'no'} turns), {found['texts']:,} texts, "
            f"{manifest['tokens']:,} tokens, {learned / max(manifest['tokens'], 1):.1%} learned"
        )
        lines.append(f"  tokens per document: {listed(found['length_histogram'])}")
        if packed := manifest.get("packed"):
            lines.append(
                f"  {manifest['documents']:,} packs of {packed['seq_length']:,} tokens, filled to {packed['fill']:.2%}"
            )
    first = next(iter(manifests.values()))
    found, notes = first["statistics"], Counter(first["notes"])
    kept = {name: notes.pop(name, 0) for name in _KEPT_ALL_THE_SAME}
    left_out = Counter(first["rejects"]) + notes
    left_out.update({"duplicate prompt": found["duplicate_prompts"], "not drawn": found["not_drawn"]})
    truncated = sum(manifest["statistics"]["truncated"] for manifest in manifests.values())
    lines.append(f"{first['lines']:,} lines; cut at a turn: {truncated:,}; left out: {listed(+left_out) or 'none'}")
    lines += _unread_lines([manifest["statistics"] for manifest in manifests.values()])
    lines += [f"warning: {count:,} {_KEPT_ALL_THE_SAME[name]}" for name, count in kept.items() if count]
    return "\n".join(lines) + "\n"


def _unread_lines(statistics: Sequence[dict[str, Any]]) -> list[str]:
    """Return lines about the fields passed to the template, and the unread ones."""
    given: Counter[str] = Counter()
    unread: dict[str, Counter[str]] = {"record": Counter(), "turn": Counter()}
    marks: Counter[str] = Counter()
    for found in statistics:
        given.update(found.get("given_to_the_template", {}))
        marks.update(found.get("marks", {}))
        for kind, counts in found.get("not_read", {}).items():
            unread[kind].update(counts)
    lines = [f"turns marked in their records: {listed(marks)}"] if marks else []
    if given:
        lines.append(f"fields of records given to the template: {listed(given)}")
    lines += [f"not read, of {kind}s: {listed(counts)}" for kind, counts in unread.items() if counts]
    return lines
