"""Control tokens in texts, BOS, and documents without tokens: one rule each in tokenize, audit, trace, merge and adopt."""

import itertools
import json
from collections import Counter

import numpy as np
import pytest

from megatron_cpt.data.audit.shards import audit_shard
from megatron_cpt.data.audit.trace import trace_document
from megatron_cpt.data.joining.merge import find_parts, merge_shards
from megatron_cpt.data.shards.adopt import adopt
from megatron_cpt.data.shards.discovery import content_problems
from megatron_cpt.data.shards.indexed import (
    bin_path,
    document_bounds,
    idx_path,
    manifest_path,
    read_index,
    read_shard_manifest,
    read_tokens,
    write_index,
)
from megatron_cpt.data.tokenize.driver import tokenize
from megatron_cpt.data.tokenize.options import TokenizeOptions
from megatron_cpt.data.tokenizer.control_tokens import ControlTokens
from megatron_cpt.data.tokenizer.interface import load_tokenizer
from megatron_cpt.errors import DataError
from tests.data.conftest import SENTENCES, build_bpe, save_tokenizer

EOD = "<|end_of_text|>"
TEXTS = [
    SENTENCES[0],
    f"a page that quotes {EOD} and {EOD}once more",
    SENTENCES[2],
    f"{EOD}",
    "a chat <|im_start|>user",
    "<think>text</think>",
    SENTENCES[4],
    "a pipe | and <| and |> and a < b",
]


@pytest.fixture
def folder(tmp_path):
    """A tokenizer with control tokens, an added token that is none, and a post-processor that puts BOS before a text."""
    from tokenizers import AddedToken
    from tokenizers.processors import TemplateProcessing

    tokenizer = build_bpe()
    tokenizer.add_special_tokens(["<bos>", "<|im_start|>"])
    tokenizer.add_tokens([AddedToken("<think>", normalized=False)])
    tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 500)])
    return save_tokenizer(tokenizer, tmp_path / "tokenizer")


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


def ids_of(folder, texts, *, is_text):
    """Return ids by the library itself: control tokens as text, or as tokens."""
    from tokenizers import Tokenizer

    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.encode_special_tokens = is_text
    return [backend.encode(text, add_special_tokens=False).ids for text in texts]


def documents_of(prefix):
    index = read_index(prefix)
    bounds, tokens = document_bounds(index), read_tokens(index)
    return [tokens[start:end].tolist() for start, end in itertools.pairwise(bounds)]


def make(corpus, folder, output, *, workers=1, part=None, **options):
    chosen = TokenizeOptions(**{"bos": "off", **options})
    tokenize([corpus], folder, output_prefix=output, options=chosen, workers=workers, part=part)
    return output.with_name(output.name + "_text_document")


@pytest.mark.parametrize("engine", ["reference", "fastokens", "gigatoken", "auto"])
@pytest.mark.parametrize("how", ["text", "token"])
def test_a_control_token_in_a_text_is_text_or_the_token(how, engine, corpus, folder, tmp_path):
    prefix = make(corpus, folder, tmp_path / "s", special_tokens=how, engine=engine)
    expected = [[*ids, 0] for ids in ids_of(folder, TEXTS, is_text=how == "text")]
    assert documents_of(prefix) == expected
    assert any(0 in ids[:-1] for ids in expected) == (how == "token")
    manifest = read_shard_manifest(prefix)
    assert manifest["options"]["special_tokens"] == how
    assert manifest["control_tokens"] == {EOD: 3, "<|im_start|>": 1}
    assert manifest["notes"]["control token in a text"] == 3
    audit = audit_shard(prefix, load_tokenizer(folder), None)
    assert not audit.problems and audit.control_tokens == 3 and audit.samples == len(TEXTS)


