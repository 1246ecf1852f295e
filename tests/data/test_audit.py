"""Audit finds every way a shard can differ from its sources; trace and merge agree with it."""

import json
import multiprocessing
import os
import resource
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest

from megatron_cpt.data.audit.shards import audit_shard, shard_prefixes
from megatron_cpt.data.audit.trace import trace_document, trace_token
from megatron_cpt.data.joining import merge
from megatron_cpt.data.joining.merge import find_parts, merge_shards, remove_shards
from megatron_cpt.data.shards.adopt import adopt
from megatron_cpt.data.shards.discovery import find_shards
from megatron_cpt.data.shards.indexed import bin_path, idx_path, manifest_path, read_index, write_index
from megatron_cpt.data.tokenize.driver import tokenize
from megatron_cpt.data.tokenize.options import TokenizeOptions
from megatron_cpt.data.tokenizer.interface import load_tokenizer
from megatron_cpt.errors import DataError
from tests.data.conftest import SENTENCES

_APPEND = merge._append


def write_jsonl(path, texts):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


@pytest.fixture
def corpus(tmp_path):
    """Two files: ten documents with a blank and a bad line between, and five of which two repeat others."""
    folder = tmp_path / "corpus"
    write_jsonl(folder / "a.jsonl", [f"{i}: {SENTENCES[i % 5]}" for i in range(10)])
    lines = (folder / "a.jsonl").read_text().splitlines(keepends=True)
    (folder / "a.jsonl").write_text("".join([*lines[:4], "\n", "{broken\n", *lines[4:]]))
    write_jsonl(folder / "b.jsonl", [f"0: {SENTENCES[0]}", "x", "y", "x", "z"])
    return folder


@pytest.fixture
def shard(corpus, bpe_dir, tmp_path):
    tokenize([corpus], bpe_dir, output_prefix=tmp_path / "s/x", options=TokenizeOptions(on_bad_line="skip"))
    return tmp_path / "s/x_text_document"


def test_a_true_shard_passes_and_its_duplicates_are_counted(shard, bpe_dir):
    audit = audit_shard(shard, load_tokenizer(bpe_dir))
    assert audit.problems == []
    assert (audit.documents, audit.samples, audit.decoded, audit.duplicates) == (15, 15, 15, 2)
    assert "holds its sources" in str(audit)


def change_manifest(shard, change):
    manifest = json.loads(manifest_path(shard).read_text())
    change(manifest)
    manifest_path(shard).write_text(json.dumps(manifest))


def test_changed_ids_are_found_by_the_samples(shard, bpe_dir):
    ids = np.fromfile(bin_path(shard), dtype=np.uint16)
    ids[3] = (ids[3] + 1) % 400 + 1
    ids.tofile(bin_path(shard))
    checksum, document = audit_shard(shard, load_tokenizer(bpe_dir)).problems
    assert "holds other tokens than were written" in checksum
    assert "document 0 is not what its source gives" in document


def test_a_missing_end_of_document_is_found(shard, bpe_dir):
    ids = np.fromfile(bin_path(shard), dtype=np.uint16)
    ids[int(read_index(shard).sequence_lengths[0]) - 1] = 7
    ids.tofile(bin_path(shard))
    problems = audit_shard(shard, load_tokenizer(bpe_dir), num_samples=0).problems
    assert problems[1:] == ["1 documents do not end with token 0; the first is 0"]


def test_a_document_that_lost_its_place_is_found(shard, bpe_dir):
    lengths = read_index(shard).sequence_lengths.copy()
    write_index(idx_path(shard), np.dtype(np.uint16), np.concatenate([[lengths[0] + lengths[1]], lengths[2:]]))
    problems = audit_shard(shard, load_tokenizer(bpe_dir)).problems
    assert problems[0].startswith("documents: 14 in the index, 15 in the manifest")


