"""Audit finds each kind of damage, also where the manifest was mended to hide it."""

import json
import shutil

import numpy as np
import pytest

from megatron_cpt.cli import main
from megatron_cpt.data.audit.shards import audit_all, audit_shard
from megatron_cpt.data.shards.adopt import adopt
from megatron_cpt.data.shards.indexed import bin_path, idx_path, manifest_path, read_index, write_index
from megatron_cpt.data.tokenize.driver import tokenize
from megatron_cpt.data.tokenize.options import TokenizeOptions
from megatron_cpt.data.tokenize.shard_writer import provenance_path
from megatron_cpt.data.tokenizer.interface import load_tokenizer
from tests.data.conftest import SENTENCES


@pytest.fixture(scope="module")
def made(bpe_dir, tmp_path_factory):
    """A shard of two files: ten documents with a blank and a bad line between, and five of which two repeat others."""
    folder = tmp_path_factory.mktemp("damage")
    write_jsonl(folder / "corpus/a.jsonl", [f"{i}: {SENTENCES[i % 5]}" for i in range(10)])
    lines = (folder / "corpus/a.jsonl").read_text().splitlines(keepends=True)
    (folder / "corpus/a.jsonl").write_text("".join([*lines[:4], "\n", "{broken\n", *lines[4:]]))
    write_jsonl(folder / "corpus/b.jsonl", [f"0: {SENTENCES[0]}", "x", "y", "x", "z"])
    tokenize(
        [folder / "corpus"],
        bpe_dir,
        output_prefix=folder / "s/x",
        options=TokenizeOptions(on_bad_line="skip", provenance=True),
    )
    return folder / "s"


@pytest.fixture
def shard(made, tmp_path):
    shutil.copytree(made, tmp_path / "s")
    return tmp_path / "s/x_text_document"


def write_jsonl(path, texts):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def change_manifest(shard, change):
    manifest = json.loads(manifest_path(shard).read_text())
    change(manifest)
    manifest_path(shard).write_text(json.dumps(manifest))


def swap(shard, first, second):
    """Exchange two documents, index and all."""
    index = read_index(shard)
    ids, bounds = np.fromfile(bin_path(shard), dtype=np.uint16), np.cumsum([0, *index.sequence_lengths])
    order = list(range(index.num_documents))
    order[first], order[second] = second, first
    lengths = index.sequence_lengths[order].copy()
    np.concatenate([ids[bounds[i] : bounds[i + 1]] for i in order]).tofile(bin_path(shard))
    write_index(idx_path(shard), np.dtype(np.uint16), lengths)


def replace_documents(shard, order):
    """Write the documents `order` in place of all, with a manifest that counts them."""
    index = read_index(shard)
    ids, bounds = np.fromfile(bin_path(shard), dtype=np.uint16), np.cumsum([0, *index.sequence_lengths])
    lengths = index.sequence_lengths[order].copy()
    np.concatenate([ids[bounds[i] : bounds[i + 1]] for i in order]).tofile(bin_path(shard))
    write_index(idx_path(shard), np.dtype(np.uint16), lengths)
    change_manifest(shard, lambda manifest: manifest.update(documents=len(order), tokens=int(lengths.sum())))


def flip(shard, token):
    ids = np.fromfile(bin_path(shard), dtype=np.uint16)
    ids[token] = 300 if ids[token] != 300 else 301
    ids.tofile(bin_path(shard))


DAMAGES = {
    "a flipped token": lambda shard: flip(shard, 40),
    "two documents of one source swapped": lambda shard: swap(shard, 1, 2),
    "documents of two sources swapped": lambda shard: swap(shard, 1, 13),
    "a dropped document, the manifest mended": lambda shard: replace_documents(shard, [*range(4), *range(5, 15)]),
    "a doubled document, the manifest mended": lambda shard: replace_documents(shard, [*range(15), 14]),
    "one document dropped and another doubled": lambda shard: replace_documents(shard, [0, 0, *range(2, 15)]),
    "offsets that do not fit": lambda shard: change_offset(shard),
    "an id outside of the vocabulary": lambda shard: set_token(shard, 5, 60000),
    "lines of another document": lambda shard: np.save(
        provenance_path(shard), np.load(provenance_path(shard))[::-1].copy()
    ),
    "a lost sidecar": lambda shard: provenance_path(shard).unlink(),
    "rejects that were not counted": lambda shard: change_manifest(
        shard, lambda manifest: manifest["sources"][0].update(rejects={}, lines=11)
    ),
}


def set_token(shard, token, value):
    ids = np.fromfile(bin_path(shard), dtype=np.uint16)
    ids[token] = value
    ids.tofile(bin_path(shard))


def change_offset(shard):
    data = bytearray(idx_path(shard).read_bytes())
    place = 34 + 4 * 15 + 8 * 3  # header, lengths, the third offset
    data[place] ^= 2
    idx_path(shard).write_bytes(data)


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_damage_is_found(shard, bpe_dir, damage):
    tokenizer = load_tokenizer(bpe_dir)
    assert audit_shard(shard, tokenizer, None).problems == []
    DAMAGES[damage](shard)
    (audit,) = audit_all([shard], tokenizer, None)
    assert audit.problems


def test_a_damaged_shard_does_not_keep_the_others_from_being_audited(shard, bpe_dir, tmp_path, capsys):
    for path in [*shard.parent.glob("x_text*")]:
        shutil.copy(path, path.with_name(path.name.replace("x_", "y_")))
    with bin_path(shard).open("r+b") as file:
        file.truncate(20)
    with pytest.raises(SystemExit) as left:
        main(["data", "audit", "--input", str(tmp_path / "s"), "--tokenizer", str(bpe_dir), "--samples", "all"])
    assert left.value.code == 1
    output = capsys.readouterr().out
    assert "holds 20 bytes; its index promises" in output
    assert "y_text_document: holds its sources; 15 documents" in output and "15 samples encode" in output


def test_an_adopted_shard_is_audited_without_its_sources(shard, bpe_dir):
    manifest_path(shard).unlink()
    adopt(shard, load_tokenizer(bpe_dir))
    audit = audit_shard(shard, load_tokenizer(bpe_dir))
    assert audit.problems == [] and "adopted, its sources are not known" in str(audit)


def test_a_long_document_is_audited_in_parts(bpe_dir, tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_cpt.data.tokenizer.encoders.LONG_DOCUMENT_CHARACTERS", 4096)
    monkeypatch.setattr("megatron_cpt.data.audit.shards._DECODED_CHARACTERS", 4096)
    write_jsonl(tmp_path / "in/a.jsonl", [" ".join(SENTENCES * 60), "short"])
    tokenize([tmp_path / "in"], bpe_dir, output_prefix=tmp_path / "s/x")
    audit = audit_shard(tmp_path / "s/x_text_document", load_tokenizer(bpe_dir), None)
    assert audit.problems == [] and (audit.samples, audit.decoded, audit.too_long_to_decode) == (2, 1, 1)
