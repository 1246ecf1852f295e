"""Tokenizing: documents in, `.bin/.idx` shards with manifests out; restartable, deterministic, in bounded memory.

The parent cuts the sources into pieces (`data/reading/streams.py`), worker processes parse, encode and write them
(`data/tokenize/workers.py`), and shards appear under their final names when whole (`data/tokenize/shard_writer.py`). Several shards are
open at once where their sources are streams, since one compressed file is decompressed by one thread.
"""

import logging
import os
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_cpt.data.reading.documents import Source, list_sources
from megatron_cpt.data.reading.records import CONTROL_TOKEN
from megatron_cpt.data.reading.streams import PIECE_BYTES, Piece
from megatron_cpt.data.shards.indexed import older_options, read_shard_manifest, token_dtype
from megatron_cpt.data.tokenize.feed import TaskFeed, close_pieces
from megatron_cpt.data.tokenize.options import TokenizeOptions
from megatron_cpt.data.tokenize.shard_plan import ShardPlan, plan_one, plan_tree, tokens_per_byte
from megatron_cpt.data.tokenize.shard_writer import (
    ShardWriter,
    check_neighbours,
    is_finished,
    is_of_an_older_release,
    list_leftovers,
    rejects_path,
)
from megatron_cpt.data.tokenize.workers import EngineDifference, Job, TaskResult, WorkerPool
from megatron_cpt.data.tokenizer.encoders import ENGINES
from megatron_cpt.data.tokenizer.interface import Tokenizer, bos_id, check_reading, load_tokenizer, read_special_tokens
from megatron_cpt.errors import ConfigError, DataError
from megatron_cpt.log import Progress, format_count

logger = logging.getLogger(__name__)