def test_lines_that_are_not_accounted_for_are_found(shard, bpe_dir):
    change_manifest(shard, lambda manifest: manifest["sources"][0].update(rejects={}))
    assert "12 lines, of which 11 are accounted for" in audit_shard(shard, load_tokenizer(bpe_dir)).problems[0]


def test_a_source_that_changed_or_went_is_reported(shard, corpus, bpe_dir):
    with (corpus / "b.jsonl").open("a") as file:
        file.write('{"text": "new"}\n')
    (corpus / "a.jsonl").unlink()
    problems = audit_shard(shard, load_tokenizer(bpe_dir)).problems
    assert len(problems) == 2 and all("gone or changed" in problem for problem in problems)


def test_another_tokenizer_cannot_audit(shard, sentencepiece_model):
    with pytest.raises(DataError, match="Give the tokenizer that made it"):
        audit_shard(shard, load_tokenizer(sentencepiece_model))


@pytest.mark.parametrize("provenance", [True, False])
def test_a_document_is_traced_to_file_and_line(corpus, bpe_dir, tmp_path, provenance):
    tokenize(
        [corpus],
        bpe_dir,
        output_prefix=tmp_path / "x",
        options=TokenizeOptions(on_bad_line="skip", provenance=provenance),
    )
    prefix = tmp_path / "x_text_document"
    for document, expected in ((0, ("a.jsonl", 1)), (4, ("a.jsonl", 7)), (9, ("a.jsonl", 12)), (12, ("b.jsonl", 3))):
        origin = trace_document(prefix, document)
        assert (origin.path.rsplit("/", 1)[1], origin.line) == expected
    first = trace_document(prefix, 0).num_tokens
    assert trace_token(prefix, first - 1).document == 0 and trace_token(prefix, first).document == 1
    with pytest.raises(DataError, match="has no document 15"):
        trace_document(prefix, 15)


def test_a_trace_without_sidecar_needs_the_source(shard, corpus):
    (corpus / "a.jsonl").unlink()
    with pytest.raises(DataError, match="--provenance"):
        trace_document(shard, 3)
    assert trace_document(shard, 12).line == 3


def test_merged_parts_equal_the_undivided_run(corpus, bpe_dir, tmp_path):
    options = TokenizeOptions(on_bad_line="skip", provenance=True)
    tokenize([corpus], bpe_dir, output_prefix=tmp_path / "whole/x", options=options)
    for i in range(3):
        tokenize([corpus], bpe_dir, output_prefix=tmp_path / "parts/x", part=(i, 3), options=options)
    output = tmp_path / "parts/x_text_document"
    merge_shards(find_parts(output), output)
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "parts" / path.name).read_bytes() == path.read_bytes(), path.name
    assert audit_shard(output, load_tokenizer(bpe_dir)).problems == []


