"""Tokenizers load from folders and files, know their end of document, and engines give the reference's ids."""

import json
import shutil

import numpy as np
import pytest

from megatron_cpt.data.tokenizer import encoders as engines
from megatron_cpt.data.tokenizer.encoders import Engine, EngineRefusal, load_checked_engine, load_engine
from megatron_cpt.data.tokenizer.interface import load_tokenizer, same_tokenizer
from megatron_cpt.data.tokenizer.probe_texts import adversarial_texts
from megatron_cpt.errors import DataError
from tests.data.conftest import SENTENCES, build_bpe, save_tokenizer


def test_a_folder_and_its_tokenizer_json_are_the_same_tokenizer(bpe_dir):
    folder, file = load_tokenizer(bpe_dir), load_tokenizer(bpe_dir / "tokenizer.json")
    assert same_tokenizer(folder.identity, file.identity)
    assert folder.identity.keys() == {"name", "kind", "hash", "vocab_size", "eod_id"}
    assert (folder.eod_id, folder.vocab_size, folder.identity["kind"]) == (0, 500, "huggingface")


def test_ids_equal_transformers_and_carry_no_special_tokens(bpe_dir):
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast(tokenizer_file=str(bpe_dir / "tokenizer.json"))
    expected = theirs(SENTENCES, add_special_tokens=False)["input_ids"]
    tokenizer = load_tokenizer(bpe_dir)
    assert tokenizer.encode_batch(SENTENCES) == expected
    assert [tokenizer.decode(ids) for ids in expected] == SENTENCES


def test_a_template_that_adds_a_first_token_is_not_applied(tmp_path):
    from tokenizers.processors import TemplateProcessing

    tokenizer = build_bpe()
    tokenizer.post_processor = TemplateProcessing(single="<|end_of_text|> $A", special_tokens=[("<|end_of_text|>", 0)])
    loaded = load_tokenizer(save_tokenizer(tokenizer, tmp_path))
    assert 0 not in loaded.encode_batch(["some text"])[0]


def test_added_tokens_count_in_the_vocabulary(tmp_path):
    tokenizer = build_bpe()
    tokenizer.add_tokens(["<new-1>", "<new-2>"])
    assert load_tokenizer(save_tokenizer(tokenizer, tmp_path)).vocab_size == 502


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config.json", {"eos_token": "<eod>"}),
        ("tokenizer_config.json", {"eos_token": {"content": "<eod>", "special": True}}),
        ("special_tokens_map.json", {"eos_token": {"content": "<eod>"}}),
        ("generation_config.json", {"eos_token_id": [500, 3]}),
        ("config.json", {"eos_token_id": 500}),
    ],
)
def test_the_end_of_document_is_found_where_models_write_it(tmp_path, name, content):
    tokenizer = build_bpe()
    tokenizer.add_special_tokens(["<eod>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / name).write_text(json.dumps(content))
    assert load_tokenizer(tmp_path).eod_id == 500
    assert load_tokenizer(tmp_path, "<|end_of_text|>").eod_id == 0


def test_a_lone_tokenizer_json_falls_back_to_the_usual_name_only_when_there_is_one(tmp_path):
    tokenizer = build_bpe()
    tokenizer.save(str(tmp_path / "one.json"))
    assert load_tokenizer(tmp_path / "one.json").eod_id == 0
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(tmp_path / "two.json"))
    with pytest.raises(DataError, match="--eod-token"):
        load_tokenizer(tmp_path / "two.json")


def test_an_unknown_end_of_document_is_an_error(bpe_dir, sentencepiece_model):
    for path in (bpe_dir, sentencepiece_model):
        with pytest.raises(DataError, match="has no token '<nope>'"):
            load_tokenizer(path, "<nope>")


def test_a_sentencepiece_model_gives_sentencepieces_ids(sentencepiece_model, tmp_path):
    import sentencepiece

    backend = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_model))
    tokenizer = load_tokenizer(sentencepiece_model)
    assert tokenizer.encode_batch(SENTENCES) == [backend.encode(text) for text in SENTENCES]
    assert (tokenizer.eod_id, tokenizer.vocab_size) == (2, backend.get_piece_size())
    shutil.copy(sentencepiece_model, tmp_path / "tokenizer.model")
    assert same_tokenizer(load_tokenizer(tmp_path).identity, tokenizer.identity)


def test_missing_and_damaged_tokenizers_are_named(tmp_path):
    with pytest.raises(DataError, match="no such tokenizer"):
        load_tokenizer(tmp_path / "none")
    with pytest.raises(DataError, match="neither tokenizer.json nor tokenizer.model"):
        load_tokenizer(tmp_path)
    for name in ("tokenizer.json", "x.model"):
        (tmp_path / name).write_text("{broken")
        with pytest.raises(DataError, match="not a"):
            load_tokenizer(tmp_path / name)


