"""What users bring is read as they mean it: other encodings, halves of characters, splits side by side, broken links."""

import gzip
import json
import os
from pathlib import Path

import pytest

from megatron_cpt.cli import main
from megatron_cpt.data.cleaning.surrogates import mended_surrogates
from megatron_cpt.data.reading.documents import list_sources
from megatron_cpt.errors import DataError

TEXT = "Käse für 5 € – “naïve”"


def run(*words: object) -> int:
    with pytest.raises(SystemExit) as left:
        main(["data", *map(str, words)])
    return left.value.code


def repair(folder: Path, *words: str) -> int:
    return run("repair", "--input", folder / "in", "--output-dir", folder / "out", "--workers", 1, *words)


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "shift_jis"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.json", "a.jsonl.gz"])
def test_repair_makes_utf8_of_other_encodings(encoding, name, tmp_path):
    text = {"latin-1": "Käse für naïve", "shift_jis": "日本語の文章"}.get(encoding, TEXT)
    records = [{"text": text}, {"text": f"{text} 2"}]
    lines = {
        "a.jsonl": "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records),
        "a.txt": f"{text}\n{text} 2\n",
        "a.json": json.dumps(records, ensure_ascii=False, indent=2),
    }
    data = lines[name.removesuffix(".gz")].encode(encoding)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    words = [] if encoding in ("utf-16", "utf-32") else ["--encoding", encoding]  # these two have a byte-order mark
    assert repair(tmp_path, *words) == 0
    (output,) = (path for path in (tmp_path / "out").iterdir() if not path.name.startswith("."))
    found = output.read_text(encoding="utf-8").splitlines()
    assert [line if name == "a.txt" else json.loads(line)["text"] for line in found] == [text, f"{text} 2"]


