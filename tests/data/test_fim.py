"""Fill in the middle: the two orders, how often, and that nothing but the sentinels' room is lost."""

import dataclasses
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_cpt.config.settings.schema import DataConfig, PathsConfig
from megatron_cpt.data.blend.fim import FillInMiddle, fill_in_middle
from megatron_cpt.data.tokenizer.interface import load_tokenizer
from megatron_cpt.errors import DataError
from tests.data.test_blend import run_config
from tests.tolerances import assert_estimate

EOD, PRE, MID, SUF = 0, 1, 2, 3


class NoText:
    """A tokenizer whose tokens are no text, so that cuts fall between tokens."""

    def decode(self, ids):
        return "\ufffd" * len(ids)

    def encode_batch(self, texts):
        return [[1] * len(text) for text in texts]


def fim(rate=1.0, spm_rate=0.0, tokenizer=None, **other):
    return FillInMiddle(
        rate=rate, spm_rate=spm_rate, seed=1, corpora=(), tokenizer=tokenizer or NoText(),
        **({"prefix": PRE, "middle": MID, "suffix": SUF, "eod": EOD} | other),
    )  # fmt: skip


CODE = "def tokenise(größe: int) -> str:\n    return f'{größe} 語' * 3  # naïve\n" * 3


def with_sentinels(tokenizer):
    """Return the settings for a tokenizer, with ids beyond its own as sentinels."""
    size = tokenizer.vocab_size
    return {"prefix": size, "middle": size + 1, "suffix": size + 2, "eod": tokenizer.eod_id, "tokenizer": tokenizer}


def text_parts(ids, settings):
    """Return the texts of prefix, middle and suffix of a rearranged document in PSM order, and their ids."""
    places = [int(np.flatnonzero(ids == settings[part])[0]) for part in ("prefix", "suffix", "middle")]
    prefix, suffix, middle = (part[1:] for part in np.split(ids, places)[1:])
    return [settings["tokenizer"].decode(part) for part in (prefix, middle, suffix)], (prefix, middle, suffix)


def test_cuts_fall_between_characters_and_parts_are_tokenized_as_prompts_are(bpe_dir):
    tokenizer = load_tokenizer(bpe_dir)
    settings = with_sentinels(tokenizer)
    (document,) = map(np.array, tokenizer.encode_batch([CODE]))
    starts, inside = set(np.cumsum([len(tokenizer.decode([id])) for id in document]).tolist()), 0
    for sample in range(40):
        ids = fim(**settings).rearrange(document, "s", sample)
        assert len(ids) == len(document)
        (prefix, middle, suffix), (prefix_ids, middle_ids, _) = text_parts(ids, settings)
        kept = (prefix + middle + suffix).rstrip("\ufffd")  # the end may be cut within a character
        assert CODE.startswith(kept) and len(tokenizer.encode_batch([CODE[len(kept) :]])[0]) <= 12
        if suffix:  # nothing was cut off these
            assert [prefix_ids.tolist(), middle_ids.tolist()] == tokenizer.encode_batch([prefix, middle])
        inside += len(prefix) not in starts
    assert inside > 10


def test_a_sample_that_begins_within_a_character_is_cut_between_tokens(bpe_dir):
    tokenizer = load_tokenizer(bpe_dir)
    settings = with_sentinels(tokenizer)
    (whole,) = map(np.array, tokenizer.encode_batch(["語" + CODE]))
    document = whole[1:]
    assert tokenizer.decode(document).startswith("\ufffd")
    for sample in range(10):
        _, ids = text_parts(fim(**settings).rearrange(document, "s", sample), settings)
        assert np.array_equal(np.concatenate(ids), document[:-3])


def test_sentencepiece_puts_no_space_into_a_word(sentencepiece_model):
    tokenizer = load_tokenizer(sentencepiece_model)
    settings = with_sentinels(tokenizer)
    (document,) = map(np.array, tokenizer.encode_batch(["the cat sat on the mat and looked at the other cats"]))
    for sample in range(20):
        _, ids = text_parts(fim(**settings).rearrange(document, "s", sample), settings)
        joined = np.concatenate(ids)
        assert tokenizer.decode(document).startswith(tokenizer.decode(joined))


def parts(ids):
    """Return what follows each sentinel, by its id."""
    places = [int(np.flatnonzero(ids == sentinel)[0]) for sentinel in (PRE, MID, SUF)]
    bounds = [*sorted(places), len(ids)]
    return {int(ids[place]): ids[place + 1 : bounds[bounds.index(place) + 1]].tolist() for place in places}


def test_psm_is_prefix_suffix_middle():
    document = np.arange(10, 50)
    for sample in range(20):
        ids = fim().rearrange(document, "s", sample)
        found = parts(ids)
        assert [int(token) for token in ids if token in (PRE, MID, SUF)] == [PRE, SUF, MID]
        assert found[PRE] + found[MID] + found[SUF] == document[:-3].tolist()


