"""Every format, compression and kind of bad line through every data verb: the totals add up and agree."""

import bz2
import gzip
import json
import lzma
import os
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_cpt.data.cleaning.decontaminate import DecontaminationOptions, decontaminate, read_passages
from megatron_cpt.data.cleaning.dedup import DedupOptions, deduplicate
from megatron_cpt.data.cleaning.rewrite import Rewriting, rewrite_all
from megatron_cpt.data.cleaning.rewrite_plan import Grouping, plan_tree_of_files
from megatron_cpt.data.cleaning.sample import SampleOptions, sample
from megatron_cpt.data.cleaning.signatures import MinHashOptions
from megatron_cpt.data.reading import records
from megatron_cpt.data.reading.documents import list_sources
from megatron_cpt.data.reading.record_files import Reading, Tally, read_records
from megatron_cpt.data.reading.streams import Layout, parse_piece, pieces_of
from megatron_cpt.data.tokenize.driver import tokenize
from megatron_cpt.data.tokenize.options import TokenizeOptions
from megatron_cpt.errors import DataError

ZSTD = zstandard.ZstdCompressor().compress
COMPRESS = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress, ".zst": ZSTD}
GOOD = [
    b'{"text": "plain"}',
    b'{"text": "carriage return"}\r',
    b'  {"text": "spaces", "n": NaN}  ',
    b'{"text": "nul \\u0000 escaped", "text": "the last key counts"}',
    '{"text": "日本語 é \U0001f600", "big": 123456789012345678901234567890}'.encode(),
    b'{"text": "line \\n break \\u2028 within"}',
]
BLANK = [b"", b"  ", b"\t\r"]
EMPTY = [b'{"text": ""}']
BAD = [
    (b"{broken", records.INVALID_JSON),
    (b'{"text": "raw nul \x00"}', records.INVALID_JSON),
    (b'{"text": "a"} x', records.INVALID_JSON),
    (b'{"text": "a", "x": ' + b"[" * 5000 + b"]" * 5000 + b"}", records.INVALID_JSON),
    (b'{"text": "a"}{"text": "b"}', records.TWO_OBJECTS),
    (b'{"body": "a"}', records.MISSING_KEY),
    (b'{"text": null}', records.NULL_TEXT),
    (b'{"text": 12}', records.NOT_TEXT),
    (b'{"text": ["a", "b"]}', records.NOT_TEXT),
    (b'{"text": "lone \\ud800"}', records.INVALID_UTF8),
    (b'{"text": "\xff"}', records.INVALID_UTF8),
    ('{"text": "a"}'.encode("utf-16"), records.INVALID_UTF8),
    (b'["text"]', records.NOT_AN_OBJECT),
    (b"null", records.NOT_AN_OBJECT),
]
TEXT_GOOD = [b"a line", b"with return\r", b"nul \x00", "日本語\u2028\x0b\x85".encode()]
TEXT_BAD = [(b"caf\xe9", records.INVALID_UTF8)]


