import math

import numpy as np
import pytest
import torch

from megatron_cpt.errors import CheckpointError, DataError
from megatron_cpt.evaluate.models.language_model import loaded_model
from megatron_cpt.evaluate.models.perplexity import (
    batches,
    document_nats,
    document_windows,
    measure_perplexity,
    ratio_interval,
)
from megatron_cpt.evaluate.models.texts import TextSet, read_text_set
from tests.tolerances import assert_fp32_rounding

TEXTS = ["the cat sat on the mat and saw another cat that was not on any mat at all", "a", "déjà vu"]


@pytest.fixture
def model(tiny_model):
    with loaded_model("tiny", tiny_model) as loaded:
        yield loaded


def reference_nats(model, tokens, context, stride):
    """Score token by token, each with the context that its window gives it."""
    tokens = [model.start_id, *tokens]
    total, scored = 0.0, 0
    while scored < len(tokens) - 1:
        end = min(scored + (stride if scored else context), len(tokens) - 1)
        start = max(scored + stride - context, 0)
        for position in range(scored + 1, end + 1):
            logits = model.model(torch.tensor([tokens[start:position]])).logits[0, -1].double()
            total -= logits.log_softmax(-1)[tokens[position]].item()
        scored = end
    return total


@pytest.mark.parametrize(("context", "stride"), [(32, 32), (16, 16), (16, 5)])
def test_every_token_is_scored_once_with_the_context_of_its_window(model, context, stride):
    documents = model.encode(TEXTS)
    with torch.inference_mode():
        expected = [reference_nats(model, tokens, context, stride) for tokens in documents]
    assert_fp32_rounding(document_nats(model, documents, context=context, stride=stride), expected)


@pytest.mark.parametrize("length", [2, 9, 10, 11, 20, 21, 57])
@pytest.mark.parametrize("stride", [1, 3, 10])
def test_windows_cover_a_document_without_gap_or_overlap_in_what_is_scored(length, stride):
    windows = document_windows(0, list(range(length)), 10, stride)
    scored = [token for window in windows for token in window.tokens[len(window.tokens) - window.num_scored :]]
    assert scored == list(range(1, length))
    assert all(len(window.tokens) <= 11 for window in windows)
    assert all(len(window.tokens) > window.num_scored for window in windows)


def test_bits_per_byte_are_bits_of_all_tokens_over_utf8_bytes(model):
    result = measure_perplexity(model, TextSet("mixed", TEXTS))
    nats = document_nats(model, model.encode(TEXTS), context=32, stride=32).sum()
    assert result.bytes == sum(len(text.encode()) for text in TEXTS)
    assert_fp32_rounding(
        result.bits_per_byte, nats / math.log(2) / result.bytes
    )  # measured twice, in batches of another form
    assert result.low <= result.bits_per_byte <= result.high
    assert result.start_token == "eos <|endoftext|>"


def test_batches_hold_no_more_than_asked_after_padding():
    windows = document_windows(0, list(range(1000)), 100, 100) + document_windows(1, list(range(30)), 100, 100)
    windows.sort(key=lambda window: len(window.tokens), reverse=True)
    groups = batches(windows, 350)
    assert [window for group in groups for window in group] == windows
    assert all(len(group) * len(group[0].tokens) <= 350 for group in groups)


def test_the_interval_narrows_with_documents_and_holds_the_mean():
    generator = np.random.default_rng(3)
    sizes = generator.integers(100, 1000, 400)
    bits = sizes * generator.normal(2.0, 0.3, 400)
    few, many = ratio_interval(bits[:20], sizes[:20]), ratio_interval(bits, sizes)
    assert many[1] - many[0] < (few[1] - few[0]) / 2
    assert many[0] < 2.0 < many[1]


def test_text_sets_come_from_compressed_files_and_skip_empty_documents(tmp_path):
    import json

    import zstandard

    lines = "".join(json.dumps({"text": text}) + "\n" for text in ["one", "  ", "two"])
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(lines.encode()))
    (tmp_path / "b.txt").write_text("three\nfour\n")
    assert read_text_set("all", [tmp_path]).documents == ["one", "two", "three", "four"]
    assert read_text_set("all", [tmp_path], max_documents=3).documents == ["one", "two", "three"]


def test_a_bad_line_is_named_with_its_file_and_number(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\nnot json\n')
    with pytest.raises(DataError, match=r"a\.jsonl:2: invalid JSON"):
        read_text_set("a", [tmp_path / "a.jsonl"])


def test_a_set_without_text_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": " "}\n')
    with pytest.raises(DataError, match="no text"):
        read_text_set("a", [tmp_path / "a.jsonl"])


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="neither config.json nor"), loaded_model("x", tmp_path):
        pass


def test_a_model_without_a_tokenizer_is_refused_by_name(tiny_model, tmp_path):
    import shutil

    shutil.copytree(tiny_model, tmp_path / "m", ignore=shutil.ignore_patterns("tokenizer*"))
    with pytest.raises(CheckpointError, match="no tokenizer"), loaded_model("x", tmp_path / "m"):
        pass
    with loaded_model("x", tmp_path / "m", tokenizer_path=tiny_model) as model:
        assert model.encode(["ab"]) == [[*model.encode(["a"])[0], *model.encode(["b"])[0]]]


def test_a_megatron_checkpoint_scores_as_its_hugging_face_model(tiny_model, model, tmp_path):
    from megatron_cpt.checkpoint.convert.hf_mcore import hf_to_mcore

    hf_to_mcore(tiny_model, tmp_path / "mcore")
    expected = measure_perplexity(model, TextSet("t", TEXTS)).document_nats
    with loaded_model("mcore", tmp_path / "mcore", tokenizer_path=tiny_model) as converted:
        assert measure_perplexity(converted, TextSet("t", TEXTS)).document_nats == expected
