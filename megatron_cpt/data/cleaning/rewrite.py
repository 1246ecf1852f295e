"""Document files checked and rewritten: validate, repair, extract, merge small files.

All four read sources as lines and judge each line with the rules of `data/reading/records.py`; validate only counts,
the others write plain lines (optionally compressed) with a newline after every document. Repair also splits two objects
that share a line, puts U+FFFD for lone surrogates, and drops byte-order marks, blank lines, empty texts and lines that
cannot be repaired (kept in a reject file); an empty file is not written. Records with a list of `conversations` or
`messages` in place of the text pass through. Tables become JSON lines. A text file that is one document is copied
unchanged. Sources are worked on in parallel; an output whose sources are unchanged is kept.

Lines = documents + blank lines + empty texts + rejects, but that two objects which repair splits are one line.
"""

import contextlib
import gzip
import itertools
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from megatron_cpt.data.cleaning.surrogates import mended_surrogates
from megatron_cpt.data.reading import records
from megatron_cpt.data.reading.byproducts import rejects_beside, remove_partials
from megatron_cpt.data.reading.conversations import MESSAGE_KEYS
from megatron_cpt.data.reading.documents import Source
from megatron_cpt.data.reading.file_pool import map_files
from megatron_cpt.data.reading.plain_reader import PlainReader
from megatron_cpt.data.reading.record_files import json_line, reject_writer
from megatron_cpt.data.reading.records import Problem
from megatron_cpt.data.reading.streams import MAX_DOCUMENT_BYTES, PIECE_BYTES, stream_blocks
from megatron_cpt.data.tokenize.shard_writer import bad_line
from megatron_cpt.errors import DataError
from megatron_cpt.files import read_json_object, whole_file, write_json

COMPRESSIONS = ("none", "gz", "zst")
_BOM = b"\xef\xbb\xbf"
_EXAMPLES = 5
Reject = Callable[[dict[str, Any]], Any]


@dataclass
class Findings:
    """Kind of the lines of a file."""

    path: str
    lines: int = 0
    documents: int = 0
    notes: Counter[str] = field(default_factory=Counter)
    problems: Counter[str] = field(default_factory=Counter)
    examples: list[dict[str, Any]] = field(default_factory=list)
    """The first problems, as entries of a reject file."""

    def __str__(self) -> str:
        odd = [f"{count:,} {kind}" for kind, count in (self.problems + self.notes).items()]  # + leaves out zeros
        summary = f"{self.path}: {self.documents:,} documents in {self.lines:,} lines" + "".join(
            f"; {part}" for part in odd
        )
        shown = [f"  line {entry['line']}: {entry['reason']} ({entry.get('detail', '')})" for entry in self.examples]
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
    txt_documents: str = "line"
    """Whether a .txt file holds a document per `line` or is one document (`file`)."""
    part_bytes: int | None = None
    """Plain bytes of a part, where the output is cut into `<name>-part-00000.jsonl` ...; None: one file."""

    @property
    def mends(self) -> bool:
        """Whether bad lines are repaired, not only reported or copied."""
        return self.output is not None and bool(self.keys)

    def identity(self) -> dict[str, Any]:
        """Return what an output is made of and how."""
        return {
            "sources": [source.identity() for source in self.sources],
            "keys": list(self.keys),
            "on_bad_line": self.on_bad_line,
            "max_document_bytes": self.max_document_bytes,
            "txt_documents": self.txt_documents,
            **({"part_bytes": self.part_bytes} if self.part_bytes else {}),
        }

    def part(self, number: int) -> Path:
        """Return the file of a part, or the output where it is one file."""
        assert self.output is not None
        if self.part_bytes is None:
            return self.output
        stem, dot, suffixes = (
            self.output.name.rpartition(".jsonl")
            if ".jsonl" in self.output.name
            else self.output.name.rpartition(".txt")
        )
        return self.output.with_name(f"{stem}-part-{number:05d}{dot}{suffixes}")


def record_path(output: Path) -> Path:
    """Return the file next to an output that records its inputs."""
    return output.with_name(f".{output.name}.sources.json")