def test_text_is_the_default_and_the_user_is_warned(corpus, folder, tmp_path, caplog):
    report = tokenize([corpus], folder, output_prefix=tmp_path / "s", options=TokenizeOptions(bos="off"))
    assert documents_of(tmp_path / "s_text_document") == [[*i, 0] for i in ids_of(folder, TEXTS, is_text=True)]
    assert "3 documents spell control tokens" in caplog.text
    assert "control tokens in the texts: <|end_of_text|> 3" in str(report)


def test_documents_that_spell_a_control_token_are_bad_lines_on_request(corpus, folder, tmp_path):
    with pytest.raises(DataError, match=r"x\.jsonl:2: control token in a text .*end_of_text"):
        make(corpus, folder, tmp_path / "f", special_tokens="reject")
    prefix = make(corpus, folder, tmp_path / "s", special_tokens="reject", on_bad_line="skip", workers=2)
    kept = [text for text in TEXTS if EOD not in text and "<|im_start|>" not in text]
    assert documents_of(prefix) == [[*ids, 0] for ids in ids_of(folder, kept, is_text=True)]
    manifest = read_shard_manifest(prefix)
    assert manifest["rejects"] == {"control token in a text": 3} and manifest["lines"] == len(TEXTS)
    rejected = [json.loads(line) for line in (tmp_path / "s.rejects.jsonl").read_text().splitlines()]
    assert [entry["line"] for entry in rejected] == [2, 4, 5]
    assert json.loads(rejected[0]["raw"]) == {"text": TEXTS[1]}
    assert not audit_shard(prefix, load_tokenizer(folder), None).problems
    with pytest.raises(DataError, match="Give --tokenizer"):
        trace_document(prefix, 2)
    assert [trace_document(prefix, i, load_tokenizer(folder)).line for i in range(5)] == [1, 3, 6, 7, 8]


def test_the_audit_notices_that_a_manifest_tells_of_other_control_tokens(corpus, folder, tmp_path):
    prefix = make(corpus, folder, tmp_path / "s")
    manifest = read_shard_manifest(prefix)
    manifest["options"]["special_tokens"] = "token"
    manifest_path(prefix).write_text(json.dumps(manifest))
    assert any(
        "is not what its source gives" in text for text in audit_shard(prefix, load_tokenizer(folder), None).problems
    )
    manifest["options"]["special_tokens"] = "text"
    manifest["sources"][0]["notes"].clear()
    manifest_path(prefix).write_text(json.dumps(manifest))
    (problem,) = audit_shard(prefix, load_tokenizer(folder)).problems
    assert "holds 3 texts with control tokens; the manifest counts 0" in problem


def test_sentencepiece_reads_control_symbols_as_text_and_refuses_to_do_otherwise(corpus, sentencepiece_model, tmp_path):
    corpus.write_text(json.dumps({"text": "a </s> b"}) + "\n")
    prefix = make(corpus, sentencepiece_model, tmp_path / "s")
    assert 2 not in documents_of(prefix)[0][:-1]
    assert read_shard_manifest(prefix)["control_tokens"] == {"</s>": 1}
    with pytest.raises(DataError, match="reads control symbols in a text as text"):
        make(corpus, sentencepiece_model, tmp_path / "t", special_tokens="token")


@pytest.mark.parametrize("names", [["<|a|>", "<|b|>"], ["</s>", "<s>", "<s>x"], ["[INST]", "[/INST]", "▁", "EOD"], []])
def test_control_tokens_are_counted_as_a_plain_search_does(names):
    import random
    import re

    numbers = random.Random(0)
    pieces = [*names, "<", "|", ">", "<s", "a", " ", "[", "語", "EO"]
    texts = ["".join(numbers.choices(pieces, k=numbers.randrange(12))) for _ in range(500)]
    control = ControlTokens(names)
    pattern = re.compile("|".join(re.escape(name) for name in sorted(names, key=len, reverse=True)) or r"(?!)")
    expected = Counter(name for text in texts for name in pattern.findall(text))
    documents, counts = control.count(texts)
    if not any(a != b and a in b for a in names for b in names):
        assert counts == expected
    assert documents == sum(bool(pattern.search(text)) for text in texts)


