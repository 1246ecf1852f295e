"""Shards of other tools are adopted only when they can come from the tokenizer."""

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from megatron_cpt import cli
from megatron_cpt.data.shards.discovery import read_shard
from megatron_cpt.data.shards.indexed import bin_path, idx_path, manifest_path, write_index


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    alphabet = {token: index + 1 for index, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab={"<|endoftext|>": 0} | alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save("tokenizer.json")
    return tmp_path, tokenizer


def write_foreign(prefix, documents):
    prefix.parent.mkdir(exist_ok=True)
    np.array([token for document in documents for token in document], dtype=np.int32).tofile(bin_path(prefix))
    write_index(idx_path(prefix), np.dtype(np.int32), np.array([len(document) for document in documents]))


def run(capsys, *words):
    with pytest.raises(SystemExit) as left:
        cli.main(["data", "adopt", "tok", "--tokenizer", "tokenizer.json", *words])
    captured = capsys.readouterr()
    return left.value.code, captured.out, captured.err


def test_a_foreign_shard_becomes_complete_with_its_counts(project, capsys):
    folder, tokenizer = project
    texts = ["hello", "東京"]
    write_foreign(folder / "tok" / "a_text_document", [[*tokenizer.encode(text).ids, 0] for text in texts])
    code, out, err = run(capsys, "--count-bytes")
    assert code == 0, err
    assert "2 documents, 13 tokens" in out
    assert '"bytes": 11' in manifest_path(folder / "tok" / "a_text_document").read_text()
    assert read_shard("tok/a_text_document").tokens == 13
    assert run(capsys)[1] == "tok/a_text_document: has its manifest already\n"


def test_missing_ends_of_documents_are_refused_unless_accepted(project, capsys):
    folder, _ = project
    write_foreign(folder / "tok" / "a_text_document", [[5, 0], [5, 6]])
    code, _, err = run(capsys)
    assert code == 2 and "1 of 2 documents do not end" in err
    assert run(capsys, "--without-eod")[0] == 0


def test_ids_outside_of_the_vocabulary_are_refused(project, capsys):
    folder, _ = project
    write_foreign(folder / "tok" / "a_text_document", [[5, 300, 0]])
    code, _, err = run(capsys)
    assert code == 2 and "holds the id 300" in err
    assert not manifest_path(folder / "tok" / "a_text_document").exists()