def reference_ids(tokenizer, texts):
    return [np.array(ids) for ids in tokenizer.encode_batch(texts)]


def split(ids, lengths):
    return np.split(ids, np.cumsum(lengths)[:-1])


@pytest.mark.parametrize("engine", ["gigatoken", "fastokens"])
def test_accelerated_engines_give_the_references_ids(bpe_dir, engine):
    tokenizer = load_tokenizer(bpe_dir)
    loaded = load_checked_engine(tokenizer, engine)
    texts = SENTENCES + ["x" * 3000 + text for text in SENTENCES]
    for found, expected in zip(split(*loaded.encode(texts)), reference_ids(tokenizer, texts), strict=True):
        assert np.array_equal(found, expected)


def test_gigatoken_reads_sentencepiece_bpe_and_takes_control_symbols_for_text(sentencepiece_model):
    tokenizer = load_tokenizer(sentencepiece_model)
    engine = load_checked_engine(tokenizer, "gigatoken")
    texts = ["a </s> b <s>", *SENTENCES]
    for found, expected in zip(split(*engine.encode(texts)), reference_ids(tokenizer, texts), strict=True):
        assert np.array_equal(found, expected)


def test_a_unigram_model_is_refused_by_the_accelerated_engines(unigram_model):
    tokenizer = load_tokenizer(unigram_model)
    for name in ("gigatoken", "fastokens"):
        with pytest.raises(EngineRefusal):
            load_engine(tokenizer, name)
    assert len(load_engine(tokenizer, "reference").encode(SENTENCES)[1]) == len(SENTENCES)


def test_the_adversarial_set_catches_the_known_differences_of_gigatoken(tmp_path):
    from tokenizers import AddedToken, normalizers

    with_nfc = build_bpe(normalizer=normalizers.NFC())
    with_strip = build_bpe()
    with_strip.add_tokens([AddedToken("<mark>", lstrip=True, rstrip=True)])
    for name, tokenizer in (("nfc", with_nfc), ("strip", with_strip)):
        loaded = load_tokenizer(save_tokenizer(tokenizer, tmp_path / name))
        try:
            engine = load_checked_engine(loaded, "gigatoken")
        except EngineRefusal:
            continue
        texts = [
            f"{a}{b}{c}" for a in ("a ", "e\u0301") for b in ("<mark>", "\u212b", "\u0323\u0301") for c in ("  b", "")
        ]
        for found, expected in zip(split(*engine.encode(texts)), reference_ids(loaded, texts), strict=True):
            assert np.array_equal(found, expected), name


def test_a_lying_engine_is_caught_by_both_checks(bpe_dir, monkeypatch):
    tokenizer = load_tokenizer(bpe_dir)
    reference = engines._reference_encoder(tokenizer)

    def lying(_):
        def encode(texts):
            ids, lengths = reference(texts)
            return np.where(ids == ids.max(), ids - 1, ids), lengths

        return encode

    monkeypatch.setitem(engines._ENCODERS, "gigatoken", lying)
    with pytest.raises(EngineRefusal, match="gives other ids"):
        load_checked_engine(tokenizer, "gigatoken")
    engine = load_engine(tokenizer, "gigatoken")
    text = [SENTENCES[0]]
    assert engine.sample_difference(text, *engine.encode(text), 0) is not None


@pytest.mark.parametrize("kind", ["bpe_dir", "sentencepiece_model"])
def test_a_long_document_is_encoded_in_parts_with_the_ids_of_the_whole(kind, request, monkeypatch):
    monkeypatch.setattr(engines, "LONG_DOCUMENT_CHARACTERS", 2000)
    tokenizer = load_tokenizer(request.getfixturevalue(kind))
    engine = Engine("reference", tokenizer)
    text = "\n".join(SENTENCES * 30)
    parts = list(engine._parts(text))
    assert len(parts) > 3 and max(map(len, parts)) <= 3000
    ids, lengths = engine.encode(["short", text, "also short"])
    expected = reference_ids(tokenizer, ["short", text, "also short"])
    for found, whole in zip(split(ids, lengths), expected, strict=True):
        assert np.array_equal(found, whole)


def test_a_long_document_without_a_harmless_cut_stays_whole(bpe_dir, monkeypatch):
    monkeypatch.setattr(engines, "LONG_DOCUMENT_CHARACTERS", 1000)
    text = "a" * 5000
    assert list(Engine("reference", load_tokenizer(bpe_dir))._parts(text)) == [text]


def test_the_adversarial_set_is_fixed_and_holds_the_tokenizers_own_tokens(bpe_dir):
    tokenizer = load_tokenizer(bpe_dir)
    texts = adversarial_texts(tokenizer)
    assert texts == adversarial_texts(tokenizer)
    assert len(texts) > 2500 and any("<|end_of_text|>" in text for text in texts)