BOS = {"auto": [500], "on": [500], "off": []}


@pytest.mark.parametrize("bos", BOS)
@pytest.mark.parametrize("append_eod", [True, False])
def test_bos_begins_each_document_as_the_post_processor_says(bos, append_eod, corpus, folder, tmp_path, monkeypatch):
    from megatron_cpt.data.tokenize import workers

    end = [0] if append_eod else []
    expected = [[*BOS[bos], *ids, *end] for ids in ids_of(folder, TEXTS, is_text=True)]
    for length in (0, 1 << 11):  # by parts, and with a mask
        monkeypatch.setattr(workers, "_LONG_DOCUMENT_TOKENS", length)
        prefix = make(corpus, folder, tmp_path / f"s{length}", bos=bos, append_eod=append_eod)
        assert documents_of(prefix) == expected
        assert read_shard_manifest(prefix)["options"]["bos_ids"] == BOS[bos]
        audit = audit_shard(prefix, load_tokenizer(folder), None)
        assert not audit.problems and audit.samples == len(TEXTS) and audit.inner_eod == 0


def test_bos_that_is_missing_is_found_and_one_that_nobody_names_is_refused(corpus, folder, bpe_dir, tmp_path):
    prefix = make(corpus, folder, tmp_path / "s", bos="auto")
    ids = np.fromfile(bin_path(prefix), np.uint16)
    ids[0] = 7
    ids.tofile(bin_path(prefix))
    assert "1 documents do not begin with token 500" in audit_shard(prefix, load_tokenizer(folder), 0).problems
    with pytest.raises(DataError, match="names no bos_token"):
        make(corpus, bpe_dir, tmp_path / "t", bos="on")


def test_shards_of_release_0_1_stay_valid_and_go_on_as_they_began(corpus, folder, tmp_path, caplog):
    """Their manifests tell neither of control tokens nor of BOS: tokens, and none."""
    prefix = make(corpus, folder, tmp_path / "s", special_tokens="token")
    manifest = read_shard_manifest(prefix)
    for name in ("special_tokens", "bos_ids"):
        del manifest["options"][name]
    for entry in (manifest, manifest["sources"][0]):
        entry.pop("control_tokens", None)
        entry.pop("checksums", None)
        entry.pop("without_tokens", None)
        entry["notes"].pop("control token in a text", None)
    manifest_path(prefix).write_text(json.dumps(manifest))
    assert not audit_shard(prefix, load_tokenizer(folder), None).problems
    assert content_problems([str(prefix)]) == []
    report = tokenize([corpus], folder, output_prefix=tmp_path / "s")
    assert report.num_reused == 1 and "earlier release" in caplog.text
    assert read_shard_manifest(prefix) == manifest
    with pytest.raises(DataError, match="special_tokens='token', not 'text'"):
        tokenize([corpus], folder, output_prefix=tmp_path / "s", options=TokenizeOptions(special_tokens="text"))


@pytest.fixture
def stripping(tmp_path):
    """A tokenizer for which white space is nothing."""
    from tokenizers import normalizers

    return save_tokenizer(build_bpe(normalizer=normalizers.Strip()), tmp_path / "stripping")


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("provenance", [True, False])
def test_a_text_without_tokens_is_no_document_under_any_key(provenance, workers, stripping, tmp_path):
    rows = [
        ("one", "eins"),
        ("", "zwei"),
        ("three", ""),
        ("", ""),
        (" \t ", "fünf"),
        ("six", "   "),
        ("seven", "sieben"),
    ]
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps({"en": en, "de": de}) + "\n" for en, de in rows))
    tokenize(
        [path],
        stripping,
        output_prefix=tmp_path / "s",
        options=TokenizeOptions(keys=["en", "de"], provenance=provenance),
        workers=workers,
    )
    tokenizer = load_tokenizer(stripping)
    for place, key in enumerate(("en", "de")):
        prefix = tmp_path / f"s_{key}_document"
        kept = [(line, row[place]) for line, row in enumerate(rows, 1) if row[place].strip()]
        assert documents_of(prefix) == [[*ids, 0] for ids in tokenizer.encode_batch([text for _, text in kept])]
        manifest = read_shard_manifest(prefix)
        assert manifest["documents"] == len(kept)
        assert manifest["notes"]["empty text"] == len(rows) - len(kept)
        assert manifest["sources"][0]["without_tokens"] == 1
        assert not audit_shard(prefix, tokenizer, None).problems
        lines = [trace_document(prefix, i, tokenizer).line for i in range(len(kept))]
        assert lines == [line for line, _ in kept]


