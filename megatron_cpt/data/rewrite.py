"""Document files checked and rewritten: validate, repair, extract, merge small files.

All four read sources as lines and judge each line with the rules of `data/records.py`; validate only counts, the others
write plain lines (optionally compressed) with a newline after every document. Repair also splits two objects that share
a line, and drops byte-order marks, blank lines and what cannot be mended (kept in a reject file). Records with a list
of `conversations` in place of the text pass through. Tables become JSON lines. Sources are worked on in parallel; an
output whose sources are unchanged is kept.
"""

import contextlib
import gzip
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import IO, Any

import orjson

from megatron_cpt.data import records
from megatron_cpt.data.documents import Source, plain_name
from megatron_cpt.data.records import Problem
from megatron_cpt.data.shard_writer import bad_line
from megatron_cpt.data.streams import MAX_DOCUMENT_BYTES, PIECE_BYTES, stream_blocks
from megatron_cpt.errors import ConfigError, DataError
from megatron_cpt.files import read_json, whole_file, write_json
from megatron_cpt.log import Progress

COMPRESSIONS = ("none", "gz", "zst")
_BOM = b"\xef\xbb\xbf"


@dataclass
class Findings:
    """What the lines of a file are."""

    path: str
    lines: int = 0
    documents: int = 0
    notes: Counter[str] = field(default_factory=Counter)
    problems: Counter[str] = field(default_factory=Counter)
    examples: list[dict[str, Any]] = field(default_factory=list)
    """The first problems, as entries of a reject file."""

    def __str__(self) -> str:
        odd = [f"{count:,} {kind}" for kind, count in (self.problems + self.notes).items()]
        summary = f"{self.path}: {self.documents:,} documents in {self.lines:,} lines" + "".join(
            f"; {part}" for part in odd
        )
        shown = [
            f"  line {entry['line']}: {entry['reason']} ({entry.get('detail', '')})" for entry in self.examples[:5]
        ]
        return "\n".join([summary, *shown])


@dataclass(frozen=True, kw_only=True)
class Rewriting:
    """One output file and the sources it is made of; no output: only look."""

    sources: tuple[Source, ...]
    output: Path | None
    keys: tuple[str, ...]
    """Text keys that a record must have; empty: lines are copied without a look into them."""
    on_bad_line: str = "skip"
    compression: str = "none"
    max_document_bytes: int = MAX_DOCUMENT_BYTES


def plan_tree_of_files(
    sources: Sequence[Source], output_dir: Path, target_bytes: int | None, **settings: Any
) -> list[Rewriting]:
    """Return one rewriting per source, mirroring the tree, or per group of about `target_bytes` of a folder and format.

    Raises: DataError when two sources would have the same output.
    """
    compression = settings.get("compression", "none")
    if compression not in COMPRESSIONS:
        raise ConfigError(f"compression is {compression!r}. Choose one of {', '.join(COMPRESSIONS)}.")
    suffix = "" if compression == "none" else f".{compression}"
    groups: dict[tuple[Path, str], list[list[Source]]] = {}
    for source in sources:
        format = "txt" if source.format == "txt" else "jsonl"
        members = groups.setdefault((output_dir / source.relative.parent, format), [])
        filled = sum(member.size for member in members[-1]) if members else 0
        if target_bytes is None or not members or filled + source.size / 2 >= target_bytes:
            members.append([])
        members[-1].append(source)
    rewritings: dict[Path, Rewriting] = {}
    for (folder, format), members in groups.items():
        for number, group in enumerate(members):
            name = plain_name(group[0].relative.name)
            if target_bytes is not None:
                name = f"{group[0].relative.parent.name or 'documents'}-{number:05d}"
            output = folder / f"{name}.{format}{suffix}"
            if output in rewritings:
                other = rewritings[output].sources[0].path
                raise DataError(f"{group[0].path} and {other}: would both become {output}. Exclude one of them.")
            if any(output.absolute() == source.path.absolute() for source in group):
                raise DataError(f"{output}: is its own source. Choose another --output-dir.")
            rewritings[output] = Rewriting(sources=tuple(group), output=output, **settings)
    return list(rewritings.values())