def test_a_file_that_is_cut_within_a_character_loses_that_character_alone(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.txt").write_bytes("one\ntwo".encode("utf-16")[:-1])
    assert repair(tmp_path) == 0
    assert (tmp_path / "out/a.txt").read_text() == "one\ntw\ufffd\n"
    assert "1 characters that the encoding does not have, replaced" in capsys.readouterr().out


def test_repair_never_writes_an_empty_file_and_says_so(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/bad.jsonl").write_bytes('{"text": "Käse"}\n'.encode("latin-1"))
    (tmp_path / "in/good.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "in/empty.jsonl").write_text("")
    for _ in range(2):  # the same again
        assert repair(tmp_path) == 1
        assert "bad.jsonl: no document could be mended; no file is written. Is it in another" in capsys.readouterr().out
        assert {path.name for path in (tmp_path / "out").glob("[!.]*")} == {"good.jsonl", "bad.jsonl.rejects"}
    assert repair(tmp_path, "--encoding", "latin-1") == 0
    assert json.loads((tmp_path / "out/bad.jsonl").read_text()) == {"text": "Käse"}
    assert not (tmp_path / "out/bad.jsonl.rejects").exists()


def test_an_unknown_encoding_is_refused_by_name(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.txt").write_text("a")
    for name in ("latin-99", "hex", "zip"):
        assert repair(tmp_path, "--encoding", name) == 2
        assert f"--encoding {name}: not an encoding of text" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "mended"),
    [
        (rb'{"text": "a\ud83d b"}', rb'{"text": "a\ufffd b"}'),
        (rb'{"text": "a\uDE00"}', rb'{"text": "a\ufffd"}'),
        (rb'{"text": "\ud83d\ude00 \ud83d"}', rb'{"text": "\ud83d\ude00 \ufffd"}'),
        (rb'{"text": "\ude00\ud83d"}', rb'{"text": "\ufffd\ufffd"}'),
        (rb'{"text": "\\ud83d \\\ud83d"}', rb'{"text": "\\ud83d \\\ufffd"}'),
        (b'{"text": "a\xed\xa0\xbd b"}', '{"text": "a\ufffd b"}'.encode()),
        (b'{"text": "\xed\xa0\xbd\xed\xb8\x80"}', '{"text": "😀"}'.encode()),
        (b'{"text": "\xed\xa0\xbd \xff"}', b'{"text": "\xed\xa0\xbd \xff"}'),
        (rb'{"text": "\n \u00e9 \ud7ff"}', rb'{"text": "\n \u00e9 \ud7ff"}'),
    ],
)
def test_halves_of_characters_become_replacement_characters_and_nothing_else_changes(line, mended):
    assert mended_surrogates(line) == mended


def test_repair_mends_lone_surrogates_in_texts_chats_and_text_files(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    turns = [{"role": "user", "content": "a\ud83d"}]
    lines = [json.dumps({"text": "x\ud83d", "n": 1.50}), json.dumps({"messages": turns}), '{"text": "\\\\ud83d"}']
    (tmp_path / "in/a.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "in/b.txt").write_bytes(b"a\xed\xa0\xbd\n\\ud83d\n")
    assert repair(tmp_path) == 0
    assert "2 lone surrogate replaced" in capsys.readouterr().out
    found = [json.loads(line) for line in (tmp_path / "out/a.jsonl").read_text().splitlines()]
    assert found == [
        {"text": "x\ufffd", "n": 1.5},
        {"messages": [{"role": "user", "content": "a\ufffd"}]},
        {"text": "\\ud83d"},
    ]
    assert (tmp_path / "out/b.txt").read_text() == "a\ufffd\n\\ud83d\n"


def touch(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"text": name}) + "\n")


@pytest.mark.parametrize(
    "names",
    [
        ("train/a.jsonl", "test/a.jsonl"),
        ("en/train/a.jsonl", "en/validation/a.jsonl"),
        ("data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl", "data/test-00000-of-00001.jsonl"),
        ("train.jsonl", "dev.jsonl"),
        ("Training.jsonl.gz", "eval_1.txt"),
    ],
)
@pytest.mark.parametrize("pattern", ["", "/**/*", "/**"])
def test_training_and_held_out_splits_side_by_side_are_not_one_corpus(names, pattern, tmp_path):
    touch(tmp_path, *names)
    if any("*" in pattern and "/" not in name for name in names):
        pattern = pattern.replace("/**/*", "/*")
    with pytest.raises(DataError, match=r"holds \S+ and \S+ side by side"):
        list_sources([f"{tmp_path}{pattern}"])
    assert len(list_sources([f"{tmp_path}{pattern}"], mixes_splits=False)) == len(names)
    held_out = ["*test*", "*valid*", "*dev*", "*eval*"]
    assert list_sources([tmp_path], exclude=held_out)
    assert len(list_sources([tmp_path / name for name in names])) == len(names)  # each named


@pytest.mark.parametrize(
    "names",
    [
        ("train/a.jsonl", "en/a.jsonl"),
        ("test/a.jsonl", "validation/a.jsonl"),
        ("en/train/a.jsonl", "ja/test/a.jsonl"),
        ("trainers.jsonl", "testimony.jsonl"),
        ("train/test/a.jsonl",),
    ],
)
def test_names_that_only_look_like_splits_are_read(names, tmp_path):
    touch(tmp_path, *names)
    assert len(list_sources([tmp_path])) == len(names)


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["validate", "--input", "in"], 0),
        (["repair", "--input", "in", "--output-dir", "out"], 0),
        (["extract", "--input", "in", "--output-dir", "out"], 0),
        (["merge-files", "--input", "in", "--output-dir", "out"], 2),
        (["dedup", "c=in", "--output", "out"], 2),
        (["dedup", "c=in/train", "c=in/test", "--output", "out"], 0),
        (["decontaminate", "c=in", "--against", "in/test", "--output", "out"], 2),
        (["decontaminate", "c=in/train", "--against", "in/test", "--output", "out", "--min-words", "1"], 0),
        (["sample", "in", "--output", "out"], 2),
        (["split", "c=in", "--output", "out", "--fraction", "0.1", "--name", "v"], 2),
    ],
)
def test_verbs_that_mirror_a_tree_take_splits_and_those_that_make_one_corpus_refuse(words, code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    touch(tmp_path, "in/train/a.jsonl", "in/test/b.jsonl")
    assert run(*words) == code


@pytest.fixture
def with_bad_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    touch(tmp_path, "in/a.jsonl", "in/c.jsonl")
    (tmp_path / "in/b.jsonl").symlink_to(tmp_path / "nowhere.jsonl")
    os.mkfifo(tmp_path / "in/d.jsonl")
    (tmp_path / "in/e.parquet").symlink_to("gone.parquet")
    return tmp_path


@pytest.mark.parametrize(
    ("words", "skip"),
    [
        (["dedup", "c=in", "--output", "out"], "--on-bad-line skip"),
        (["sample", "in", "--output", "out"], "--on-bad-line skip"),
        (["split", "c=in", "--output", "out", "--fraction", "0.1", "--name", "v"], "--on-bad-line skip"),
    ],
)
def test_a_file_that_cannot_be_read_stops_the_work_at_its_start_or_is_counted(words, skip, with_bad_files, capsys):
    assert run(*words) == 2
    assert "in/b.jsonl: no such file: a link to " in capsys.readouterr().err
    assert not Path("out").exists()
    assert run(*words, *skip.split()) == 0
    entries = [json.loads(line) for path in Path("out").rglob("*.rejects") for line in path.read_text().splitlines()]
    assert {(Path(entry["path"]).name, entry["reason"]) for entry in entries} == {
        (name, "file that cannot be read") for name in ("b.jsonl", "d.jsonl", "e.parquet")
    }


def test_tokenizing_counts_files_that_cannot_be_read_in_the_manifest(with_bad_files, bpe_dir):
    from megatron_cpt.data.tokenize.driver import tokenize
    from megatron_cpt.data.tokenize.options import TokenizeOptions

    with pytest.raises(DataError, match="a link to"):
        tokenize(["in"], bpe_dir, output_prefix=Path("t"), workers=1)
    tokenize(["in"], bpe_dir, output_prefix=Path("t"), workers=1, options=TokenizeOptions(on_bad_line="skip"))
    manifest = json.loads(Path("t_text_document.json").read_text())
    assert manifest["documents"] == 2
    assert manifest["rejects"] == {"file that cannot be read": 3}


def test_validate_and_repair_tell_files_that_cannot_be_read(with_bad_files, capsys):
    assert run("validate", "--input", "in", "--workers", 1) == 1
    assert "in/d.jsonl: 0 documents in 1 lines; 1 file that cannot be read" in capsys.readouterr().out
    assert run("repair", "--input", "in", "--output-dir", "out", "--workers", 1) == 1
    assert {path.name for path in Path("out").glob("*.jsonl")} == {"a.jsonl", "c.jsonl"}


def test_the_folders_of_a_tree_become_n_shards_in_order(tmp_path, bpe_dir):
    from megatron_cpt.data.tokenize.driver import tokenize
    from megatron_cpt.data.tokenize.options import TokenizeOptions
    from megatron_cpt.errors import ConfigError

    names = [f"in/d{folder:02d}/f.jsonl" for folder in range(12)]
    touch(tmp_path, *names)
    tokenize([tmp_path / "in"], bpe_dir, output_prefix=tmp_path / "one", workers=1)
    report = tokenize(
        [tmp_path / "in"], bpe_dir, output_dir=tmp_path / "five", workers=1, options=TokenizeOptions(num_shards=5)
    )
    shards = sorted(report.manifests)
    assert [shard.name for shard in shards] == [f"shard-{number:05d}_text_document" for number in range(5)]
    joined = b"".join(shard.with_name(f"{shard.name}.bin").read_bytes() for shard in shards)
    assert joined == (tmp_path / "one_text_document.bin").read_bytes()
    parts = [
        tokenize(
            [tmp_path / "in"],
            bpe_dir,
            output_dir=tmp_path / "parts",
            workers=1,
            options=TokenizeOptions(num_shards=5),
            part=(number, 2),
        )
        for number in range(2)
    ]
    assert sorted(len(part.manifests) for part in parts) == [2, 3]
    tokens = sum(manifest["tokens"] for manifest in report.manifests.values())
    across = TokenizeOptions(shard_tokens=tokens // 3, is_across_folders=True)
    grouped = tokenize([tmp_path / "in"], bpe_dir, output_dir=tmp_path / "across", workers=1, options=across)
    assert 2 <= len(grouped.manifests) <= 4
    for wrong in ({"num_shards": 0}, {"num_shards": 2, "shard_tokens": 5}, {"is_across_folders": True}):
        with pytest.raises(ConfigError, match="tokenize: "):
            tokenize([tmp_path / "in"], bpe_dir, output_dir=tmp_path / "x", options=TokenizeOptions(**wrong))
    with pytest.raises(ConfigError, match="an output prefix is one shard"):
        tokenize(
            [tmp_path / "in"], bpe_dir, output_prefix=tmp_path / "x", workers=1, options=TokenizeOptions(num_shards=2)
        )