def test_the_strict_policy_stops_at_a_text_without_tokens(stripping, tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "one"}\n{"text": "  "}\n')
    with pytest.raises(DataError, match=r"x\.jsonl:2: empty text"):
        tokenize([path], stripping, output_prefix=tmp_path / "s", options=TokenizeOptions(on_bad_line="strict"))


def test_joined_parts_have_the_sums_of_the_whole(folder, tmp_path):
    path = tmp_path / "many.jsonl"
    path.write_text("".join(json.dumps({"text": f"{i} {TEXTS[i % 8]}"}) + "\n" for i in range(400)))
    for i in range(3):
        tokenize([path], folder, output_prefix=tmp_path / "s", part=(i, 3))
    joined = merge_shards(find_parts(tmp_path / "s_text_document"), tmp_path / "s_text_document")
    whole = read_shard_manifest(make(path, folder, tmp_path / "w", bos="auto", workers=2))
    assert joined["checksums"] == whole["checksums"] and joined["control_tokens"] == whole["control_tokens"]


def test_a_flipped_bit_of_the_tokens_is_found(corpus, folder, tmp_path):
    prefix = make(corpus, folder, tmp_path / "s")
    data = bin_path(prefix).read_bytes()
    tokenizer = load_tokenizer(folder)
    for place in range(0, len(data), 7):
        changed = bytearray(data)
        changed[place] ^= 1 << place % 8
        bin_path(prefix).write_bytes(changed)
        assert any("checksum differs" in problem for problem in audit_shard(prefix, tokenizer, 0).problems)
        (problem,) = content_problems([str(prefix)])  # a file of one block is read whole
        assert "holds other tokens than were written" in problem


def write_like_megatron_lm(prefix, documents):
    """Write what its preprocess_data.py writes: a document without sequences for an empty text."""
    np.concatenate([np.array(ids, np.int32) for ids in documents]).tofile(bin_path(prefix))
    ends = np.cumsum([0, *(bool(ids) for ids in documents)])
    write_index(idx_path(prefix), np.dtype(np.int32), np.array([len(ids) for ids in documents if ids]), ends)


@pytest.mark.parametrize("as_sequence", [True, False])
def test_a_shard_with_an_empty_document_is_adopted(as_sequence, bpe_dir, tmp_path):
    tokenizer = load_tokenizer(bpe_dir)
    documents = [[5, 6, 0], [], [7, 0], [], []]
    prefix = tmp_path / "a_text_document"
    if as_sequence:
        np.array([5, 6, 0, 7, 0], np.int32).tofile(bin_path(prefix))
        write_index(idx_path(prefix), np.dtype(np.int32), np.array([3, 0, 2, 0, 0]))
    else:
        write_like_megatron_lm(prefix, documents)
    manifest = adopt(prefix, tokenizer, count_bytes=True)
    assert (manifest["documents"], manifest["tokens"], manifest["notes"]) == (5, 5, {"empty text": 3})
    assert manifest["options"]["append_eod"]
    audit = audit_shard(prefix, tokenizer)
    assert audit.is_adopted and not audit.problems and audit.inner_eod == 0
    write_like_megatron_lm(tmp_path / "b", [[5, 0], [], [6]])
    with pytest.raises(DataError, match="1 of 3 documents do not end"):
        adopt(tmp_path / "b", tokenizer)
