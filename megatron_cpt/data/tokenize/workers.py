"""Worker processes of `tokenize`: each parses pieces, encodes them, and writes the ids at the offsets given by the
parent.

A task is a few pieces of one shard. The worker answers with the number of tokens of each document and keeps the ids;
the parent, which sees the tasks in the order of the documents, adds up where they go and sends that place back; the
worker writes with `pwrite`. So no ids travel between processes, nothing is merged afterwards, and the order does not
depend on who is faster. Messages to a worker are small, so that no two processes can wait for each other's pipes.
"""

import ctypes
import multiprocessing
import os
import signal
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np

from megatron_cpt.data.reading.records import EMPTY_TEXT, Parsed, Problem
from megatron_cpt.data.reading.streams import Layout, Piece, parse_piece
from megatron_cpt.data.shards.checksums import column_sums
from megatron_cpt.data.tokenizer.control_tokens import ControlTokens
from megatron_cpt.data.tokenizer.encoders import Engine, EngineRefusal, load_checked_engine, load_engine
from megatron_cpt.data.tokenizer.interface import SpecialTokens, Tokenizer, load_tokenizer
from megatron_cpt.data.tokenizer.threads import ONE_THREAD, one_thread
from megatron_cpt.errors import CptError, DataError

_THREAD_END_SECONDS = 1.0
_PR_SET_PDEATHSIG = 1
_LONG_DOCUMENT_TOKENS = 1 << 11
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


class EngineDifference(Exception):
    """An accelerated engine refused, or gave other ids than the reference."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """Settings of every worker."""

    tokenizer_path: Path
    eod_token: str | None
    layout: Layout
    engine: str
    dtype: np.dtype
    special_tokens: str
    """text, token or reject: the treatment of a control token in a text."""
    bos_ids: tuple[int, ...]
    """First tokens of each document."""
    append_eod: bool
    keep_lines: bool

    def reading(self) -> SpecialTokens:
        """Return how the tokenizer reads control tokens; documents that would be rejected do not reach it."""
        return "token" if self.special_tokens == "token" else "text"


@dataclass(frozen=True, kw_only=True)
class PieceResult:
    """Content of a piece; lists have one entry per key."""

    source: int
    num_lines: int
    documents: list[int]
    tokens: list[int]
    text_bytes: list[int]
    empty: list[int]
    """Documents without a token of their own, which are left out: an empty text under this key, or one that encodes to nothing."""
    without_tokens: list[int]
    """Those of them whose text is not empty."""
    control_tokens: list[Counter[str]]
    """How often the texts spell each control token."""
    with_control_tokens: list[int]
    """Documents that spell one."""
    notes: Counter[str]
    first_note: tuple[int, str] | None
    problems: list[Problem]
    lines: list[np.ndarray] | None
    """Line of each document within the piece, where provenance is kept."""


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """Result of a worker for a task."""

    task: int
    pieces: list[PieceResult]
    lengths: list[np.ndarray]
    """Tokens of each document, end-of-document token included; int32 [documents] per key."""
    sums: list[np.ndarray]
    """Column sums of the ids (`data/shards/checksums.py`) per key."""


class WorkerPool:
    """Started worker processes, and the pipes to them.

    Raises (when used as a context and in `receive`): EngineDifference, DataError when a worker reports one or dies.
    """

    def __init__(self, num_workers: int, job: Job, tokenizer: Tokenizer):
        engine, can_fork = _prepare(job, tokenizer)
        context: Any = multiprocessing.get_context("fork" if can_fork else "forkserver")
        if not can_fork:
            context.set_forkserver_preload([__name__])
        pipes = [context.Pipe() for _ in range(num_workers)]
        self.connections: list[Connection] = [ours for ours, _ in pipes]
        self.processes = []
        for _, theirs in pipes:
            others = [end for pair in pipes for end in pair if end is not theirs] if can_fork else []
            arguments = (theirs, others, job, os.getpid() if can_fork else None, engine if can_fork else None)
            process = context.Process(target=_work, args=arguments, daemon=True)
            process.start()
            self.processes.append(process)
        for _, theirs in pipes:
            theirs.close()

    def __enter__(self) -> "WorkerPool":
        return self

    def __exit__(self, *_: object) -> None:
        # Workers are killed, not asked to end: partial files and their locks belong to the parent's ShardWriter.
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
        for connection in self.connections:
            connection.close()

    def send(self, rank: int, message: tuple[Any, ...]) -> None:
        """Send a small message to a worker; a dead one is noticed by `receive`."""
        try:
            self.connections[rank].send(message)
        except (BrokenPipeError, ConnectionResetError):
            raise self._death(rank) from None

    def receive(self, wake: int, timeout_seconds: float = 1.0) -> Iterator[tuple[int, tuple[Any, ...]]]:
        """Yield (rank, message) of all workers that have one; return at once when the descriptor `wake` is readable."""
        ready = wait([*self.connections, wake], timeout_seconds)
        if wake in ready:
            os.read(wake, 4096)
        for rank, connection in enumerate(self.connections):
            if connection in ready:
                try:
                    message = connection.recv()
                except (EOFError, ConnectionResetError):
                    raise self._death(rank) from None
                if message[0] == "refused":
                    raise EngineDifference(message[1])
                if message[0] == "error":
                    raise DataError(message[1])
                if message[0] == "bug":
                    raise RuntimeError(f"a worker failed:\n{message[1]}")
                yield rank, message

    def _death(self, rank: int) -> DataError:
        self.processes[rank].join(5)
        code = self.processes[rank].exitcode
        how = f"was killed by signal {-code}" if code is not None and code < 0 else f"ended with exit code {code}"
        return DataError(
            f"tokenize: worker {rank} {how}. A killed worker usually means that memory ran out. "
            "Run the same command again, with fewer --workers; finished shards are kept."
        )


def _prepare(job: Job, tokenizer: Tokenizer) -> tuple[Engine, bool]:
    """Return a checked engine, and whether workers can be forked from this process with it (only if it has one
    thread)."""
    was_alone = _num_threads() == 1
    with one_thread():
        try:
            engine = load_checked_engine(tokenizer, job.engine)
        except EngineRefusal as refusal:
            raise EngineDifference(str(refusal)) from None
    deadline = time.monotonic() + _THREAD_END_SECONDS
    while was_alone and _num_threads() > 1 and time.monotonic() < deadline:
        time.sleep(0.0005)  # a thread that was joined is still listed for a moment
    return engine, _num_threads() == 1


def _num_threads() -> int:
    return len(os.listdir("/proc/self/task"))


def _work(
    connection: Connection, others: Sequence[Connection], job: Job, parent: int | None, engine: Engine | None
) -> None:
    """Serve tasks until the parent goes away; a forked worker has the parent's engine, which was checked there."""
    # A parent that is killed (out of memory, walltime) cannot end its workers, so the kernel does. The check of the
    # parent's id covers a parent that died before prctl.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent is not None and os.getppid() != parent:
        return
    # Ctrl-C reaches the whole process group; only the parent reports it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A pipe reads end-of-file only when every copy of its other end is closed. A forked worker holds copies of all
    # of them.
    for other in others:
        other.close()
    os.environ.update(ONE_THREAD)
    _keep_freed_memory()
    try:
        if engine is None:
            engine = load_engine(load_tokenizer(job.tokenizer_path, job.eod_token, job.reading()), job.engine)
        connection.send(("ready",))
        _serve(connection, job, engine)
    except EngineRefusal as refusal:
        connection.send(("refused", str(refusal)))
    except CptError as error:
        connection.send(("error", str(error)))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
    except Exception:
        connection.send(("bug", traceback.format_exc()))


