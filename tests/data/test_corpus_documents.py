"""Whether token files were made of the documents that there are: what training and the pipeline ask before they begin."""

import dataclasses
import json
from pathlib import Path

import pytest

from megatron_cpt.config.settings.schema import CorpusConfig, DataConfig, PathsConfig
from megatron_cpt.data.shards.corpus_documents import check_tokenized, untokenized
from megatron_cpt.errors import DataError
from tests.train.tiny import tiny_config


def write_shard(data: Path, name: str, sources: dict[str, int] | None) -> None:
    (data / "tokens").mkdir(exist_ok=True)
    for suffix in (".bin", ".idx"):
        (data / f"tokens/{name}_text_document{suffix}").touch()
    manifest = {} if sources is None else {"sources": [{"path": f"/x/{n}", "size": s} for n, s in sources.items()]}
    (data / f"tokens/{name}_text_document.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("documents", "sources", "missing"),
    [
        ({"a": 3, "b": 4}, {"a": 3, "b": 4}, []),
        ({"a": 3, "b": 4}, {"a": 3}, ["b"]),
        ({"a": 9}, {"a": 3}, ["a"]),
        ({"a": 3}, {"a": 3, "gone": 1}, []),
        ({"a": 3}, {"cleaned": 3}, []),
        ({"a": 3}, None, []),
        ({}, {"a": 3}, []),
    ],
    ids=["all", "a new file", "appended", "a file was removed", "made of others", "no record", "documents are gone"],
)
def test_documents_that_are_not_in_the_token_files_are_named(tmp_path, documents, sources, missing):
    (tmp_path / "docs").mkdir()
    for name, size in documents.items():
        (tmp_path / f"docs/{name}.jsonl").write_text("x" * size)
    write_shard(tmp_path, "D", None if sources is None else {f"{name}.jsonl": size for name, size in sources.items()})
    corpus = CorpusConfig(documents=("docs",), tokens=("tokens",))
    config = dataclasses.replace(
        tiny_config(),
        paths=PathsConfig(data_dir=str(tmp_path)),
        data=DataConfig(corpora={"D": corpus}, mix={"D": 1.0}),
    )
    found = {name: [Path(path).stem for path in paths] for name, paths in untokenized(config).items()}
    assert found == ({"D": missing} if missing else {})
    if missing:
        with pytest.raises(
            DataError, match=f"data.corpora.D: 1 of its documents are not .* such as .*{missing[0]}.jsonl"
        ):
            check_tokenized(config)
    else:
        check_tokenized(config)


def test_documents_that_came_after_the_split_of_a_held_out_set_are_named(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/a.jsonl").write_text("x" * 5)
    train = tmp_path / "split/D/documents/train"
    train.mkdir(parents=True)
    (train / "a.jsonl").write_text("x" * 4)
    write_shard(tmp_path, "D", {"a.jsonl": 4})
    record = {"made_of": {"documents": {"sources": [{"path": "/x/a.jsonl", "size": 5}]}}}
    (tmp_path / "split/D/validation.json").write_text(json.dumps(record))
    corpus = CorpusConfig(documents=("docs",), tokens=("tokens",), held_out=0.1)
    config = dataclasses.replace(
        tiny_config(),
        paths=PathsConfig(data_dir=str(tmp_path)),
        data=DataConfig(corpora={"D": corpus}, mix={"D": 1.0}),
    )
    assert untokenized(config) == {}
    (tmp_path / "docs/b.jsonl").write_text("new")
    assert [Path(path).name for path in untokenized(config)["D"]] == ["b.jsonl"]
