"""Validate counts bad lines, repair rewrites them, extract and merge-files keep every line whole."""

import gzip
import json
import subprocess
from pathlib import Path

import pytest
import zstandard

from megatron_cpt.cli import main
from megatron_cpt.data.cleaning.rewrite import rewrite_all
from megatron_cpt.data.cleaning.rewrite_plan import Grouping, plan_tree_of_files
from megatron_cpt.data.reading.documents import list_sources
from megatron_cpt.data.tokenize.driver import tokenize
from megatron_cpt.errors import DataError

ROOT = Path(__file__).parents[2]
GOOD = '{"text": "a"}\n'
CHAT = '{"conversations": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}\n'
BROKEN = (
    "\ufeff" + GOOD + "\n" + '{"text": "b"}{"text": "c"}\n' + "{broken\n" + CHAT + '{"conversations": [{"role": 1}]}\n'
    '{"text": "d"}'
)


def run(*arguments):
    with pytest.raises(SystemExit) as left:
        main(["data", *map(str, arguments)])
    return left.value.code


def rewrite(sources, output, target_bytes=None, keys=("text",), on_bad_line="skip", compression="none"):
    settings = {"keys": keys, "on_bad_line": on_bad_line, "compression": compression}
    return rewrite_all(
        plan_tree_of_files(list_sources(sources), output, Grouping(target_bytes=target_bytes), **settings), 1, "rewrite"
    )


def test_validate_reports_bad_lines_and_leaves_with_one(tmp_path, capsys):
    (tmp_path / "x.jsonl").write_text(BROKEN)
    assert run("validate", "--input", tmp_path, "--workers", 1) == 1
    output = capsys.readouterr().out
    assert "line 3: two objects on one line" in output and "line 4: invalid JSON" in output
    assert "turn 0 of 'conversations' has no role and content" in output
    assert "1 blank line" in output and "1 byte-order mark" in output and "1 no final newline" in output
    assert "3 bad lines" in output


def test_validate_passes_clean_text_and_chat(tmp_path, capsys):
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress((GOOD + CHAT).encode()))
    (tmp_path / "y.txt").write_text("one\ntwo\n")
    assert run("validate", "--input", tmp_path, "--workers", 1) == 0
    assert "2 files, 4 documents, 0 bad lines" in capsys.readouterr().out


def test_repair_keeps_what_can_be_mended_and_sets_the_rest_aside(tmp_path, bpe_dir):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/x.jsonl").write_text(BROKEN)
    rewrite([tmp_path / "in"], tmp_path / "out")
    lines = (tmp_path / "out/x.jsonl").read_text()
    assert lines == GOOD + '{"text": "b"}\n{"text": "c"}\n' + CHAT + '{"text": "d"}\n'
    rejects = [json.loads(line) for line in (tmp_path / "out/x.jsonl.rejects").read_text().splitlines()]
    assert [(entry["line"], entry["reason"]) for entry in rejects] == [
        (4, "invalid JSON"),
        (6, "text is not a string"),
    ]
    assert run("validate", "--input", tmp_path / "out", "--workers", 1) == 0
    (tmp_path / "out/x.jsonl").write_text(lines.replace(CHAT, ""))
    assert tokenize([tmp_path / "out/x.jsonl"], bpe_dir, output_prefix=tmp_path / "t").manifests