def test_spm_is_suffix_prefix_middle():
    document = np.arange(10, 50)
    for sample in range(20):
        ids = fim(spm_rate=1.0).rearrange(document, "s", sample)
        found = parts(ids)
        assert ids[0] == PRE and ids[1] == SUF and not found[PRE]
        assert found[MID] + found[SUF] == document[:-3].tolist()  # prefix and middle follow <middle> together


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(0, 30), min_size=1, max_size=8), sample=st.integers(0, 10**6), spm=st.booleans())
def test_length_document_ends_and_tokens_stay(lengths, sample, spm):
    rng = np.random.default_rng(sum(lengths))
    documents = [rng.integers(10, 1000, length) for length in lengths]
    ids = np.concatenate([np.append(document, EOD) for document in documents])[:-1]
    result = fim(spm_rate=float(spm)).rearrange(ids, "s", sample)
    assert len(result) == len(ids) and np.array_equal(result == EOD, ids == EOD)
    for before, after in zip(np.split(ids, ends(ids)), np.split(result, ends(ids)), strict=True):
        real = [token for token in after if token not in (EOD, PRE, MID, SUF)]
        kept = [token for token in before if token != EOD]
        is_changed = len(real) < len(kept)
        assert Counter(real) == Counter(kept[:-3] if is_changed else kept)


def ends(ids):
    return np.flatnonzero(ids == EOD) + 1


def test_the_rates_hold():
    ids = np.tile(np.append(np.arange(10, 20), EOD), 4000)
    result = fim(rate=0.5, spm_rate=0.25).rearrange(ids, "s", 0)
    starts = np.concatenate([[0], ends(ids)[:-1]])
    chosen = result[starts] == PRE
    empty_prefix = 1 - (7 / 8) ** 2  # PSM with a cut at the first of 8 places begins as SPM does
    assert_estimate(chosen.mean(), 0.5, deviation=0.5, draws=4000)
    is_spm = (result[starts + 1] == SUF)[chosen]
    assert_estimate(is_spm.mean(), 0.25 + 0.75 * empty_prefix, deviation=0.5, draws=len(is_spm))


def test_the_same_sample_is_rearranged_alike_and_another_one_differently():
    document = np.arange(10, 500)
    assert np.array_equal(fim().rearrange(document, "a/s", 5), fim().rearrange(document, "b/s", 5))
    assert not np.array_equal(fim().rearrange(document, "s", 5), fim().rearrange(document, "s", 6))


def test_a_corpus_that_is_not_named_stays():
    settings = dataclasses.replace(fim(), corpora=("code",))
    assert settings.applies_to("code") and not settings.applies_to("text")
    assert fim().applies_to("text")


def test_a_sentinel_that_the_tokenizer_lacks_is_named(tmp_path, bpe_dir):
    config = run_config(tmp_path, mix={}, corpora={})
    tokens = {"fim_prefix_token": "Ġ", "fim_middle_token": "<|fim_middle|>", "fim_suffix_token": "!"}
    data = DataConfig(tokenizer=str(bpe_dir), fim_rate=0.5, **tokens)
    config = dataclasses.replace(config, data=data, paths=PathsConfig(data_dir="/"))
    with pytest.raises(DataError, match=r"data.fim_middle_token: .* has no token '<|fim_middle|>'"):
        fill_in_middle(config, load_tokenizer(bpe_dir))
    config = dataclasses.replace(config, data=dataclasses.replace(data, fim_middle_token="."))
    tokenizer = load_tokenizer(bpe_dir)
    found = fill_in_middle(config, tokenizer)
    assert tokenizer.decode([found.middle, found.suffix]) == ".!" and found.eod == tokenizer.eod_id


def test_sentencepiece_tokens_are_found_by_name(sentencepiece_model):
    from megatron_cpt.data.tokenizer.interface import token_id

    tokenizer = load_tokenizer(sentencepiece_model)
    assert token_id(tokenizer, "</s>") == tokenizer.eod_id
    assert token_id(tokenizer, "<|no_such_token|>") is None


def test_what_begins_a_document_keeps_its_place():
    bos, body = (7, 8), np.arange(10, 30)
    ids = np.concatenate([body[:5], [EOD], bos, body, [EOD], bos, body[:7]])
    found = fim(bos=bos).rearrange(ids, "s", 0)
    assert len(found) == len(ids)
    first, second, third = np.split(found, np.flatnonzero(found == EOD) + 1)
    assert first.tolist() == [*body[:5], EOD]  # the rest of a document that began in another sample, and too short
    for part in (second, third):
        assert part[:3].tolist() == [*bos, PRE]
        assert not {7, 8} & set(part[2:].tolist())
