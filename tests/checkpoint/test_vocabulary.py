"""Vocabulary extension: new rows by three methods, old logits unchanged."""

import itertools
import json
import shutil
import subprocess
import sys

import pytest
import sentencepiece
import torch
from tokenizers import Tokenizer, models

from megatron_cpt.checkpoint.convert.choices import ExportChoices, ImportChoices
from megatron_cpt.checkpoint.convert.hf_mcore import hf_to_mcore, mcore_to_hf
from megatron_cpt.checkpoint.huggingface.folder import HFFolder
from megatron_cpt.checkpoint.huggingface.vocabulary import VocabExtension, extension_for, subtokens_of_new_tokens
from megatron_cpt.errors import CheckpointError
from tests.tolerances import assert_estimate, assert_fp32_rounding


def extended(source, tmp_path, extension):
    """Return a folder converted there and back with an extension."""
    name = extension.method
    return mcore_to_hf(
        hf_to_mcore(source, tmp_path / f"m-{name}", options=ImportChoices(extension=extension), verify=True),
        tmp_path / f"hf-{name}",
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
        hf_to_mcore(hf_models("llama"), tmp_path / "m", options=ImportChoices(extension=VocabExtension(vocab_size=129)))


def word_tokenizer(path, num_words, **added):
    """Write a tokenizer folder of words w0, w1 ... and added ones."""
    path.mkdir(exist_ok=True)
    vocabulary = {f"w{number}": number for number in range(num_words)} | added
    Tokenizer(models.WordLevel(vocabulary, unk_token="w0")).save(str(path / "tokenizer.json"))
    return path


def test_ids_inside_rows_that_were_never_trained_are_initialised_too(hf_models, tmp_path):
    """Qwen2.5 has 152,064 rows and 151,665 ids: its first new tokens would keep untrained rows."""
    source = shutil.copytree(hf_models("llama"), tmp_path / "source")
    word_tokenizer(source, 120)  # the model has 130 rows
    new = word_tokenizer(tmp_path / "new", 135)
    extension = extension_for(source, new, rows=None, multiple=8)
    assert (extension.vocab_size, extension.num_old_ids) == (136, 120)
    output = extended(source, tmp_path, extension)
    assert (output / "tokenizer.json").read_bytes() == (new / "tokenizer.json").read_bytes()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        old, rows = HFFolder(source).read(name), HFFolder(output).read(name)
        assert torch.equal(rows[:120], old[:120])
        assert_fp32_rounding(rows[120:], old[:120].mean(0).expand(16, -1), of_largest=True)


def test_rows_ids_extension_and_exported_tokenizer_are_held_against_each_other(hf_models, tmp_path):
    source = shutil.copytree(hf_models("llama"), tmp_path / "source")
    word_tokenizer(source, 120)
    new = word_tokenizer(tmp_path / "new", 141)
    with pytest.raises(CheckpointError, match="has ids up to 140; the model has 136 rows"):
        extension_for(source, new, rows=136)
    with pytest.raises(CheckpointError, match="Give --new-tokenizer"):
        extension_for(source, None, rows=None)
    release = hf_to_mcore(source, tmp_path / "mcore")
    with pytest.raises(CheckpointError, match="has ids up to 140; the model has 130 rows .256 with padding"):
        mcore_to_hf(release, tmp_path / "hf", options=ExportChoices(tokenizer=new))
    assert not (tmp_path / "hf").exists()
    swapped = word_tokenizer(tmp_path / "swapped", 0, w1=0, w0=1)
    with pytest.raises(CheckpointError, match="must keep their ids"):
        extension_for(source, swapped, rows=140)


def test_a_folder_with_a_sentencepiece_model_alone_is_extended(hf_models, tmp_path):
    source = shutil.copytree(hf_models("llama"), tmp_path / "source")
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"alpha beta gamma {number} delta" for number in range(400)))
    for folder, size in ((source, 40), (tmp_path / "new", 48)):
        folder.mkdir(exist_ok=True)
        sentencepiece.SentencePieceTrainer.train(
            input=str(text), model_prefix=str(folder / "tokenizer"), vocab_size=size, model_type="bpe",
            minloglevel=2,
        )  # fmt: skip
    old, new = (
        sentencepiece.SentencePieceProcessor(model_file=str(f / "tokenizer.model")) for f in (source, tmp_path / "new")
    )
    appended = {new.id_to_piece(n): n for n in range(48)}
    if any(appended.get(old.id_to_piece(n), n) != n for n in range(40)):
        with pytest.raises(CheckpointError, match="must keep their ids"):
            extension_for(source, tmp_path / "new", rows=None, method="subtokens")
    same = extension_for(source, source, rows=136, method="subtokens")
    assert (same.num_old_ids, same.subtokens) == (40, {})
    output = extended(source, tmp_path, same)
    assert HFFolder(output).shape("lm_head.weight") == (136, 32)


def test_noise_is_drawn_in_blocks():
    """A tensor of 3.9 MiB took 1.4 GB when all draws were in memory."""
    weight = torch.randn(32_000, 32).bfloat16()
    program = (
        "import resource, torch\n"
        "from megatron_cpt.checkpoint.huggingface.vocabulary import VocabExtension\n"
        "weight = torch.randn(32_000, 32).bfloat16()\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "rows = VocabExtension(vocab_size=43_000, method='noise').new_rows(weight, 'x')\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, tuple(rows.shape))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    grown, _, shape = done.stdout.partition(" ")
    assert shape.strip() == "(11000, 32)" and int(grown) < 150_000, done.stdout
    assert weight.nbytes < 4 << 20