def rewrite_all(rewritings: Sequence[Rewriting], workers: int, label: str) -> list[Findings]:
    """Do the rewritings in parallel and return what was found in each source, in order.

    Raises: DataError at the first bad line where the policy is to fail, and when a worker dies.
    """
    outputs = [work.output for work in rewritings if work.output]
    remove_partials([path for output in outputs for path in (output, rejects_beside(output), record_path(output))])
    for work in rewritings:
        if work.output is not None and work.part_bytes is not None:
            remove_partials(work.part(number) for number in range(_partials(work)))
    sizes = [sum(source.size for source in work.sources) for work in rewritings]
    found = map_files(rewrite, [(work,) for work in rewritings], sizes, workers, label)
    return [findings for group in found for findings in group]


def _partials(work: Rewriting) -> int:
    """Return the number of parts that a killed run can have started: the existing ones, and one."""
    return 1 + next(number for number in itertools.count() if not work.part(number).exists())


def rewrite(work: Rewriting) -> list[Findings]:
    """Do one rewriting and return what was found in each of its sources; a finished one is read from its record."""
    if work.output is None:
        return [_look(source, work, None, None) for source in work.sources]
    record_file, identity = record_path(work.output), work.identity()
    before = read_json_object(record_file, DataError) if record_file.exists() else None
    if before is not None and before["identity"] == identity and _is_whole(work, before):
        return [Findings(**(found | _counters(found))) for found in before["findings"]]
    # written first, so that an output of ours is known as such also when the record of its findings is missing
    write_json(record_file, {"identity": identity, "sizes": None, "findings": []})
    writer = _Writer(work)
    with writer, reject_writer(work.output) as reject:
        findings = [_look(source, work, writer.write, reject) for source in work.sources]
    for source in work.sources:
        source.check_unchanged()
    if work.mends and not any(found.documents for found in findings):
        for number in range(writer.number):
            work.part(number).unlink()
        record_file.unlink()
        return findings
    for number in itertools.count(writer.number):  # of an earlier run on more
        if work.part_bytes is None or not work.part(number).exists():
            break
        work.part(number).unlink()
    sizes = [work.part(number).stat().st_size for number in range(writer.number)]
    write_json(record_file, {"identity": identity, "sizes": sizes, "findings": [vars(found) for found in findings]})
    return findings


def _is_whole(work: Rewriting, record: Mapping[str, Any]) -> bool:
    """Return whether all files of a record exist."""
    sizes = record.get("sizes")
    if sizes is None:
        return False
    paths = [work.part(number) for number in range(len(sizes))]
    return all(path.exists() and path.stat().st_size == size for path, size in zip(paths, sizes, strict=True))


class _Writer:
    """Writes an output, split into parts if requested; each file is written atomically."""

    def __init__(self, work: Rewriting):
        self._work = work
        self.number = 0
        """Parts that have begun."""
        self._room = 0
        self._stack = contextlib.ExitStack()
        self._target: IO[bytes] | None = None

    def __enter__(self) -> "_Writer":
        self._next()
        return self

    def __exit__(self, *problem: Any) -> None:
        self._stack.__exit__(*problem)

    def write(self, data: bytes) -> None:
        """Write whole lines; a part ends behind the line with which it is full."""
        while data and self._work.part_bytes is not None and len(data) > self._room:
            end = data.find(b"\n", max(self._room - 1, 0)) + 1 or len(data)
            self._put(data[:end])
            data = data[end:]
            if data:
                self._next()
        self._put(data)

    def _put(self, data: bytes) -> None:
        if not data:
            return
        if self._work.part_bytes is not None and self._room <= 0:
            self._next()
        assert self._target is not None
        self._target.write(data)
        self._room -= len(data)

    def _next(self) -> None:
        self._stack.close()
        file = self._stack.enter_context(whole_file(self._work.part(self.number), "wb"))
        self._target = self._stack.enter_context(_compressed(file, self._work.compression))
        self.number += 1
        self._room = self._work.part_bytes or 0


