"""Vocabulary extension: new rows by three methods, old logits unchanged."""

import itertools
import json

import pytest
import torch
from tokenizers import Tokenizer, models

from megatron_cpt.checkpoint.convert.hf_mcore import hf_to_mcore, mcore_to_hf
from megatron_cpt.checkpoint.huggingface.folder import HFFolder
from megatron_cpt.checkpoint.huggingface.vocabulary import VocabExtension, subtokens_of_new_tokens
from megatron_cpt.errors import CheckpointError
from tests.tolerances import assert_estimate, assert_fp32_rounding


def extended(source, tmp_path, extension):
    """Return a folder converted there and back with an extension."""
    name = extension.method
    return mcore_to_hf(
        hf_to_mcore(source, tmp_path / f"m-{name}", extension=extension, verify=True), tmp_path / f"hf-{name}"
    )


@pytest.mark.parametrize("method", ["mean", "noise"])
def test_logits_of_old_tokens_stay_as_they_were(hf_models, tmp_path, method):
    from transformers import AutoModelForCausalLM

    source = hf_models("llama")
    output = extended(source, tmp_path, VocabExtension(vocab_size=140, method=method))
    assert json.loads((output / "config.json").read_text())["vocab_size"] == 140
    tokens = torch.arange(20).reshape(1, 20)
    with torch.no_grad():
        before, after = (AutoModelForCausalLM.from_pretrained(path)(tokens).logits for path in (source, output))
    assert after.shape[-1] == 140
    assert_fp32_rounding(after[..., :130], before, of_largest=True)
    embedding, old = (HFFolder(path).read("model.embed_tokens.weight") for path in (output, source))
    assert torch.equal(embedding[:130], old)
    mean = old.mean(0)
    if method == "mean":
        assert_fp32_rounding(embedding[130:], mean.expand(10, -1), of_largest=True)
        return
    distance = (embedding[130:] - mean).norm(dim=1)
    assert ((distance > 1e-6) & (distance < 0.1 * old.norm(dim=1).mean())).all()


def test_noise_has_the_covariance_of_the_old_rows():
    old = torch.randn(500, 3, generator=torch.Generator().manual_seed(1)) @ torch.tensor(
        [[3.0, 0, 0], [1, 1, 0], [0, 0, 0.1]]
    )
    rows = VocabExtension(vocab_size=20_500, method="noise").new_rows(old, "x")
    covariance = old.T.cov(correction=0)
    deviations = covariance.diagonal().sqrt()
    for row, column in itertools.product(range(3), repeat=2):
        deviation = float(deviations[row] * deviations[column]) * 2**0.5  # of a product of two normal values, at most
        found = float(rows.T.cov()[row, column]) * 1e5
        assert_estimate(found, float(covariance[row, column]), deviation=deviation, draws=len(rows))


def test_subtokens_average_the_rows_that_spell_the_new_token(hf_models, tmp_path):
    vocabulary = {token: number for number, token in enumerate(["a", "b", "c"])}
    merges = [("a", "b")]
    Tokenizer(models.BPE(vocabulary, [])).save(str(tmp_path / "old.json"))
    Tokenizer(models.BPE({**vocabulary, "ab": 130}, merges)).save(str(tmp_path / "new.json"))
    subtokens = subtokens_of_new_tokens(tmp_path / "old.json", tmp_path / "new.json", 130)
    assert subtokens == {130: [0, 1]}
    output = extended(
        hf_models("llama"), tmp_path, VocabExtension(vocab_size=132, method="subtokens", subtokens=subtokens)
    )
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        rows = HFFolder(output).read(name)
        assert_fp32_rounding(rows[130:132], torch.stack([rows[:2].mean(0), rows[:130].mean(0)]), of_largest=True)


def test_a_token_that_changes_its_id_and_a_smaller_vocabulary_are_refused(hf_models, tmp_path):
    Tokenizer(models.BPE({"a": 0, "b": 1}, [])).save(str(tmp_path / "old.json"))
    Tokenizer(models.BPE({"a": 1, "b": 0, "c": 2}, [])).save(str(tmp_path / "new.json"))
    with pytest.raises(CheckpointError, match="must keep their ids"):
        subtokens_of_new_tokens(tmp_path / "old.json", tmp_path / "new.json", 2)
    with pytest.raises(CheckpointError, match="only grows"):
        hf_to_mcore(hf_models("llama"), tmp_path / "m", extension=VocabExtension(vocab_size=129))