@pytest.mark.parametrize("count", [2, 5])
def test_any_number_of_parts_gives_the_bytes_of_one_run_also_where_members_have_no_file(
    corpus, bpe_dir, tmp_path, count
):
    write_jsonl(corpus / "empty.jsonl", [])
    tokenize([corpus], bpe_dir, output_prefix=tmp_path / "whole/x", options=TokenizeOptions(on_bad_line="skip"))
    for i in reversed(range(count)):
        tokenize(
            [corpus],
            bpe_dir,
            output_prefix=tmp_path / "parts/x",
            part=(i, count),
            options=TokenizeOptions(on_bad_line="skip"),
        )
    output = tmp_path / "parts/x_text_document"
    parts = find_parts(output)
    merge_shards(parts, output)
    assert find_shards([str(tmp_path / "parts")], Path())[1][0].startswith(f"{output}: is here and its parts are too")
    remove_shards(parts)
    assert find_shards([str(tmp_path / "parts")], Path()) == ([str(output)], [])
    for folder, other in (("whole", "parts"), ("parts", "whole")):
        for path in (tmp_path / folder).iterdir():
            assert (tmp_path / other / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_merge_that_was_killed_goes_on_and_one_that_is_done_is_left(corpus, bpe_dir, tmp_path, monkeypatch):
    for i in range(2):
        tokenize(
            [corpus], bpe_dir, output_prefix=tmp_path / "x", part=(i, 2), options=TokenizeOptions(on_bad_line="skip")
        )
    output = tmp_path / "x_text_document"
    parts = find_parts(output)
    appended = []

    def append(descriptor, path, progress):
        appended.append(path)
        os.write(descriptor, path.read_bytes()[:50] if len(appended) == 2 else path.read_bytes())
        if len(appended) == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    process = multiprocessing.get_context("fork").Process(
        target=lambda: (monkeypatch.setattr(merge, "_append", append), merge_shards(parts, output))
    )
    process.start()
    process.join(30)
    assert process.exitcode == -signal.SIGKILL
    assert not bin_path(output).exists() and not manifest_path(output).exists()
    monkeypatch.setattr(merge, "_append", lambda *words: appended.append(words[1]) or _APPEND(*words))
    manifest = merge_shards(parts, output)
    assert appended == [bin_path(parts[1])]  # the first is on disk
    assert bin_path(output).read_bytes() == b"".join(bin_path(part).read_bytes() for part in parts)
    assert not list(tmp_path.glob(".x*"))
    before = bin_path(output).stat().st_mtime_ns
    assert merge_shards(parts, output) == manifest and bin_path(output).stat().st_mtime_ns == before
    with pytest.raises(DataError, match="exists already, of other shards"):
        merge_shards(parts[:1], output)
    assert merge_shards(parts[:1], output, replace=True)["documents"] < manifest["documents"]
    assert bin_path(output).read_bytes() == bin_path(parts[0]).read_bytes()


def test_parts_that_are_joined_already_are_not_made_again(corpus, bpe_dir, tmp_path):
    for i in range(2):
        tokenize(
            [corpus], bpe_dir, output_prefix=tmp_path / "x", part=(i, 2), options=TokenizeOptions(on_bad_line="skip")
        )
    output = tmp_path / "x_text_document"
    parts = find_parts(output)
    merge_shards(parts, output)
    remove_shards(parts)
    report = tokenize(
        [corpus], bpe_dir, output_prefix=tmp_path / "x", part=(1, 2), options=TokenizeOptions(on_bad_line="skip")
    )
    assert report.num_reused == 1 and list(report.manifests) == [output]
    assert not list(tmp_path.glob("x-*"))


def test_a_full_disk_keeps_what_is_joined_and_says_so(corpus, bpe_dir, tmp_path):
    for i in range(2):
        tokenize(
            [corpus], bpe_dir, output_prefix=tmp_path / "x", part=(i, 2), options=TokenizeOptions(on_bad_line="skip")
        )
    output = tmp_path / "x_text_document"
    parts = find_parts(output)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bin_path(parts[0]).stat().st_size + 9, limits[1]))
    try:
        with pytest.raises(DataError, match="Make room and give the command again"):
            merge_shards(parts, output)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not bin_path(output).exists()
    merge_shards(parts, output)
    assert read_index(output).num_documents == 15


def test_nothing_that_is_there_is_replaced_and_no_source_is_joined_twice(shard, corpus, bpe_dir, tmp_path):
    tokenize([corpus / "a.jsonl"], bpe_dir, output_prefix=tmp_path / "a", options=TokenizeOptions(on_bad_line="skip"))
    with pytest.raises(DataError, match=r"holds .*a.jsonl, which .* holds as well"):
        merge_shards([shard, tmp_path / "a_text_document"], tmp_path / "z")
    tokenize([corpus / "b.jsonl"], bpe_dir, output_prefix=tmp_path / "b", options=TokenizeOptions(on_bad_line="skip"))
    foreign = tmp_path / "z"
    shutil.copy(bin_path(shard), bin_path(foreign))
    with pytest.raises(DataError, match="exists already, without a manifest"):
        merge_shards([tmp_path / "a_text_document", tmp_path / "b_text_document"], foreign)
    assert bin_path(foreign).read_bytes() == bin_path(shard).read_bytes()