def _keep_freed_memory() -> None:
    """Let glibc use the memory of one task again for the next: fresh pages cost a tenth of the time. musl has no such knob."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        libc.mallopt(_M_TRIM_THRESHOLD, 1 << 28)


def _serve(connection: Connection, job: Job, engine: Engine) -> None:
    control = ControlTokens(engine.tokenizer.control_tokens())
    encoded: dict[int, list[np.ndarray]] = {}
    while True:
        kind, task, details = connection.recv()
        if kind == "encode":
            # The ids wait here until the parent knows the lengths of all earlier tasks, and so the offset.
            result, encoded[task] = _encode_task(job, engine, control, task, details)
            connection.send(("encoded", result))
        else:
            for (path, offset), ids in zip(details, encoded.pop(task), strict=True):
                _write_at(path, offset, ids)
            connection.send(("written", task))


@dataclass
class _Encoded:
    """The documents of a task under one key; lists have one entry per piece."""

    ids: np.ndarray
    lengths: np.ndarray
    documents: list[int]
    tokens: list[int]
    text_bytes: list[int]
    empty: list[int]
    without_tokens: list[int]
    control: list[tuple[int, Counter[str]]]
    first_empty: list[int | None]
    lines: list[np.ndarray] | None


def _encode_task(
    job: Job, engine: Engine, control: ControlTokens, task: int, pieces: list[Piece]
) -> tuple[TaskResult, list[np.ndarray]]:
    parsed = [parse_piece(piece, job.layout) for piece in pieces]
    if job.special_tokens == "reject":
        for found in parsed:
            control.reject(found)
    keys = [_encode_key(job, engine, control, task, parsed, key) for key in range(len(job.layout.keys))]
    results = [
        PieceResult(
            source=piece.source,
            num_lines=found.num_lines,
            documents=[encoded.documents[i] for encoded in keys],
            tokens=[encoded.tokens[i] for encoded in keys],
            text_bytes=[encoded.text_bytes[i] for encoded in keys],
            empty=[encoded.empty[i] for encoded in keys],
            without_tokens=[encoded.without_tokens[i] for encoded in keys],
            control_tokens=[encoded.control[i][1] for encoded in keys],
            with_control_tokens=[encoded.control[i][0] for encoded in keys],
            notes=found.notes,
            first_note=_first_note(found, [encoded.first_empty[i] for encoded in keys]),
            problems=found.problems,
            lines=[encoded.lines[i] for encoded in keys if encoded.lines is not None] if job.keep_lines else None,
        )
        for i, (piece, found) in enumerate(zip(pieces, parsed, strict=True))
    ]
    arrays = [encoded.ids for encoded in keys]
    lengths = [encoded.lengths for encoded in keys]
    return TaskResult(task=task, pieces=results, lengths=lengths, sums=[*map(column_sums, arrays)]), arrays


def _encode_key(
    job: Job, engine: Engine, control: ControlTokens, task: int, parsed: Sequence[Parsed], key: int
) -> _Encoded:
    """Encode the texts of one key, and leave out the documents that have no token of their own."""
    texts = [text for piece in parsed for text in piece.texts[key]]
    counts = [len(piece.lines) for piece in parsed]
    spelled = [control.count(piece.texts[key]) for piece in parsed]
    ids, lengths = engine.encode(texts)
    if difference := engine.sample_difference(texts, ids, lengths, task):
        raise EngineRefusal(f"{job.engine} gives other ids: {difference}")
    sizes = np.fromiter(map(_utf8_size, texts), np.int64, len(texts))
    lines = [np.array(piece.lines, dtype=np.int32) for piece in parsed] if job.keep_lines else None
    first_empty: list[int | None] = [None] * len(parsed)
    documents = counts
    empty = without_tokens = [0] * len(parsed)
    if len(lengths) and not lengths.all():
        has_tokens = lengths > 0
        # A document without tokens is left out; the shard's bytes are those of the documents that it holds.
        sizes *= has_tokens
        empty = _sums((~has_tokens).astype(np.int64), counts)
        has_text = np.fromiter(map(bool, texts), bool, len(texts))
        without_tokens = _sums((has_text & ~has_tokens).astype(np.int64), counts)
        of_piece = np.split(has_tokens, np.cumsum(counts)[:-1])
        for number, (piece, kept) in enumerate(zip(parsed, of_piece, strict=True)):
            if not kept.all():
                first_empty[number] = piece.lines[int(np.argmin(kept))]
                if lines is not None:
                    lines[number] = lines[number][kept]
        lengths = lengths[has_tokens]
        documents = [int(np.count_nonzero(kept)) for kept in of_piece]
    texts.clear()
    for piece in parsed:
        piece.texts[key] = []  # a huge document must not lie beside two copies of its ids
    ids, lengths = _assembled(ids, lengths, job, engine.tokenizer.eod_id)
    return _Encoded(
        ids=ids,
        lengths=lengths,
        documents=documents,
        tokens=_sums(lengths, documents),
        text_bytes=_sums(sizes, counts),
        empty=empty,
        without_tokens=without_tokens,
        control=spelled,
        first_empty=first_empty,
        lines=lines,
    )


def _first_note(parsed: Parsed, first_empty: Sequence[int | None]) -> tuple[int, str] | None:
    found = [(line, EMPTY_TEXT) for line in first_empty if line is not None]
    return min([*found, *([parsed.first_note] if parsed.first_note else [])], default=None)


def _assembled(ids: np.ndarray, lengths: np.ndarray, job: Job, eod_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the ids in their type on disk, each document between its BOS and end-of-document ids, and int32 lengths."""
    before, after = len(job.bos_ids), int(job.append_eod)
    if not before + after:
        return ids.astype(job.dtype), lengths.astype(np.int32)
    lengths = lengths + (before + after)
    whole = np.empty(len(ids) + (before + after) * len(lengths), dtype=job.dtype)
    ends = np.cumsum(lengths)
    if len(ids) > _LONG_DOCUMENT_TOKENS * len(lengths):  # few and long: no mask of their size
        start = taken = 0
        for end in ends.tolist():
            whole[start : start + before] = job.bos_ids
            size = end - after - before - start
            whole[start + before : end - after] = ids[taken : taken + size]
            if after:
                whole[end - 1] = eod_id
            start, taken = end, taken + size
        return whole, lengths.astype(np.int32)
    is_text = np.ones(len(whole), dtype=bool)
    for place, bos in enumerate(job.bos_ids):
        is_text[ends - lengths + place] = False
        whole[ends - lengths + place] = bos
    if after:
        is_text[ends - 1] = False
        whole[ends - 1] = eod_id
    whole[is_text] = ids
    return whole, lengths.astype(np.int32)


def _sums(values: np.ndarray, counts: Sequence[int]) -> list[int]:
    ends = np.cumsum([0, *counts])
    totals = np.concatenate([[0], np.cumsum(values, dtype=np.int64)])
    return np.diff(totals[ends]).tolist()


def _utf8_size(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


def _write_at(path: str, offset: int, ids: np.ndarray) -> None:
    descriptor = os.open(path, os.O_WRONLY)
    try:
        view = memoryview(ids).cast("B") if len(ids) else memoryview(b"")
        while view:
            # Linux writes at most 0x7ffff000 bytes (2 GiB) in one call.
            written = os.pwrite(descriptor, view, offset)
            view, offset = view[written:], offset + written
    except OSError as problem:
        raise DataError(f"{path}: cannot be written ({problem.strerror}). Make room or choose another place.") from None
    finally:
        os.close(descriptor)