def _counters(found: dict[str, Any]) -> dict[str, Any]:
    return {"notes": Counter(found["notes"]), "problems": Counter(found["problems"])}


def _look(source: Source, work: Rewriting, write: Callable[[bytes], Any] | None, reject: Reject | None) -> Findings:
    """Pass the good lines of a source to `write` and the bad ones to `reject`, where given; return what was found."""
    found = Findings(str(source.path))
    if source.problem:
        _reject(source, Problem(0, records.UNREADABLE, source.problem), found, reject, work)
        found.lines += 1
        return found
    if source.format == "txt" and work.txt_documents == "file":
        _look_at_text(source, work, write, reject, found)
        return found
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
        if source.encoding:
            found.notes[records.UNKNOWN_BYTES] += data.count(b"\xef\xbf\xbd")
        for line in lines:
            if problem := _judge(line.removesuffix(b"\r"), source, work, found, good):
                _reject(source, problem, found, reject, work)
            found.lines += 1
        if damage:
            _reject(source, damage, found, reject, work)
            found.lines += 1
        if good and write:
            write(b"\n".join(good) + b"\n")
    return found


def _look_at_text(
    source: Source, work: Rewriting, write: Callable[[bytes], Any] | None, reject: Reject | None, found: Findings
) -> None:
    """Judge a text file that is one document, and write its bytes."""
    with PlainReader(source.path, source.compression, source.encoding) as stream:
        data, damage = stream.read_block(work.max_document_bytes + 1)
    problem = Problem(0, records.DAMAGED, damage) if damage else None
    if data.startswith(_BOM):
        found.notes[records.BYTE_ORDER_MARK] += 1
        data = data[len(_BOM) :]
    if len(data) > work.max_document_bytes:
        problem = Problem(0, records.TOO_LONG, f"over {work.max_document_bytes:,} bytes")
    elif problem is None:
        try:
            data.decode()
        except UnicodeDecodeError as error:
            problem = Problem(0, records.INVALID_UTF8, f"byte {error.start}", data)
    if problem:
        _reject(source, problem, found, reject, work)
    elif not data:
        found.notes[records.EMPTY_TEXT] += 1
    else:
        found.documents += 1
        if write:
            write(data)
    found.lines += 1


def _judge(line: bytes, source: Source, work: Rewriting, found: Findings, good: list[bytes]) -> Problem | None:
    """Count and add the documents of a line to `good`, or return why there are none."""
    if not line.strip():
        found.notes[records.BLANK_LINE] += 1
        return None
    if len(line) > work.max_document_bytes:
        return Problem(0, records.TOO_LONG, f"{len(line):,} bytes")
    if source.format == "txt" or not work.keys:
        if source.format == "txt":
            mended = mended_surrogates(line, is_json=False) if work.mends else line
            found.notes[records.SURROGATE] += mended != line
            line = mended
            try:
                line.decode()
            except UnicodeDecodeError as problem:
                return Problem(0, records.INVALID_UTF8, f"byte {problem.start}", line)
        found.documents += 1
        good.append(line)
        return None
    try:
        record = records.object_of_line(line)
    except (ValueError, RecursionError):
        return _mend(line, source, work, found, good)
    if found_wrong := _record_problem(record, work.keys):
        mended = mended_surrogates(line) if work.mends and found_wrong[0] == records.INVALID_UTF8 else line
        if mended == line or _record_problem(records.object_of_line(mended), work.keys):
            return Problem(0, *found_wrong, line)
        found.notes[records.SURROGATE] += 1
        line = mended
    if _is_empty(record, work.keys):
        found.notes[records.EMPTY_TEXT] += 1
        return None
    found.documents += 1
    good.append(line)
    return None