def interleaved(good, others):
    """Return the lines with a good one after each other one, beginning with a byte-order mark, without a last newline."""
    lines = [line for i, other in enumerate(others) for line in (other, good[i % len(good)])]
    return b"\xef\xbb\xbf" + b"\n".join(lines), len(others)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Files by name with (documents, empty texts, blank lines, rejects by kind) of each."""
    folder = tmp_path_factory.mktemp("totals") / "a corpus"
    folder.mkdir()
    expected = {}
    for suffix, compress in COMPRESS.items():
        data, good = interleaved(GOOD, [line for line, _ in BAD] + BLANK + EMPTY)
        (folder / f"json{suffix[1:]}.jsonl{suffix}").write_bytes(compress(data))
        rejects = Counter(kind for _, kind in BAD)
        expected[f"json{suffix[1:]}.jsonl{suffix}"] = (good, len(EMPTY), len(BLANK), rejects)
        data, good = interleaved(TEXT_GOOD, [line for line, _ in TEXT_BAD] + BLANK)
        half = len(data) // 2
        several = data if not suffix else compress(data[:half]) + compress(b"") + compress(data[half:])
        (folder / f"text{suffix[1:]}.txt{suffix}").write_bytes(several)
        expected[f"text{suffix[1:]}.txt{suffix}"] = (good, 0, len(BLANK), Counter(kind for _, kind in TEXT_BAD))
    table = pa.table(
        {
            "text": ["a", None, "", "b", "日本語"],
            "nested": [{"x": [1, None]}, None, {"x": []}, {"x": None}, {"x": [2]}],
            "raw": [b"\xff\x00", None, b"", b"a", b"b"],
        }
    )
    pq.write_table(table, folder / "table.parquet", row_group_size=2)
    with pa.OSFile(str(folder / "table-b.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    for name in ("table.parquet", "table-b.arrow"):
        expected[name] = (3, 1, 0, Counter({records.NULL_TEXT: 1}))
    (folder / "empty.jsonl").write_bytes(b"")
    (folder / "bom only.txt").write_bytes(b"\xef\xbb\xbf")
    expected |= {"empty.jsonl": (0, 0, 0, Counter()), "bom only.txt": (0, 0, 0, Counter())}
    return folder, expected


def test_tokenize_accounts_for_every_line(corpus, bpe_dir, tmp_path):
    folder, expected = corpus
    report = tokenize(
        [folder], bpe_dir, output_dir=tmp_path / "t", options=TokenizeOptions(on_bad_line="skip"), workers=2
    )
    found = {}
    for manifest in report.manifests.values():
        (source,) = manifest["sources"]
        notes = source["notes"]
        counts = (source["documents"], notes.get(records.EMPTY_TEXT, 0), notes.get(records.BLANK_LINE, 0))
        found[source["path"].rsplit("/", 1)[1]] = (*counts, Counter(source["rejects"]))
        assert source["lines"] == sum(counts) + sum(source["rejects"].values())
    assert found == expected


def test_validate_agrees(corpus):
    folder, expected = corpus
    work = [Rewriting(sources=(source,), output=None, keys=("text",)) for source in list_sources([folder])]
    found = {}
    for look in rewrite_all(work, 1, "validate"):
        notes = look.notes
        counts = (look.documents, notes[records.EMPTY_TEXT], notes[records.BLANK_LINE])
        found[look.path.rsplit("/", 1)[1]] = (*counts, look.problems)
        assert look.lines == sum(counts) + look.problems.total()
    assert found == expected


def test_repair_mends_two_objects_keeps_the_rest_and_leaves_nothing_to_find(corpus, bpe_dir, tmp_path):
    folder, expected = corpus
    settings = {"keys": ("text",), "on_bad_line": "skip"}
    found = rewrite_all(plan_tree_of_files(list_sources([folder]), tmp_path / "r", **settings), 2, "repair")
    for look in found:
        documents, empty, blank, rejects = expected[look.path.rsplit("/", 1)[1]]
        mended = rejects[records.TWO_OBJECTS]
        halves = look.notes[records.SURROGATE]
        assert look.documents == documents + 2 * mended + halves
        assert look.problems == rejects - Counter({records.TWO_OBJECTS: mended, records.INVALID_UTF8: halves})
        assert (look.notes[records.EMPTY_TEXT], look.notes[records.BLANK_LINE]) == (empty, blank)
        rejected = [
            json.loads(line) for path in (tmp_path / "r").glob("*.rejects") for line in path.read_text().splitlines()
        ]
        assert look.problems.total() == sum(entry["path"] == str(look.path) for entry in rejected)
    assert sum(look.notes[records.SURROGATE] for look in found)  # lines with half of a character are mended
    work = [Rewriting(sources=(source,), output=None, keys=("text",)) for source in list_sources([tmp_path / "r"])]
    again = rewrite_all(work, 1, "validate")
    assert sum(look.documents for look in again) == sum(look.documents for look in found)
    assert not any(look.problems for look in again)


def outcome(tmp_path, corpora, verb):
    sources = corpora[""]
    reading = Reading(skip_bad_lines=True)
    if verb == "dedup":
        options = DedupOptions(minhash=MinHashOptions(is_exact_only=True))
        report = deduplicate(corpora, tmp_path / "out", reading, options, workers=2)["corpora"][""]
        return report, report["kept"], report["exact"]
    if verb == "sample":
        report = sample(sources, tmp_path / "out", reading, SampleOptions())
        return report, report["buckets"][""]["drawn"], 0
    (tmp_path / "eval.txt").write_text("日本語 日本語 日本語 quite another text\n")
    passages = read_passages({"e": list_sources([tmp_path / "eval.txt"])}, Reading(), DecontaminationOptions())
    found = decontaminate(corpora, passages, tmp_path / "out", reading, DecontaminationOptions(), workers=2)
    report = found["corpora"][""]
    return report, report["documents"] - report["removed"], report["removed"]


@pytest.mark.parametrize("verb", ["dedup", "sample", "decontaminate"])
def test_cleaning_verbs_count_and_keep_what_they_leave_out(corpus, tmp_path, verb):
    folder, expected = corpus
    report, kept, removed = outcome(tmp_path, {"": list_sources([folder])}, verb)
    rejects = sum((row[3] for row in expected.values()), Counter())
    documents = sum(good + empty for good, empty, _, _ in expected.values())
    assert report["rejects"] == rejects and report["documents"] == documents == kept + removed
    assert report["lines"] == documents + report["blank_lines"] + rejects.total()
    assert report["blank_lines"] == sum(row[2] for row in expected.values())
    written = [path for path in (tmp_path / "out").rglob("*") if path.suffix in (".jsonl", ".txt")]
    lines = [line for path in written for line in path.read_bytes().split(b"\n")[:-1]]
    assert len(lines) == kept
    assert b'{"text": "nul \\u0000 escaped", "text": "the last key counts"}' in lines  # byte for byte
    rejected = [line for path in (tmp_path / "out").rglob("*.rejects") for line in path.read_text().splitlines()]
    assert Counter(json.loads(line)["reason"] for line in rejected) == rejects
    # none of our own files is read by the next step
    assert len(list_sources([tmp_path / "out"])) == len(expected) and (tmp_path / "out/report.json").exists()


@pytest.mark.parametrize("verb", ["dedup", "sample", "decontaminate"])
@pytest.mark.parametrize("compression", [".gz", ".xz", ".bz2", ".zst"])
def test_a_truncated_file_fails_with_its_line_or_gives_its_whole_lines(tmp_path, verb, compression):
    lines = b"".join(b'{"text": "document number %d"}\n' % i for i in range(5000))
    data = COMPRESS[compression](lines[:50000]) + COMPRESS[compression](lines[50000:])
    (tmp_path / f"x.jsonl{compression}").write_bytes(data[: len(data) * 3 // 4])
    sources = list_sources([tmp_path / f"x.jsonl{compression}"])
    with pytest.raises(DataError, match=r"x.jsonl\.\w+:\d+: damaged or truncated file"):
        sample(sources, tmp_path / "strict", Reading(), SampleOptions())
    report, kept, removed = outcome(tmp_path, {"": sources}, verb)
    assert report["rejects"] == {records.DAMAGED: 1}
    assert 50000 // 34 < kept + removed < 5000
    assert report["lines"] == kept + removed + 1


def test_a_document_per_file_is_kept_as_it_is(tmp_path):
    text = b"\xef\xbb\xbffirst\r\n\r\n  third \n"
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.txt.gz").write_bytes(gzip.compress(text))
    (tmp_path / "in/b.txt").write_bytes(b"bad \xff\n\n")
    (tmp_path / "in/c.txt").write_bytes(b"")
    settings = {"keys": ("text",), "on_bad_line": "skip", "txt_documents": "file"}
    found = rewrite_all(plan_tree_of_files(list_sources([tmp_path / "in"]), tmp_path / "r", **settings), 1, "x")
    assert [(look.lines, look.documents, dict(look.problems)) for look in found] == [
        (1, 1, {}),
        (1, 0, {records.INVALID_UTF8: 1}),
        (1, 0, {}),
    ]
    assert (tmp_path / "r/a.txt").read_bytes() == text[3:]
    with pytest.raises(Exception, match="cannot be merged"):
        plan_tree_of_files(list_sources([tmp_path / "in"]), tmp_path / "m", Grouping(target_bytes=1000), **settings)


LINES = st.one_of(
    st.sampled_from([*GOOD, *BLANK, *EMPTY, *(line for line, _ in BAD), b"\xef\xbb\xbf" + GOOD[0]]),
    st.binary(max_size=5),
)


@settings(max_examples=80, deadline=None)
@given(
    lines=st.lists(LINES, max_size=12),
    ends=st.booleans(),
    has_mark=st.booleans(),
    format=st.sampled_from(["jsonl", "txt"]),
    compression=st.sampled_from(sorted(COMPRESS)),
    piece_bytes=st.integers(1, 200),
)
def test_all_readers_account_for_any_bytes_alike(
    tmp_path_factory, lines, ends, has_mark, format, compression, piece_bytes
):
    path = tmp_path_factory.mktemp("any") / f"x.{format}{compression}"
    data = (b"\xef\xbb\xbf" if has_mark else b"") + b"\n".join(lines) + (b"\n" if ends else b"")
    path.write_bytes(COMPRESS[compression](data))
    (source,) = list_sources([path])
    counts = Counter()
    for piece in pieces_of(source, 0, Layout(), piece_bytes):
        parsed = parse_piece(piece, Layout())
        if piece.descriptor is not None:
            os.close(piece.descriptor)
        counts += Counter(lines=parsed.num_lines, documents=len(parsed.lines), rejects=len(parsed.problems))
        counts += Counter({kind: parsed.notes[kind] for kind in (records.BLANK_LINE, records.EMPTY_TEXT)})
    assert counts["lines"] == counts.total() - counts["lines"]
    (look,) = rewrite_all([Rewriting(sources=(source,), output=None, keys=("text",))], 1, "validate")
    assert (look.lines, look.documents, look.problems.total()) == (
        counts["lines"],
        counts["documents"],
        counts["rejects"],
    )
    tally = Tally()
    assert sum(1 for _ in read_records(source, Reading(skip_bad_lines=True), tally)) == tally.documents
    assert tally.documents == counts["documents"] + counts[records.EMPTY_TEXT]
    assert (tally.lines, tally.rejects.total(), tally.blank_lines) == (
        counts["lines"],
        counts["rejects"],
        counts[records.BLANK_LINE],
    )