_MAX_SENT = 2
"""Tasks that wait in a worker's pipe, so that it never waits for the parent."""
_MAX_HELD = 4
"""Encoded tasks that a worker keeps until their place is known."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """Result of a run: the manifest of each shard by prefix, in the order of the plan."""

    manifests: dict[Path, dict[str, Any]]
    num_reused: int
    """Shards that were whole already."""
    engine: str | None
    """Engine that encoded; None if nothing was left to do."""
    reject_files: list[Path]

    def __str__(self) -> str:
        lines = []
        for prefix, manifest in self.manifests.items():
            lines.append(
                f"{prefix}: {manifest['documents']:,} documents, {manifest['tokens']:,} tokens, {manifest['bytes']:,} bytes"
            )
        values = list(self.manifests.values())
        rejects = sum(sum(manifest["rejects"].values()) for manifest in values)
        lines.append(
            f"{len(values)} shards ({self.num_reused} were complete already): "
            f"{format_count(sum(m['documents'] for m in values))} documents, "
            f"{format_count(sum(m['tokens'] for m in values))} tokens; rejected lines: {rejects:,}"
        )
        control: Counter[str] = Counter()
        for manifest in values:
            control.update(manifest.get("control_tokens", {}))
        if control:
            named = ", ".join(f"{name} {count:,}" for name, count in control.most_common(5))
            lines.append(f"control tokens in the texts: {named}{', ...' if len(control) > 5 else ''}")
        lines += [f"rejects are in {path}" for path in self.reject_files]
        return "\n".join(lines) + "\n"


def tokenize(
    inputs: Sequence[str | Path],
    tokenizer_path: Path,
    *,
    output_prefix: Path | None = None,
    output_dir: Path | None = None,
    options: TokenizeOptions | None = None,
    workers: int = 1,
    part: tuple[int, int] | None = None,
) -> Report:
    """Tokenize `inputs` into one shard per key (`output_prefix`) or a tree of shards (`output_dir`).

    Shards that are whole already, of the same inputs, tokenizer and options, are kept. `part` is (i, n): the i-th of n members of
    a job array, counted from 0. The output does not depend on `workers` and on the engine.

    Raises: DataError on bad lines under the policy, on damaged inputs, on shards of another tokenizer or other options.
    """
    options = options or TokenizeOptions()
    if (output_prefix is None) == (output_dir is None):
        raise ConfigError("tokenize: give either an output prefix (one shard) or an output folder (a tree of shards).")
    if output_dir is None and (options.num_shards or options.is_across_folders):
        raise ConfigError("tokenize: an output prefix is one shard. Give --output-dir for several.")
    if part is not None and not 0 <= part[0] < part[1]:
        raise ConfigError(f"tokenize: part is {part[0]}/{part[1]}. Parts count from 0 to n - 1.")
    keys = options.keys
    sources = list_sources(
        inputs, options.include, options.exclude, options.format, keep_bad_files=options.on_bad_line == "skip"
    )
    tokenizer = load_tokenizer(tokenizer_path, options.eod_token)
    recorded = options.recorded()
    if output_prefix is not None:
        plans = plan_one(output_prefix, sources, part)
        is_older = any(is_of_an_older_release(plan.prefix(key)) for plan in plans for key in keys)
    else:
        assert output_dir is not None
        is_older = check_neighbours(output_dir, tokenizer.identity)
    recorded |= _reading_options(tokenizer, options.special_tokens, options.bos, is_older=is_older)
    read_special_tokens(tokenizer, "token" if recorded["special_tokens"] == "token" else "text")
    if output_dir is not None:
        plans = _planned_tree(output_dir, sources, tokenizer, options, part)
    if output_prefix is not None and part is not None:
        whole = plan_one(output_prefix, sources, None)
        if all(is_finished(plan, keys, tokenizer.identity, recorded) for plan in whole):
            logger.info("%s: kept, the parts of these documents are joined already", output_prefix)
            plans = whole  # what `data merge` joined; its parts are not made again
    pending = [plan for plan in plans if not is_finished(plan, keys, tokenizer.identity, recorded)]
    job = Job(
        tokenizer_path=tokenizer_path,
        eod_token=options.eod_token,
        layout=options.layout,
        engine=options.engine,
        dtype=token_dtype(tokenizer.vocab_size),
        special_tokens=recorded["special_tokens"],
        bos_ids=tuple(recorded["bos_ids"]),
        append_eod=options.append_eod,
        keep_lines=options.provenance,
    )
    used = _run(pending, job, tokenizer, recorded, max(workers, 1)) if pending else None
    manifests = {plan.prefix(key): read_shard_manifest(plan.prefix(key)) for plan in plans for key in keys}
    reject_files = [rejects_path(plan.base) for plan in plans if rejects_path(plan.base).exists()]
    return Report(
        manifests=manifests, num_reused=(len(plans) - len(pending)) * len(keys), engine=used, reject_files=reject_files
    )


def _planned_tree(
    output_dir: Path,
    sources: Sequence[Source],
    tokenizer: Tokenizer,
    options: TokenizeOptions,
    part: tuple[int, int] | None,
) -> list[ShardPlan]:
    target = None
    if options.shard_tokens:
        target = options.shard_tokens / tokens_per_byte(sources, tokenizer, options.layout)
    return plan_tree(
        output_dir,
        sources,
        target,
        part,
        num_shards=options.num_shards,
        is_across_folders=options.is_across_folders,
    )


def _reading_options(tokenizer: Tokenizer, special_tokens: str | None, bos: str, *, is_older: bool) -> dict[str, Any]:
    """Return the manifest's fields about control tokens and BOS.

    Raises: DataError when the tokenizer's folder is read otherwise by transformers, or has no BOS where one is asked for.
    """
    prefix = check_reading(tokenizer)
    older = older_options(tokenizer.identity)
    if is_older and (special_tokens is None or bos == "auto"):
        logger.warning(
            "tokenize: the output holds shards of an earlier release and continues as they are: control tokens in a text are %ss, without "
            "BOS. Choose another output, or state --special-tokens and --bos",
            older["special_tokens"],
        )
    if bos == "auto":
        bos_ids = older["bos_ids"] if is_older else prefix
    else:
        bos_ids = (prefix or [bos_id(tokenizer)]) if bos == "on" else []
    default = older["special_tokens"] if is_older else "text"
    return {"special_tokens": special_tokens or default, "bos_ids": list(bos_ids)}


def _run(plans: Sequence[ShardPlan], job: Job, tokenizer: Tokenizer, options: dict[str, Any], workers: int) -> str:
    """Make the shards with the first engine that holds; return its name."""
    total = sum(source.size for plan in plans for source in plan.sources)
    piece_bytes = min(max(total // (8 * workers), 1 << 16), PIECE_BYTES)
    remaining = deque(plans)
    for name in ENGINES if job.engine == "auto" else (job.engine,):
        run = _Run(remaining, Job(**{**vars(job), "engine": name}), tokenizer, options, piece_bytes)
        try:
            run.work(workers)
        except EngineDifference as difference:
            if job.engine != "auto":
                raise DataError(f"tokenize: {difference}. Choose --engine auto or reference.") from None
            logger.warning("tokenize: %s; falling back to the next engine", difference)
            remaining = run.unfinished()
        else:
            return name
    raise DataError("tokenize: no engine could encode the documents. This is unexpected. Use --engine reference.")


@dataclass
class _OpenShard:
    """A shard in work: its tasks come from `tasks`, their results wait in `results` for those before them."""

    plan: ShardPlan
    writer: ShardWriter
    tasks: "TaskFeed"
    order: deque[int] = field(default_factory=deque)
    """Tasks sent and not yet committed, in order."""
    results: dict[int, TaskResult] = field(default_factory=dict)
    num_unwritten: int = 0


class _Run:
    """Moves tasks to workers and results to shards until every shard is whole."""

    def __init__(
        self, plans: Sequence[ShardPlan], job: Job, tokenizer: Tokenizer, options: dict[str, Any], piece_bytes: int
    ):
        self.waiting, self.job, self.tokenizer, self.options = deque(plans), job, tokenizer, options
        self.piece_bytes = piece_bytes
        self.leftovers = list_leftovers(plans, job.layout.keys)
        self.open: list[_OpenShard] = []
        self.next_task = 0
        self.shard_of: dict[int, _OpenShard] = {}
        self.pieces_of_task: dict[int, list[Piece]] = {}
        self.worker_of: dict[int, int] = {}
        self.documents = self.tokens = 0

    def unfinished(self) -> deque[ShardPlan]:
        """Return the plans whose shards are not whole."""
        return deque([*(shard.plan for shard in self.open), *self.waiting])

    def work(self, num_workers: int) -> None:
        """Make all shards.

        Raises: EngineDifference, DataError; partial files are removed then.
        """
        total = sum(source.size for plan in self.waiting for source in plan.sources)
        self.progress = Progress("tokenize", total / 1e6, "MB")
        wake_read, wake_write = os.pipe()
        os.set_blocking(wake_write, False)
        failed = True
        try:
            with WorkerPool(num_workers, self.job, self.tokenizer) as pool:
                self.sent, self.held = [0] * num_workers, [0] * num_workers
                while self.waiting or self.open:
                    self._feed(pool, wake_write, num_workers)
                    self._finish_shards()
                    if not self.open:
                        continue
                    for rank, message in pool.receive(wake_read):
                        self._take(pool, rank, message)
                failed = False
        finally:
            for shard in self.open:
                shard.tasks.close()
                if failed:
                    shard.writer.abandon()
            for pieces in self.pieces_of_task.values():
                close_pieces(pieces)
            os.close(wake_read)
            os.close(wake_write)

    def _feed(self, pool: WorkerPool, wake: int, num_workers: int) -> None:
        while True:
            free = [r for r in range(num_workers) if self.sent[r] < _MAX_SENT and self.held[r] < _MAX_HELD]
            if not free:
                return
            rank = min(free, key=lambda r: self.sent[r])
            shard, pieces = self._next_task(wake, num_workers)
            if shard is None:
                return
            task, self.next_task = self.next_task, self.next_task + 1
            shard.order.append(task)
            self.shard_of[task], self.pieces_of_task[task], self.worker_of[task] = shard, pieces, rank
            self.sent[rank] += 1
            pool.send(rank, ("encode", task, pieces))

    def _next_task(self, wake: int, num_workers: int) -> tuple[_OpenShard | None, list[Piece]]:
        """Return the next task of the earliest shard that has one ready; open another shard where none has."""
        for shard in self.open:
            if pieces := shard.tasks.take():
                return shard, pieces
        while self.waiting and len(self.open) < num_workers:
            plan = self.waiting.popleft()
            try:
                writer = ShardWriter(
                    plan,
                    self.job.layout.keys,
                    self.job.dtype,
                    self.tokenizer.identity,
                    self.options,
                    self.leftovers.get(plan.base, ()),
                )
            except BaseException:
                self.waiting.appendleft(plan)
                raise
            shard = _OpenShard(plan, writer, TaskFeed(plan, self.job.layout, self.piece_bytes, wake))
            self.open.append(shard)
            if pieces := shard.tasks.take():
                return shard, pieces
        return None, []

    def _take(self, pool: WorkerPool, rank: int, message: tuple[Any, ...]) -> None:
        if message[0] == "encoded":
            result: TaskResult = message[1]
            self.sent[rank] -= 1
            self.held[rank] += 1
            shard = self.shard_of[result.task]
            shard.results[result.task] = result
            while shard.order and shard.order[0] in shard.results:
                self._commit(pool, shard, shard.results.pop(shard.order.popleft()))
        elif message[0] == "written":
            self.held[rank] -= 1
            self.shard_of.pop(message[1]).num_unwritten -= 1

    def _commit(self, pool: WorkerPool, shard: _OpenShard, result: TaskResult) -> None:
        places = shard.writer.commit(result)
        pieces = self.pieces_of_task.pop(result.task)
        close_pieces(pieces)
        shard.num_unwritten += 1
        pool.send(self.worker_of.pop(result.task), ("write", result.task, places))
        self.documents += len(result.lengths[0])
        self.tokens += sum(int(lengths.sum(dtype=np.int64)) for lengths in result.lengths)
        seconds = max(time.monotonic() - self.progress.started, 1e-9)
        self.progress.add(
            sum(piece.disk_bytes for piece in pieces) / 1e6,
            f"{format_count(self.documents / seconds)} documents/s, {format_count(self.tokens / seconds)} tokens/s",
        )

    def _finish_shards(self) -> None:
        for shard in list(self.open):
            if shard.tasks.is_exhausted and not shard.order and not shard.num_unwritten:
                for manifest in shard.writer.finish():
                    _warn_of_control_tokens(shard.plan, manifest)
                self.open.remove(shard)


def _warn_of_control_tokens(plan: ShardPlan, manifest: dict[str, Any]) -> None:
    documents = manifest["notes"].get(CONTROL_TOKEN, 0)
    if not documents:
        return
    names = ", ".join(sorted(manifest["control_tokens"], key=manifest["control_tokens"].__getitem__)[-3:])
    how = {
        "text": "are read as text (--special-tokens token or reject reads or refuses them)",
        "token": "are read as the tokens, which end documents and cut attention (--special-tokens text does not)",
    }[manifest["options"]["special_tokens"]]
    logger.warning("%s: %s documents spell control tokens (%s); they %s", plan.base, f"{documents:,}", names, how)