def _mend(line: bytes, source: Source, work: Rewriting, found: Findings, good: list[bytes]) -> Problem | None:
    """Add the objects of a line that is not one JSON value, or return what is wrong with it; without output it is only judged."""
    kind, detail = records.line_problem(line)
    if work.mends and kind == records.INVALID_UTF8 and (mended := mended_surrogates(line)) != line:
        found.notes[records.SURROGATE] += 1
        return _judge(mended, source, work, found, good)
    if work.output is not None and line.startswith(_BOM):  # files with one were put together
        found.notes[records.BYTE_ORDER_MARK] += 1
        line = line[len(_BOM) :]
        if not line.strip():
            found.notes[records.BLANK_LINE] += 1
            return None
        with contextlib.suppress(ValueError, RecursionError):
            record = records.object_of_line(line)
            if found_wrong := _record_problem(record, work.keys):
                return Problem(0, *found_wrong, line)
            found.documents += 1
            good.append(line)
            return None
        kind, detail = records.line_problem(line)
    parts = _objects_of_line(line) if kind == records.TWO_OBJECTS else None
    if work.output is None or parts is None or any(_record_problem(part, work.keys) for part, _ in parts):
        return Problem(0, kind, detail, line)
    found.notes[kind] += 1
    found.documents += len(parts)
    good += [raw for _, raw in parts]
    return None


def _objects_of_line(line: bytes) -> list[tuple[Any, bytes]] | None:
    """Return the JSON objects that share a line, separated by nothing, spaces or commas, each with its bytes."""
    text, found = line.decode().strip(), []
    decoder = json.JSONDecoder()
    while text:
        try:
            value, end = decoder.raw_decode(text)
        except (ValueError, RecursionError):
            return None
        found.append((value, text[:end].encode()))
        text = text[end:].lstrip(" \t\r,")
    return found


def _is_empty(record: dict[str, Any], keys: Sequence[str]) -> bool:
    return all(record.get(key) == "" for key in keys)


def _record_problem(record: Any, keys: Sequence[str]) -> tuple[str, str] | None:
    if not isinstance(record, dict):
        return records.NOT_AN_OBJECT, f"a {type(record).__name__}"
    chat_key = next((key for key in MESSAGE_KEYS if isinstance(record.get(key), list)), None)
    if chat_key and not any(key in record for key in keys if key not in MESSAGE_KEYS):
        turns = record[chat_key]
        for number, turn in enumerate(turns):
            if found := _turn_problem(turn):
                return found, f"turn {number} of {chat_key!r} has no role and content"
        return None if turns else (records.EMPTY_TEXT, f"{chat_key!r} has no turns")
    for key in keys:
        if key not in record:
            return records.MISSING_KEY, f"no {key!r}; the keys are {', '.join(map(repr, list(record)[:8]))}"
        if problem := records.value_problem(record[key]):
            return problem, f"{key!r} is a {type(record[key]).__name__}"
    return None


def _turn_problem(turn: Any) -> str | None:
    if not isinstance(turn, dict) or not any(turn.get(key) is not None for key in ("role", "from")):
        return records.NOT_TEXT
    content = next((turn[key] for key in ("content", "value") if turn.get(key) is not None), None)
    if isinstance(content, list):
        return None if all(isinstance(part, dict) for part in content) else records.NOT_TEXT
    if "content" not in turn and "value" not in turn:
        return records.NOT_TEXT
    return records.value_problem(content)


def _reject(source: Source, problem: Problem, found: Findings, reject: Reject | None, work: Rewriting) -> None:
    if work.on_bad_line == "fail":
        raise bad_line(source, found.lines + 1, problem, "fail")
    found.problems[problem.kind] += 1
    if reject is None and len(found.examples) >= _EXAMPLES:
        return
    entry = problem.record(os.path.abspath(source.path), found.lines + 1)
    if reject:
        reject(entry)
    if len(found.examples) < _EXAMPLES:
        found.examples.append(entry)


def _blocks(source: Source, max_document_bytes: int) -> Iterator[tuple[bytes, bool, Problem | None]]:
    if source.format not in ("parquet", "arrow"):
        yield from stream_blocks(source, PIECE_BYTES, max_document_bytes)
        return
    import pyarrow as pa  # heavy; only where tables are read

    from megatron_cpt.data.reading.tables import read_batches

    try:
        for batch in read_batches(source, None, PIECE_BYTES):
            rows = [json_line(row) for row in batch.to_pylist()]
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