def test_repair_keeps_the_whole_lines_of_a_truncated_file(tmp_path):
    data = zstandard.ZstdCompressor().compress(GOOD.encode() * 50000)
    (tmp_path / "x.jsonl.zst").write_bytes(data[: len(data) // 2])
    (found,) = rewrite([tmp_path / "x.jsonl.zst"], tmp_path / "out", compression="gz")
    assert found.problems == {"damaged or truncated file": 1}
    assert gzip.decompress((tmp_path / "out/x.jsonl.gz").read_bytes()).decode() == GOOD * found.documents


def test_extract_mirrors_the_tree_and_stops_at_damage(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "in/deep").mkdir(parents=True)
    (tmp_path / "in/deep/a.jsonl.gz").write_bytes(gzip.compress(GOOD.encode() + CHAT.encode()[:-1]))
    (tmp_path / "in/b.txt").write_text("one\ntwo")
    pq.write_table(pa.table({"text": ["a", "b"], "score": [1, 2]}), tmp_path / "in/c.parquet")
    rewrite([tmp_path / "in"], tmp_path / "out", keys=(), on_bad_line="fail")
    assert (tmp_path / "out/deep/a.jsonl").read_text() == GOOD + CHAT
    assert (tmp_path / "out/b.txt").read_text() == "one\ntwo\n"
    assert (tmp_path / "out/c.jsonl").read_text() == '{"text":"a","score":1}\n{"text":"b","score":2}\n'
    (tmp_path / "in/deep/a.jsonl.gz").write_bytes(gzip.compress(GOOD.encode())[:-9])
    with pytest.raises(DataError, match="damaged or truncated"):
        rewrite([tmp_path / "in/deep"], tmp_path / "out2", keys=(), on_bad_line="fail")
    assert not (tmp_path / "out2/a.jsonl").exists()


def test_files_are_merged_per_folder_and_format_without_glueing_lines(tmp_path):
    for name in ("en/1.jsonl", "en/2.jsonl", "en/3.jsonl", "ja/1.jsonl"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_text("\ufeff" + GOOD * 3 + GOOD[:-1])
    (tmp_path / "in/en/4.txt").write_text("a line")
    rewrite([tmp_path / "in"], tmp_path / "out", target_bytes=120, keys=(), on_bad_line="fail")
    files = sorted(path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("[!.]*.*"))
    assert files == ["en/en-00000.jsonl", "en/en-00000.txt", "en/en-00001.jsonl", "ja/ja-00000.jsonl"]
    assert (tmp_path / "out/en/en-00000.jsonl").read_text() == GOOD * 8


def test_a_second_run_keeps_files_of_unchanged_sources_and_redoes_the_others(tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("a", "b"):
        (tmp_path / f"in/{name}.jsonl").write_text(GOOD)
    first = rewrite([tmp_path / "in"], tmp_path / "out")
    (tmp_path / "in/b.jsonl").write_text(GOOD * 2)
    stamp = (tmp_path / "out/a.jsonl").stat().st_mtime_ns
    second = rewrite([tmp_path / "in"], tmp_path / "out")
    assert (tmp_path / "out/a.jsonl").stat().st_mtime_ns == stamp
    assert second[0] == first[0] and second[1].documents == 2


def test_an_output_of_other_work_is_never_replaced(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.jsonl").write_text(GOOD)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/a.jsonl").write_text("mine")
    with pytest.raises(DataError, match="exists already, from other work"):
        rewrite([tmp_path / "in"], tmp_path / "out")
    assert (tmp_path / "out/a.jsonl").read_text() == "mine"


@pytest.mark.parametrize("change", [{"target_bytes": 1000}, {"compression": "zst"}])
def test_files_of_an_earlier_run_with_other_sizes_do_not_stay_beside(tmp_path, change):
    (tmp_path / "in").mkdir()
    for name in "abc":
        (tmp_path / f"in/{name}.jsonl").write_text(GOOD)
    common = {"target_bytes": 1, "keys": (), "on_bad_line": "fail"}
    rewrite([tmp_path / "in"], tmp_path / "out", **common)
    with pytest.raises(DataError, match=r"from an earlier run, which would go to .* as well"):
        rewrite([tmp_path / "in"], tmp_path / "out", **(common | change))


def test_a_run_that_was_killed_before_its_record_goes_on(tmp_path, monkeypatch):
    from megatron_cpt.data.cleaning import rewrite as module

    (tmp_path / "a.jsonl").write_text(GOOD)
    real = module.write_json

    def killed(path, value):
        if value["sizes"] is not None:
            raise KeyboardInterrupt
        real(path, value)

    monkeypatch.setattr(module, "write_json", killed)
    with pytest.raises(KeyboardInterrupt):
        rewrite([tmp_path / "a.jsonl"], tmp_path / "out")
    assert (tmp_path / "out/a.jsonl").exists()
    for name in (".a.jsonl.x.partial", "..a.jsonl.sources.json.x.partial", ".a.jsonl.rejects.x.partial"):
        (tmp_path / "out" / name).write_text("")
    monkeypatch.setattr(module, "write_json", real)
    assert rewrite([tmp_path / "a.jsonl"], tmp_path / "out")[0].documents == 1
    assert not list((tmp_path / "out").glob(".*.partial"))


def test_repair_drops_a_byte_order_mark_within_a_file_and_keeps_two_objects_byte_for_byte(tmp_path):
    lines = GOOD + "\ufeff" + GOOD + "\ufeff\n" + '{"text":  "\\u00e9", "x": "\\ud800"} , {"text": "b", "n": 1.50}\n'
    (tmp_path / "a.jsonl").write_text(lines)
    (found,) = rewrite([tmp_path / "a.jsonl"], tmp_path / "out")
    assert (found.lines, found.documents, found.problems.total()) == (4, 4, 0)
    two = '{"text":  "\\u00e9", "x": "\\ud800"}\n{"text": "b", "n": 1.50}\n'
    assert (tmp_path / "out/a.jsonl").read_text() == GOOD * 2 + two


@pytest.mark.parametrize(
    ("turns", "is_good"),
    [
        ([{"role": "user", "content": "a"}], True),
        ([{"from": "human", "value": "a", "role": None, "content": None}], True),
        ([{"role": "user", "content": [{"type": "text", "text": "a"}]}], True),
        ([{"role": "user", "content": None}], False),
        ([{"role": "user", "content": 3}], False),
        ([{"role": "user", "content": "\ud800"}], False),
        ([{"content": "a"}], False),
        (["a"], False),
        ([], False),
    ],
)
@pytest.mark.parametrize("key", ["conversations", "messages"])
def test_chats_pass_through_and_bad_turns_are_named(tmp_path, key, turns, is_good):
    (tmp_path / "a.jsonl").write_text(json.dumps({key: turns}) + "\n")
    assert run("validate", "--input", tmp_path, "--workers", 1) == (0 if is_good else 1)


def test_outputs_that_would_collide_or_replace_their_source_are_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text(GOOD)
    with pytest.raises(DataError, match="is its own source"):
        rewrite([tmp_path], tmp_path)
    (tmp_path / "a.json").write_text(GOOD)
    with pytest.raises(DataError, match="would both become"):
        rewrite([tmp_path], tmp_path / "out")


@pytest.mark.parametrize("script", ["tokenize.sh", "extract.sh", "merge_files.sh"])
def test_the_shell_tools_explain_themselves(script):
    done = subprocess.run([ROOT / "tools" / script, "--help"], capture_output=True, text=True, check=True)
    assert "Usage: tools/" + script in done.stdout


def test_the_shell_tool_extracts(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/x.jsonl.gz").write_bytes(gzip.compress(GOOD.encode()))
    subprocess.run(
        [ROOT / "tools/extract.sh", tmp_path / "in", tmp_path / "out", "--workers", "1"],
        check=True,
        capture_output=True,
    )
    assert (tmp_path / "out/x.jsonl").read_text() == GOOD


def tree(folder, names, lines=10):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps({"text": f"{name} {number} " + "x" * 40}) + "\n" for number in range(lines)))


def test_folders_of_a_tree_become_n_files_with_every_line_in_order(tmp_path, capsys):
    names = [f"d{folder:03d}/f{number}.jsonl" for folder in range(24) for number in range(2)]
    tree(tmp_path / "in", names)
    expected = "".join((tmp_path / "in" / name).read_text() for name in names)
    words = ["--input", tmp_path / "in", "--output-dir", tmp_path / "out", "--num-files", 5, "--workers", 1]
    assert run("merge-files", *words, "--dry-run") == 0
    assert "48 files would become 5" in capsys.readouterr().out and not (tmp_path / "out").exists()
    assert run("merge-files", *words) == 0
    outputs = sorted((tmp_path / "out").glob("documents-*.jsonl"))
    assert [path.name for path in outputs] == [f"documents-{number:05d}.jsonl" for number in range(5)]
    assert "".join(path.read_text() for path in outputs) == expected
    sizes = [path.stat().st_size for path in outputs]
    assert max(sizes) < 1.4 * min(sizes)
    assert run("merge-files", *words[:-2], "--split") == 2
    assert "Leave out --target-bytes and --split" in capsys.readouterr().err


def test_files_of_several_folders_are_merged_to_a_target_size(tmp_path):
    tree(tmp_path / "in", [f"d{folder}/f.jsonl" for folder in range(12)])
    size = (tmp_path / "in/d0/f.jsonl").stat().st_size
    words = ["--input", tmp_path / "in", "--target-bytes", 4 * size, "--workers", 1]
    assert run("merge-files", *words, "--output-dir", tmp_path / "within") == 0
    assert len(list((tmp_path / "within").rglob("*.jsonl"))) == 12
    assert run("merge-files", *words, "--output-dir", tmp_path / "across", "--across-folders") == 0
    assert len(list((tmp_path / "across").rglob("*.jsonl"))) == 3


@pytest.mark.parametrize("compress", ["none", "zst"])
def test_large_files_are_cut_behind_a_line_and_small_ones_merged(tmp_path, compress):
    tree(tmp_path / "in", ["big.jsonl"], lines=1000)
    tree(tmp_path / "in", ["a.jsonl", "b.jsonl"])
    (tmp_path / "in/big.jsonl.gz").write_bytes(gzip.compress((tmp_path / "in/big.jsonl").read_bytes()))
    (tmp_path / "in/big.jsonl").rename(tmp_path / "in/large.jsonl")
    words = ["--input", tmp_path / "in", "--target-bytes", 2000, "--split", "--compress", compress, "--workers", 1]
    assert run("merge-files", *words, "--output-dir", tmp_path / "out") == 0

    def lines(pattern):
        paths = sorted((tmp_path / "out").glob(pattern))
        read = zstandard.ZstdDecompressor().decompressobj
        return [path.read_bytes() if compress == "none" else read().decompress(path.read_bytes()) for path in paths]

    parts = lines("large-part-*")
    assert b"".join(parts) == (tmp_path / "in/large.jsonl").read_bytes()
    assert all(part.endswith(b"\n") for part in parts)
    assert all(2000 <= len(part) < 2100 for part in parts[:-1]) and len(parts) > 10
    assert b"".join(lines("big-part-*")) == (tmp_path / "in/large.jsonl").read_bytes()
    assert b"".join(lines("documents-*")) == b"".join(
        (tmp_path / "in" / n).read_bytes() for n in ("a.jsonl", "b.jsonl")
    )
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("[!.]*")}
    assert run("merge-files", *words, "--output-dir", tmp_path / "out") == 0  # all is kept
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("[!.]*")} == stamps
    tree(tmp_path / "in", ["large.jsonl"], lines=600)  # fewer parts: those of before go
    assert run("merge-files", *words, "--output-dir", tmp_path / "out") == 0
    assert b"".join(lines("large-part-*")) == (tmp_path / "in/large.jsonl").read_bytes()


@pytest.mark.parametrize("verb", ["repair", "extract", "merge-files"])
def test_the_parts_of_a_job_array_do_the_whole_and_each_file_once(tmp_path, verb, capsys):
    tree(tmp_path / "in", [f"d{folder}/f.jsonl" for folder in range(7)])
    words = ["--input", tmp_path / "in", "--workers", 1]
    assert run(verb, *words, "--output-dir", tmp_path / "whole") == 0
    for number in range(3):
        assert run(verb, *words, "--output-dir", tmp_path / "parts", "--part", f"{number}/3") == 0
    capsys.readouterr()

    def found(folder):
        paths = sorted((tmp_path / folder).rglob("[!.]*.jsonl"))
        return {path.relative_to(tmp_path / folder): path.read_bytes() for path in paths}

    assert found("whole") == found("parts") and len(found("whole")) == 7
    assert run(verb, *words, "--output-dir", tmp_path / "whole", "--part", "3/3") == 2
