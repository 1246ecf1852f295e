"""Shards equal a plain loop's, for any number of workers, after crashes, and across engines; policies hold."""

import gzip
import itertools
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import zstandard

from megatron_cpt.data.shards.indexed import document_bounds, read_index, read_shard_manifest, read_tokens
from megatron_cpt.data.tokenize.driver import tokenize
from megatron_cpt.data.tokenize.options import TokenizeOptions
from megatron_cpt.data.tokenizer.interface import load_tokenizer
from megatron_cpt.errors import DataError
from tests.data.conftest import SENTENCES, build_bpe, save_tokenizer


def documents(start, count):
    return [f"{i}: " + " ".join(SENTENCES[(i + j) % 5] for j in range(i % 4 + 1)) for i in range(start, start + count)]


def as_jsonl(texts):
    return b"".join(json.dumps({"text": text, "n": i}).encode() + b"\n" for i, text in enumerate(texts))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Return (folder, its documents in order): every format, nested folders."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = tmp_path_factory.mktemp("corpus")
    parts = [documents(start, 300) for start in range(0, 1800, 300)]
    (folder / "b").mkdir()
    (folder / "a.jsonl").write_bytes(as_jsonl(parts[0]))
    (folder / "b/c.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(as_jsonl(parts[1])))
    (folder / "b/d.json.gz").write_bytes(gzip.compress(as_jsonl(parts[2])))
    pq.write_table(pa.table({"text": parts[3]}), folder / "b/e.parquet", row_group_size=100)
    parts[4] = [text.replace("\n", " ").strip() for text in parts[4]]
    (folder / "f.txt").write_text("\n".join(parts[4]) + "\n")
    table = pa.table({"text": parts[5]})
    with pa.OSFile(str(folder / "g.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=64)
    return folder, [text for part in parts for text in part]


def read_documents(prefix):
    index = read_index(prefix)
    bounds, tokens = document_bounds(index), read_tokens(index)
    return [tokens[a:b].tolist() for a, b in itertools.pairwise(bounds)]


def content(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def test_a_mixed_corpus_becomes_the_reference_ids_with_an_end_after_each_document(corpus, bpe_dir, tmp_path):
    folder, texts = corpus
    tokenizer = load_tokenizer(bpe_dir)
    report = tokenize([folder], bpe_dir, output_prefix=tmp_path / "x", workers=2)
    expected = [[*ids, tokenizer.eod_id] for ids in tokenizer.encode_batch(texts)]
    assert read_documents(tmp_path / "x_text_document") == expected
    manifest = read_shard_manifest(tmp_path / "x_text_document")
    assert manifest["documents"] == 1800 and manifest["tokens"] == sum(map(len, expected))
    assert manifest["bytes"] == sum(len(text.encode()) for text in texts)
    assert [source["documents"] for source in manifest["sources"]] == [300] * 6
    assert sum(source["tokens"] for source in manifest["sources"]) == manifest["tokens"]
    assert manifest["tokenizer"] == tokenizer.identity
    assert report.engine == "fastokens" and "1,800 documents" in str(report)
    assert not [name for name in content(tmp_path) if "partial" in name]


def test_the_pair_equals_a_loop_over_megatron_cores_builder(corpus, bpe_dir, tmp_path):
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    folder, texts = corpus
    tokenizer = load_tokenizer(bpe_dir)
    builder = IndexedDatasetBuilder(str(tmp_path / "loop.bin"), dtype=np.uint16)
    for ids in tokenizer.encode_batch(texts):
        builder.add_document(torch.tensor([*ids, tokenizer.eod_id]), [len(ids) + 1])
    builder.finalize(str(tmp_path / "loop.idx"))
    tokenize([folder], bpe_dir, output_prefix=tmp_path / "x", workers=2)
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"x_text_document{suffix}").read_bytes() == (tmp_path / f"loop{suffix}").read_bytes()


@pytest.mark.parametrize("engine", ["gigatoken", "reference"])
def test_the_output_depends_neither_on_workers_nor_on_the_engine(corpus, bpe_dir, tmp_path, engine):
    folder, _ = corpus
    tokenize([folder], bpe_dir, output_prefix=tmp_path / "one/x", workers=1, options=TokenizeOptions(provenance=True))
    tokenize(
        [folder],
        bpe_dir,
        output_prefix=tmp_path / "many/x",
        workers=3,
        options=TokenizeOptions(engine=engine, provenance=True),
    )
    assert content(tmp_path / "one") == content(tmp_path / "many")


def test_sentencepiece_and_unigram_models_work(corpus, sentencepiece_model, unigram_model, tmp_path):
    folder, texts = corpus
    for model, engine in ((sentencepiece_model, "gigatoken"), (unigram_model, "reference")):
        tokenizer = load_tokenizer(model)
        report = tokenize([folder], model, output_prefix=tmp_path / model.stem, workers=2)
        assert report.engine == engine
        expected = [[*ids, tokenizer.eod_id] for ids in tokenizer.encode_batch(texts)]
        assert read_documents(tmp_path / f"{model.stem}_text_document") == expected


def test_without_end_of_document_the_ids_are_bare(corpus, bpe_dir, tmp_path):
    folder, texts = corpus
    tokenize([folder / "a.jsonl"], bpe_dir, output_prefix=tmp_path / "x", options=TokenizeOptions(append_eod=False))
    assert read_documents(tmp_path / "x_text_document") == load_tokenizer(bpe_dir).encode_batch(texts[:300])


def test_each_key_becomes_a_shard_of_its_own(bpe_dir, tmp_path):
    (tmp_path / "x.jsonl").write_text('{"q": "why", "a": "so"}\n{"q": "who", "a": "me"}\n')
    tokenize([tmp_path / "x.jsonl"], bpe_dir, output_prefix=tmp_path / "o", options=TokenizeOptions(keys=["q", "a"]))
    tokenizer = load_tokenizer(bpe_dir)
    for key, texts in (("q", ["why", "who"]), ("a", ["so", "me"])):
        expected = [[*ids, tokenizer.eod_id] for ids in tokenizer.encode_batch(texts)]
        assert read_documents(tmp_path / f"o_{key}_document") == expected


def test_a_large_vocabulary_is_int32(tmp_path):
    tokenizer = build_bpe()
    tokenizer.add_tokens([f"<extra-{i}>" for i in range(65000)])
    folder = save_tokenizer(tokenizer, tmp_path / "tok")
    (tmp_path / "x.txt").write_text("a<extra-64999>b\n")
    tokenize([tmp_path / "x.txt"], folder, output_prefix=tmp_path / "o")
    index = read_index(tmp_path / "o_text_document")
    assert index.dtype == np.int32 and 65499 in read_tokens(index).tolist()


def test_a_tree_is_mirrored_with_a_shard_per_file(corpus, bpe_dir, tmp_path):
    folder, _ = corpus
    report = tokenize([folder], bpe_dir, output_dir=tmp_path, workers=2)
    names = [prefix.relative_to(tmp_path).as_posix() for prefix in report.manifests]
    assert sorted(names) == [f"{name}_text_document" for name in ("a", "b/c", "b/d", "b/e", "f", "g")]


def test_small_files_are_grouped_into_shards_of_about_the_target(bpe_dir, tmp_path):
    texts = documents(0, 400)
    for i in range(40):
        path = tmp_path / "in" / ("en" if i < 30 else "ja") / f"{i:03d}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(as_jsonl(texts[i * 10 : i * 10 + 10]))
    whole = tokenize([tmp_path / "in"], bpe_dir, output_prefix=tmp_path / "whole")
    total = sum(manifest["tokens"] for manifest in whole.manifests.values())
    report = tokenize(
        [tmp_path / "in"],
        bpe_dir,
        output_dir=tmp_path / "out",
        options=TokenizeOptions(shard_tokens=total // 8),
        workers=2,
    )
    shards = {p.relative_to(tmp_path / "out").as_posix(): m["tokens"] for p, m in report.manifests.items()}
    assert next(iter(shards)) == "en/en-00000_text_document" and "ja/ja-00000_text_document" in shards
    assert sum(shards.values()) == total and 7 <= len(shards) <= 10
    assert max(shards.values()) < 1.5 * total / 8
    in_order = [document for prefix in report.manifests for document in read_documents(prefix)]
    assert in_order == read_documents(tmp_path / "whole_text_document")


def test_parts_of_a_job_array_hold_the_whole_together(corpus, bpe_dir, tmp_path):
    folder, _ = corpus
    tokenize([folder], bpe_dir, output_prefix=tmp_path / "whole")
    found = []
    for i in range(4):
        report = tokenize([folder], bpe_dir, output_prefix=tmp_path / "x", part=(i, 4))
        (prefix,) = report.manifests
        assert prefix.name == f"x-{i:05d}-of-00004_text_document"
        found += read_documents(prefix)
    assert found == read_documents(tmp_path / "whole_text_document")
    one = tokenize([folder], bpe_dir, output_dir=tmp_path / "all")
    split = [p for i in range(4) for p in tokenize([folder], bpe_dir, output_dir=tmp_path / "s", part=(i, 4)).manifests]
    assert sorted(p.name for p in split) == sorted(p.name for p in one.manifests)


def test_two_files_that_would_share_a_name_are_refused(bpe_dir, tmp_path):
    (tmp_path / "x.jsonl").write_bytes(as_jsonl(["a"]))
    (tmp_path / "x.txt").write_text("a\n")
    with pytest.raises(DataError, match="would both become"):
        tokenize([tmp_path / "x.jsonl", tmp_path / "x.txt"], bpe_dir, output_dir=tmp_path / "o")


BAD = as_jsonl(["a"]) + b'{"text": 5}\n' + as_jsonl(["b", "c"]) + b"{broken\n\n" + as_jsonl(["d"])


def test_the_first_bad_line_stops_with_file_and_line_and_leaves_nothing(bpe_dir, tmp_path):
    (tmp_path / "in.jsonl").write_bytes(as_jsonl(documents(0, 2000)) + BAD)
    for workers in (1, 3):
        with pytest.raises(DataError, match=r"in\.jsonl:2002: text is not a string"):
            tokenize([tmp_path / "in.jsonl"], bpe_dir, output_prefix=tmp_path / "o/x", workers=workers)
        assert list((tmp_path / "o").iterdir()) == []


def test_skipped_lines_are_counted_and_kept(bpe_dir, tmp_path):
    (tmp_path / "in.jsonl").write_bytes(BAD)
    report = tokenize(
        [tmp_path / "in.jsonl"], bpe_dir, output_prefix=tmp_path / "x", options=TokenizeOptions(on_bad_line="skip")
    )
    manifest = report.manifests[tmp_path / "x_text_document"]
    assert manifest["rejects"] == {"text is not a string": 1, "invalid JSON": 1}
    assert manifest["notes"] == {"blank line": 1}
    assert manifest["lines"] == manifest["documents"] + 2 + 1 == 7
    rejects = [json.loads(line) for line in (tmp_path / "x.rejects.jsonl").read_text().splitlines()]
    assert [(entry["line"], entry["raw"]) for entry in rejects] == [(2, '{"text": 5}'), (5, "{broken")]
    assert "rejected lines: 2" in str(report)


def test_strict_stops_at_what_loses_nothing_too(bpe_dir, tmp_path):
    (tmp_path / "in.jsonl").write_bytes(as_jsonl(["a"]) + b"\n" + as_jsonl(["b"]))
    assert tokenize([tmp_path / "in.jsonl"], bpe_dir, output_prefix=tmp_path / "x").manifests
    with pytest.raises(DataError, match=r"in\.jsonl:2: blank line"):
        tokenize(
            [tmp_path / "in.jsonl"],
            bpe_dir,
            output_prefix=tmp_path / "y",
            options=TokenizeOptions(on_bad_line="strict"),
        )


def test_a_truncated_file_stops_or_is_counted(bpe_dir, tmp_path):
    data = gzip.compress(as_jsonl(documents(0, 500)))
    (tmp_path / "in.jsonl.gz").write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match="damaged or truncated"):
        tokenize([tmp_path / "in.jsonl.gz"], bpe_dir, output_prefix=tmp_path / "x")
    report = tokenize(
        [tmp_path / "in.jsonl.gz"], bpe_dir, output_prefix=tmp_path / "x", options=TokenizeOptions(on_bad_line="skip")
    )
    manifest = report.manifests[tmp_path / "x_text_document"]
    assert manifest["rejects"] == {"damaged or truncated file": 1} and 0 < manifest["documents"] < 500


def test_whole_shards_are_kept_and_changed_ones_redone(corpus, bpe_dir, tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("a", "b"):
        (tmp_path / f"in/{name}.jsonl").write_bytes(as_jsonl(documents(0, 50)))
    tokenize([tmp_path / "in"], bpe_dir, output_dir=tmp_path / "o")
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "o").iterdir()}
    again = tokenize([tmp_path / "in"], bpe_dir, output_dir=tmp_path / "o")
    assert (again.num_reused, again.engine) == (2, None)
    assert stamps == {path: path.stat().st_mtime_ns for path in (tmp_path / "o").iterdir()}
    (tmp_path / "in/b.jsonl").write_bytes(as_jsonl(documents(7, 60)))
    assert tokenize([tmp_path / "in"], bpe_dir, output_dir=tmp_path / "o").num_reused == 1
    assert read_index(tmp_path / "o/b_text_document").num_documents == 60


def test_another_tokenizer_or_option_refuses_to_mix(bpe_dir, sentencepiece_model, tmp_path):
    (tmp_path / "in.jsonl").write_bytes(as_jsonl(["a"]))
    arguments = {"output_prefix": tmp_path / "x"}
    tokenize([tmp_path / "in.jsonl"], bpe_dir, **arguments)
    with pytest.raises(DataError, match="must not mix tokenizers"):
        tokenize([tmp_path / "in.jsonl"], sentencepiece_model, **arguments)
    with pytest.raises(DataError, match="append_eod=True, not False"):
        tokenize([tmp_path / "in.jsonl"], bpe_dir, options=TokenizeOptions(append_eod=False), **arguments)


LYING_ENGINE = """
import logging, sys
import numpy as np
from pathlib import Path
from megatron_cpt.data.tokenizer import encoders as engines
from megatron_cpt.data.tokenize.driver import tokenize
from megatron_cpt.data.tokenize.options import TokenizeOptions

def lying(tokenizer):
    reference = engines._reference_encoder(tokenizer)
    def encode(texts):
        ids, lengths = reference(texts)
        return (np.where(ids > 3, ids - 1, ids) if texts[0].startswith("900:") else ids), lengths
    return encode

logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
engines._ENCODERS["fastokens"] = lying
corpus, tokenizer, output = map(Path, sys.argv[1:])
print(tokenize([corpus], tokenizer, output_dir=output, workers=2).engine)
"""


def test_a_folder_with_shards_of_another_tokenizer_is_refused_whatever_their_names(
    bpe_dir, sentencepiece_model, tmp_path
):
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_bytes(as_jsonl(["a"]))
    tokenize([tmp_path / "a.jsonl"], bpe_dir, output_dir=tmp_path / "o")
    with pytest.raises(DataError, match=r"a_text_document\.json: is of a shard tokenized with"):
        tokenize([tmp_path / "b.jsonl"], sentencepiece_model, output_dir=tmp_path / "o")


def test_an_engine_that_differs_in_the_middle_of_a_run_falls_back_loudly(corpus, bpe_dir, tmp_path):
    folder, _ = corpus
    environment = os.environ | {"PYTHONPATH": os.getcwd(), "OPENBLAS_NUM_THREADS": "1"}
    arguments = [sys.executable, "-c", LYING_ENGINE, folder, bpe_dir, tmp_path / "x"]
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment, timeout=120)
    assert done.stdout.strip() == "gigatoken", done.stderr
    assert "fastokens gives other ids" in done.stderr and "falling back" in done.stderr
    tokenize([folder], bpe_dir, output_dir=tmp_path / "y")
    assert content(tmp_path / "x") == content(tmp_path / "y")


def test_a_tokenizer_that_no_accelerated_engine_reads_is_encoded_by_the_reference(corpus, tmp_path, caplog):
    from tokenizers import normalizers

    folder, texts = corpus
    tokenizer = save_tokenizer(build_bpe(normalizer=normalizers.NFKC()), tmp_path / "tokenizer")
    report = tokenize([folder / "a.jsonl"], tokenizer, output_prefix=tmp_path / "x")
    assert report.engine == "reference"
    assert "gigatoken refuses" in caplog.text and "fastokens refuses" in caplog.text
    expected = [[*ids, 0] for ids in load_tokenizer(tokenizer).encode_batch(texts[:300])]
    assert read_documents(tmp_path / "x_text_document") == expected


def command(*arguments):
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    return subprocess.Popen(
        [sys.executable, "-m", "megatron_cpt", "tokenize", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


@pytest.fixture(scope="module")
def slow_corpus(tmp_path_factory):
    """Files that the reference engine needs some seconds for."""
    folder = tmp_path_factory.mktemp("slow")
    for i in range(6):
        data = as_jsonl(documents(i * 3000, 3000))
        if i % 2:
            (folder / f"{i}.jsonl.gz").write_bytes(gzip.compress(data, 1))
        else:
            (folder / f"{i}.jsonl").write_bytes(data)
    return folder


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)
    return found


def children(pid):
    path = f"/proc/{pid}/task/{pid}/children"
    return [int(child) for child in open(path).read().split()] if os.path.exists(path) else []


def test_a_killed_run_continues_to_identical_files(slow_corpus, bpe_dir, tmp_path):
    arguments = (
        "--input",
        slow_corpus,
        "--tokenizer",
        bpe_dir,
        "--engine",
        "reference",
        "--workers",
        2,
        "--output-dir",
    )
    process = command(*arguments, tmp_path / "killed")
    wait_for(lambda: list((tmp_path / "killed").glob("*.json")))
    workers = children(process.pid)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    wait_for(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in workers))
    assert 0 < len(list((tmp_path / "killed").glob("*.json"))) < 6
    rerun = command(*arguments, tmp_path / "killed")
    output, _ = rerun.communicate()
    assert rerun.returncode == 0 and "(0 were complete" not in output
    undisturbed = command(*arguments, tmp_path / "whole")
    undisturbed.communicate()
    assert content(tmp_path / "killed") == content(tmp_path / "whole")


def test_a_killed_worker_fails_the_command(slow_corpus, bpe_dir, tmp_path):
    process = command(
        *("--input", slow_corpus, "--tokenizer", bpe_dir, "--engine", "reference", "--workers", 2),
        *("--output-prefix", tmp_path / "x"),
    )
    wait_for(lambda: list(tmp_path.glob(".x*.partial")))
    os.kill(wait_for(lambda: children(process.pid))[0], signal.SIGKILL)
    _, errors = process.communicate()
    assert process.returncode == 2 and "was killed by signal 9" in errors
    assert list(tmp_path.iterdir()) == []


def test_a_shard_that_another_process_writes_is_left_alone(slow_corpus, bpe_dir, tmp_path):
    arguments = (
        "--input",
        slow_corpus,
        "--tokenizer",
        bpe_dir,
        "--engine",
        "reference",
        "--output-prefix",
        tmp_path / "x",
    )
    first = command(*arguments)
    wait_for(lambda: list(tmp_path.glob(".x*.partial")))
    second = command(*arguments)
    _, errors = second.communicate()
    assert second.returncode == 2 and "another process is writing" in errors
    first.communicate()
    assert first.returncode == 0 and read_index(tmp_path / "x_text_document").num_documents == 18000


def test_what_a_killed_process_left_of_a_shard_goes_and_other_files_stay(corpus, bpe_dir, tmp_path):
    left = [".x_text_document.idx.ab12_c.partial", ".x_text_document.json.q.partial", ".x.rejects.jsonl.q.partial"]
    others = [".y_text_document.idx.ab12_c.partial", ".x_text_document.idx.partial", "x_text_document.idx.q.partial"]
    for name in left + others:
        (tmp_path / name).write_text("half")
    tokenize([corpus[0]], bpe_dir, output_prefix=tmp_path / "x")
    assert sorted(name for name in content(tmp_path) if "partial" in name) == sorted(others)