def test_adopted_shards_are_merged(corpus, bpe_dir, tmp_path):
    tokenizer = load_tokenizer(bpe_dir)
    prefixes = []
    for name in ("a", "b"):
        tokenize(
            [corpus / f"{name}.jsonl"],
            bpe_dir,
            output_prefix=tmp_path / name,
            options=TokenizeOptions(on_bad_line="skip"),
        )
        prefixes.append(tmp_path / f"{name}_text_document")
        manifest_path(prefixes[-1]).unlink()
        adopt(prefixes[-1], tokenizer, count_bytes=name == "a")
    manifest = merge_shards(prefixes, tmp_path / "z")
    assert (manifest["documents"], manifest["bytes"], manifest["sources"]) == (15, None, [])


def test_shards_of_other_token_types_are_not_merged(corpus, bpe_dir, tmp_path):
    tokenize([corpus], bpe_dir, output_prefix=tmp_path / "a", options=TokenizeOptions(on_bad_line="skip"))
    narrow, wide = tmp_path / "a_text_document", tmp_path / "wide"
    index = read_index(narrow)
    np.fromfile(bin_path(narrow), dtype=np.uint16).astype(np.int32).tofile(bin_path(wide))
    write_index(idx_path(wide), np.dtype(np.int32), index.sequence_lengths)
    manifest_path(narrow).unlink()
    for prefix in (narrow, wide):
        adopt(prefix, load_tokenizer(bpe_dir))
    with pytest.raises(DataError, match="wide: was tokenized with other options"):
        merge_shards([narrow, wide], tmp_path / "z")
    assert not list(tmp_path.glob("*z*"))


def test_missing_parts_are_named(corpus, bpe_dir, tmp_path):
    tokenize([corpus], bpe_dir, output_prefix=tmp_path / "x", part=(1, 3), options=TokenizeOptions(on_bad_line="skip"))
    with pytest.raises(DataError, match="parts 0/3, 2/3 are missing"):
        find_parts(tmp_path / "x_text_document")


def test_shards_that_differ_are_not_merged(shard, corpus, bpe_dir, sentencepiece_model, tmp_path):
    skip = TokenizeOptions(on_bad_line="skip")
    tokenize([corpus], sentencepiece_model, output_prefix=tmp_path / "y", options=skip)
    with pytest.raises(DataError, match="another tokenizer"):
        merge_shards([shard, tmp_path / "y_text_document"], tmp_path / "z")
    tokenize(
        [corpus], bpe_dir, options=TokenizeOptions(append_eod=False, on_bad_line="skip"), output_prefix=tmp_path / "w"
    )
    with pytest.raises(DataError, match="other options"):
        merge_shards([shard, tmp_path / "w_text_document"], tmp_path / "z")
    assert not (tmp_path / "z.bin").exists()


def test_a_damaged_shard_is_not_merged(shard, tmp_path):
    for path in (bin_path(shard), idx_path(shard), manifest_path(shard)):
        shutil.copy(path, tmp_path / path.name.replace("x_", "y_"))
    bin_path(shard).write_bytes(b"\0\0")
    with pytest.raises(DataError, match="its index promises"):
        merge_shards([tmp_path / "y_text_document", shard], tmp_path / "z")


def test_shards_are_named_by_prefix_folder_or_glob(shard, tmp_path):
    assert shard_prefixes([shard]) == shard_prefixes([tmp_path]) == shard_prefixes([f"{tmp_path}/s/*"]) == [shard]
    with pytest.raises(DataError, match="names no shard"):
        shard_prefixes([tmp_path / "none"])