def rewrite_all(rewritings: Sequence[Rewriting], workers: int, label: str) -> list[Findings]:
    """Do the rewritings in parallel and return what was found in each source, in order.

    Raises: DataError at the first bad line where the policy is to fail, and when a worker dies.
    """
    progress = Progress(label, sum(source.size for work in rewritings for source in work.sources) / 1e6, "MB")
    results: dict[int, list[Findings]] = {}
    with ProcessPoolExecutor(max(1, min(workers, len(rewritings))), mp_context=get_context("forkserver")) as pool:
        numbers = {pool.submit(rewrite, work): number for number, work in enumerate(rewritings)}
        try:
            for future in as_completed(numbers):
                results[numbers[future]] = future.result()
                progress.add(sum(source.size for source in rewritings[numbers[future]].sources) / 1e6)
        except BrokenProcessPool:
            raise DataError(
                f"{label}: a worker process was killed, usually because memory ran out. "
                "Run the same command again with fewer --workers; finished files are kept."
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)
    return [findings for number in sorted(results) for findings in results[number]]


def rewrite(work: Rewriting) -> list[Findings]:
    """Do one rewriting and return what was found in each of its sources; a finished one is read from its record."""
    if work.output is None:
        return [findings for findings, _ in (_look(source, work, lambda _: None) for source in work.sources)]
    record_path = work.output.with_name(f".{work.output.name}.sources.json")
    identity = {
        "sources": [source.identity() for source in work.sources],
        "keys": list(work.keys),
        "on_bad_line": work.on_bad_line,
    }
    if work.output.exists() and record_path.exists():
        record = read_json(record_path, DataError)
        if record["identity"] == identity and record["size"] == work.output.stat().st_size:
            return [Findings(**(found | _counters(found))) for found in record["findings"]]
    rejects: list[dict[str, Any]] = []
    findings = []
    with whole_file(work.output, "wb") as file, _compressed(file, work.compression) as target:
        for source in work.sources:
            found, rejected = _look(source, work, target.write)
            findings.append(found)
            rejects += rejected
    reject_path = work.output.with_name(work.output.name + ".rejects")
    if rejects:
        with whole_file(reject_path) as file:
            file.writelines(json.dumps(entry, ensure_ascii=False) + "\n" for entry in rejects)
    else:
        reject_path.unlink(missing_ok=True)
    record = {"identity": identity, "size": work.output.stat().st_size, "findings": [vars(found) for found in findings]}
    write_json(record_path, record)
    return findings


def _counters(found: dict[str, Any]) -> dict[str, Any]:
    return {"notes": Counter(found["notes"]), "problems": Counter(found["problems"])}


def _look(source: Source, work: Rewriting, write: Callable[[bytes], Any]) -> tuple[Findings, list[dict[str, Any]]]:
    """Pass the good lines of a source to `write`; return what was found, and the rejects if lines are written."""
    found = Findings(str(source.path))
    rejects: list[dict[str, Any]] = []
    is_start = True
    for data, is_end, damage in _blocks(source, work.max_document_bytes):
        if is_start and data.startswith(_BOM):
            found.notes[records.BYTE_ORDER_MARK] += 1
            data = data[len(_BOM) :]
        is_start = False
        lines = data.split(b"\n")
        if not lines[-1]:
            lines.pop()
        elif is_end and damage is None:
            found.notes[records.NO_FINAL_NEWLINE] += 1
        good: list[bytes] = []
        for line in lines:
            problem = _judge(line.removesuffix(b"\r"), source, work, found, good)
            if problem:
                _reject(source, problem, found, rejects, work)
            found.lines += 1
        if damage:
            _reject(source, damage, found, rejects, work)
            found.lines += 1
        found.documents += len(good)
        if good:
            write(b"\n".join(good) + b"\n")
    found.examples = rejects[:5]
    return found, rejects if work.output else []


def _judge(line: bytes, source: Source, work: Rewriting, found: Findings, good: list[bytes]) -> Problem | None:
    """Add the documents of a line to `good`, or return why there are none."""
    if not line.strip():
        found.notes[records.BLANK_LINE] += 1
        return None
    if len(line) > work.max_document_bytes:
        return Problem(0, records.TOO_LONG, f"{len(line):,} bytes")
    if source.format == "txt":
        try:
            line.decode()
        except UnicodeDecodeError as problem:
            return Problem(0, records.INVALID_UTF8, f"byte {problem.start}", line)
        good.append(line)
        return None
    if not work.keys:
        good.append(line)
        return None
    try:
        record = records.object_of_line(line)
    except (ValueError, RecursionError):
        kind, detail = records.line_problem(line)
        parts = _objects_of_line(line) if kind == records.TWO_OBJECTS else None
        if parts is None or any(_record_problem(part, work.keys) for part in parts):
            return Problem(0, kind, detail, line)
        found.notes[kind] += 1
        good += [json.dumps(part, ensure_ascii=False).encode() for part in parts]
        return None if work.output else Problem(0, kind, detail, line)
    if found_wrong := _record_problem(record, work.keys):
        return Problem(0, *found_wrong, line)
    good.append(line)
    return None


def _objects_of_line(line: bytes) -> list[Any] | None:
    """Return the JSON objects that share a line, separated by nothing, spaces or commas."""
    text, found = line.decode().strip(), []
    decoder = json.JSONDecoder()
    while text:
        try:
            value, end = decoder.raw_decode(text)
        except ValueError:
            return None
        found.append(value)
        text = text[end:].lstrip(" \t\r,")
    return found


def _record_problem(record: Any, keys: Sequence[str]) -> tuple[str, str] | None:
    if not isinstance(record, dict):
        return records.NOT_AN_OBJECT, f"a {type(record).__name__}"
    if isinstance(record.get("conversations"), list) and not any(
        key in record for key in keys if key != "conversations"
    ):
        turns = record["conversations"]
        for number, turn in enumerate(turns):
            if not isinstance(turn, dict) or (
                not {"role", "content"} <= turn.keys() and not {"from", "value"} <= turn.keys()
            ):
                return records.NOT_TEXT, f"turn {number} of 'conversations' has no role and content"
        return None if turns else (records.EMPTY_TEXT, "'conversations' has no turns")
    for key in keys:
        if key not in record:
            return records.MISSING_KEY, f"no {key!r}; the keys are {', '.join(map(repr, list(record)[:8]))}"
        if problem := records.value_problem(record[key]):
            return problem, f"{key!r} is a {type(record[key]).__name__}"
    return None


def _reject(source: Source, problem: Problem, found: Findings, rejects: list[dict[str, Any]], work: Rewriting) -> None:
    if work.on_bad_line == "fail":
        raise bad_line(source, found.lines + 1, problem, "fail")
    found.problems[problem.kind] += 1
    if work.output or len(rejects) < 5:
        rejects.append(problem.record(os.path.abspath(source.path), found.lines + 1))


def _blocks(source: Source, max_document_bytes: int) -> Iterator[tuple[bytes, bool, Problem | None]]:
    if source.format not in ("parquet", "arrow"):
        yield from stream_blocks(source, PIECE_BYTES, max_document_bytes)
        return
    import pyarrow as pa  # heavy; only where tables are read

    from megatron_cpt.data.tables import read_batches

    try:
        for batch in read_batches(source, None, PIECE_BYTES):
            rows = [orjson.dumps(row, default=str) for row in batch.to_pylist()]
            yield b"\n".join(rows) + b"\n" if rows else b"", False, None
    except (pa.ArrowException, OSError) as problem:
        yield b"", True, Problem(0, records.DAMAGED, " ".join(str(problem).split())[:300])


@contextlib.contextmanager
def _compressed(file: IO[bytes], compression: str) -> Iterator[IO[bytes]]:
    if compression == "gz":
        with gzip.GzipFile(filename="", mode="wb", fileobj=file, compresslevel=6, mtime=0) as target:
            yield target  # type: ignore[misc]
    elif compression == "zst":
        import zstandard  # compiled; only where .zst is written

        with zstandard.ZstdCompressor().stream_writer(file, closefd=False) as target:
            yield target
    else:
        yield file
