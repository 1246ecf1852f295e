"""`megatron-cpt blend ...` does from the command line what the library does."""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import yaml
from tokenizers import Tokenizer, models

from megatron_cpt import cli
from megatron_cpt.data.lists.data_list import read_data_list
from megatron_cpt.data.shards.indexed import bin_path, idx_path, manifest_path, write_index
from megatron_cpt.data.tokenizer.interface import load_tokenizer
from megatron_cpt.files import write_json

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A task with two tokenized corpora below the working folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    vocabulary = {"<|endoftext|>": 0} | {f"w{index}": index for index in range(1, 100)}
    Tokenizer(models.WordLevel(vocabulary, unk_token="w1")).save("data/tokenizer.json")
    identity = load_tokenizer(tmp_path / "data" / "tokenizer.json").identity
    for name, tokens in (("D0", 32 * 300), ("D1", 32 * 200)):
        prefix = tmp_path / "data" / "tok" / name / "a_text_document"
        prefix.parent.mkdir(parents=True)
        lengths = np.full(tokens // 25, 25)
        np.arange(lengths.sum(), dtype=np.uint16).tofile(bin_path(prefix))
        write_index(idx_path(prefix), np.dtype(np.uint16), lengths)
        manifest = {"documents": len(lengths), "tokens": int(lengths.sum()), "bytes": 1, "tokenizer": identity}
        write_json(manifest_path(prefix), manifest)
    model = {
        "num_layers": 2,
        "hidden_size": 16,
        "ffn_hidden_size": 32,
        "num_attention_heads": 2,
        "vocab_size": 100,
        "max_position_embeddings": 32,
    }
    training = {"seq_length": 32, "micro_batch_size": 1, "global_batch_size": 4}
    corpora = {name: {"tokens": [f"tok/{name}"]} for name in ("D0", "D1")}
    data = {"tokenizer": "tokenizer.json", "corpora": corpora, "mix": {"D0": 0.95, "D1": 0.05}, "buffer": "buffer.yaml"}
    (tmp_path / "task" / "params").mkdir(parents=True)
    (tmp_path / "task" / "params" / "tiny.yaml").write_text(yaml.safe_dump({"model": model, "training": training}))
    (tmp_path / "task" / "task.yaml").write_text(
        yaml.safe_dump({"description": "t", "data": data, "sizes": {"6K": {"training": {"train_tokens": 6400}}}})
    )
    return tmp_path


def run(capsys, *words):
    with pytest.raises(SystemExit) as left:
        cli.main(["blend", *words])
    captured = capsys.readouterr()
    return left.value.code, captured.out, captured.err


STAGE = ("--task", "task", "--params", "tiny", "--size", "6K")


def test_plan_prints_the_table_and_writes_the_list_of_the_run(project, capsys):
    code, out, _ = run(capsys, "plan", *STAGE, "--write")
    assert code == 0
    assert "50 iterations, 200 samples, 6,400 tokens" in out
    entries = read_data_list(project / "runs/task/tiny/6K/main/train_data.yaml")
    assert [(entry.corpus, entry.tokens) for entry in entries] == [("D0", 6080), ("D1", 320)]


def test_plan_refuses_with_the_reasons_and_exit_code_2(project, capsys):
    manifest_path(project / "data/tok/D1/a_text_document").unlink()
    code, _, err = run(capsys, "plan", *STAGE, "data.mix={D0: 0.2, D1: 0.8}")
    assert code == 2
    assert "incomplete shard data/tok/D1/a_text_document" in err
    code, _, err = run(capsys, "plan", *STAGE, "data.mix={D0: 0.5, D1: 0.4}")
    assert code == 2 and "sums to 0.9" in err


def test_list_convert_and_rescale_follow_each_other(project, capsys):
    assert run(capsys, "list", "data/tok", "--format", "llm-jp", "--output", "all.sh")[0] == 0
    assert "9600 data/tok/D0/a_text_document" in (project / "all.sh").read_text()
    code, out, _ = run(capsys, "convert", "all.sh", "--to", "json")
    assert json.loads(out)["train"] == ["9600", "data/tok/D0/a_text_document", "6400", "data/tok/D1/a_text_document"]
    code, out, err = run(
        capsys, "rescale", "all.sh", "10K", "--share", "D0=0.9", "--share", "D1=0.1", "--output", "10K.sh"
    )
    assert code == 0, err
    assert [entry.tokens for entry in read_data_list(project / "10K.sh")] == [9000, 1000]
    code, _, err = run(capsys, "rescale", "all.sh", "100K")
    assert code == 2 and "more than 4 times" in err


def test_an_incomplete_shard_stops_the_listing_by_name(project, capsys):
    idx_path(project / "data/tok/D0/a_text_document").unlink()
    code, _, err = run(capsys, "list", "data/tok", "--output", "all.sh")
    assert code == 2 and "incomplete shard data/tok/D0/a_text_document" in err
    assert not (project / "all.sh").exists()


def test_build_index_builds_once(project, capsys):
    code, out, err = run(capsys, "build-index", *STAGE)
    assert code == 0, err
    assert "200 samples of 2 shards" in out
    cache = project / "runs/task/tiny/6K/main/cache"
    before = {path: path.stat().st_mtime_ns for path in cache.rglob("*")}
    assert before
    assert run(capsys, "build-index", *STAGE)[0] == 0
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*")} == before


def test_build_index_with_several_processes_builds_what_one_builds(project, capsys):
    assert run(capsys, "build-index", *STAGE, "paths.runs_dir=one")[0] == 0
    code, _, err = run(capsys, "build-index", *STAGE, "--workers", "2", "paths.runs_dir=two")
    assert code == 0, err
    files = [
        {path.relative_to(project / runs): path.read_bytes() for path in (project / runs).rglob("*.npy")}
        for runs in ("one", "two")
    ]
    assert files[0] == files[1] and files[0]


def test_the_list_of_a_run_that_has_begun_is_not_rewritten(project, capsys):
    run(capsys, "plan", *STAGE, "--write")
    path = project / "runs/task/tiny/6K/main/train_data.yaml"
    before = path.read_text()
    checkpoints = path.parent / "checkpoints"
    (checkpoints / "iter_0000002").mkdir(parents=True)
    (checkpoints / "latest_checkpointed_iteration.txt").write_text("2")
    assert run(capsys, "plan", *STAGE, "--write")[0] == 0
    code, _, err = run(capsys, "plan", *STAGE, "--write", "data.mix={D0: 0.5, D1: 0.5}")
    assert code == 2 and "the run has begun with this list" in err
    assert path.read_text() == before


def test_replay_plans_from_lists_and_buffer_and_appends(project, capsys):
    run(capsys, "list", "data/tok/D0", "--output", "D0.yaml")
    run(capsys, "list", "data/tok/D1", "--output", "D1.yaml")
    options = ("--seq-length", "32")
    assert run(capsys, "replay", "append", "b.yaml", "--stage", "one", "--list", "D0.yaml", *options)[0] == 0
    plan = ("--mix", "D1=0.9", "buffer=0.1", "--lists", "D1.yaml", "--tokens", "6400", "--output", "two.yaml", *options)
    code, out, err = run(capsys, "replay", "plan", "b.yaml", *plan)
    assert code == 0, err
    assert [(e.corpus, e.tokens, e.first_sample) for e in read_data_list(project / "two.yaml")] == [
        ("D1", 5760, None),
        ("buffer", 640, 0),
    ]
    run(capsys, "replay", "append", "b.yaml", "--stage", "two", "--list", "two.yaml", *options)
    code, out, _ = run(capsys, "replay", "show", "b.yaml")
    assert "640" in out and "stages: one, two" in out
    code, _, err = run(capsys, "replay", "plan", "b.yaml", *plan)
    assert code == 2 and "two.yaml: exists already and holds something else" in err
    assert read_data_list(project / "two.yaml")[-1].first_sample == 0
    run(capsys, "replay", "plan", "b.yaml", *plan, "--overwrite")
    assert read_data_list(project / "two.yaml")[-1].first_sample == 20


def test_replay_says_what_is_wrong_with_its_words(project, capsys):
    run(capsys, "list", "data/tok/D0", "--output", "D0.yaml")
    words = ("replay", "plan", "b.yaml", "--mix", "D0=1", "--lists", "D0.yaml")
    assert "'many' is not a whole number" in run(capsys, *words, "--tokens", "many")[2]
    (project / "weights.txt").write_text("0.5 data/tok/D0/a_text_document\n")
    code, _, err = run(capsys, "replay", "append", "b.yaml", "--stage", "one", "--list", "weights.txt")
    assert code == 2 and "Token counts are whole numbers" in err


def test_list_leaves_out_empty_shards_with_a_warning_follows_links_and_names_each_shard_once(project, capsys):
    for name, target in (("linked", "../tok/D0"), ("empty", None)):
        (project / "data/more").mkdir(exist_ok=True)
        if target:
            (project / "data/more" / name).symlink_to(target)
    empty = project / "data/more/empty_text_document"
    bin_path(empty).write_bytes(b"")
    write_index(idx_path(empty), np.dtype(np.uint16), np.array([], dtype=np.int32))
    write_json(manifest_path(empty), {"documents": 0, "tokens": 0, "tokenizer": {}})
    code, out, err = run(capsys, "list", "data/more", "data/tok/D0", "--format", "weights")
    assert (code, out) == (0, "9600 data/more/linked/a_text_document\n")
    assert "empty_text_document: left out; it holds no token" in err
    code, _, err = run(capsys, "list", str(empty))
    assert code == 2 and "no shard with a token" in err


def test_outputs_are_never_replaced_unasked(project, capsys):
    (project / "all.sh").write_text("mine\n")
    for words in (("list", "data/tok/D0"), ("convert", "D0.yaml", "--to", "csv")):
        run(capsys, "list", "data/tok/D0", "--output", "D0.yaml")
        code, _, err = run(capsys, *words, "--output", "all.sh")
        assert code == 2 and "all.sh: exists already" in err
        assert (project / "all.sh").read_text() == "mine\n"
    assert run(capsys, "list", "data/tok/D0", "--output", "all.sh", "--overwrite")[0] == 0
    before = (project / "all.sh").stat().st_mtime_ns
    assert run(capsys, "list", "data/tok/D0", "--output", "all.sh")[0] == 0
    assert (project / "all.sh").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--cap", "1/0"), "'1/0' is not a number above 0"),
        (("--max-epochs", "-1"), "'-1' is not a number above 0"),
        (("--seq-length", "0"), "'0' is not a whole number above 0"),
        (("--base", "D0", "--base-ratio", "x"), "'x' is not a number above 0"),
    ],
)
def test_rescale_says_which_number_is_wrong(project, capsys, words, message):
    run(capsys, "list", "data/tok/D0", "--output", "D0.yaml")
    code, _, err = run(capsys, "rescale", "D0.yaml", "10K", *words)
    assert code == 2 and message in err


def test_a_mix_may_name_the_buffer_only_where_there_is_one(project, capsys):
    shard = '{prefix: "data/tok/D0/a_text_document", corpus: D0, added_by: one, drawn_tokens: 640}'
    (project / "data" / "buffer.yaml").write_text(f"format: 1\nstages: [one]\nshards:\n- {shard}\n")
    code, out, err = run(capsys, "plan", *STAGE, "data.mix={D1: 0.9, buffer: 0.1}")
    assert code == 0, err
    assert "continues after 20 samples" in out
    code, _, err = run(capsys, "plan", *STAGE, "data.mix={D1: 0.9, buffer: 0.1}", "data.buffer=null")
    assert code == 2 and "names buffer, which is no corpus" in err


def test_formats_shows_every_format(project, capsys):
    _, out, _ = run(capsys, "formats")
    assert "llm-jp" in out and "export TRAIN_DATA_PATH=(" in out


def test_the_shell_tools_list_a_tree_and_rescale_it_to_a_size(project):
    def tool(name, *words):
        return subprocess.run([ROOT / "tools" / name, *words], capture_output=True, text=True, check=False)

    done = tool("build_train_data.sh", "data/tok")
    assert (done.returncode, done.stdout) == (0, "train_data.all.sh: 2 shards, 16,000 tokens\n"), done.stderr
    done = tool("update_train_data.sh", "10K", "--ratio", "/D0/=0.25", "--ratio", "*=1")
    assert done.returncode == 0, done.stderr
    entries = read_data_list(project / "train_data_10K.sh")
    assert sum(entry.tokens for entry in entries) == 10000
    assert [entry.tokens for entry in entries] == [2727, 7273]  # 2400 to 6400
    manifest_path(project / "data/tok/D1/a_text_document").unlink()
    done = tool("build_train_data.sh", "data/tok", "other.sh")
    assert done.returncode == 2 and "incomplete shard data/tok/D1/a_text_document" in done.stderr
    assert not (project / "other.sh").exists()
    assert tool("update_train_data.sh").returncode == 2


def test_lists_of_two_and_of_three_columns_mix(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("papers.txt").write_text("1 a_text_document\n3 b_text_document\n")
    Path("dolma.txt").write_text("0.5 c_text_document books\n0.5 d_text_document web\n")
    code, out, err = run(capsys, "mix", "--inputs", "0.9", "papers.txt", "0.1", "dolma.txt")
    assert code == 0, err
    assert out == (
        "0.225 a_text_document papers\n0.675 b_text_document papers\n0.05 c_text_document books\n0.05 d_text_document web\n"
    )
    code, out, _ = run(capsys, "mix", "--inputs", "1", "papers.txt", "1", "dolma.txt", "--format", "weights")
    assert code == 0 and out.splitlines()[0] == "0.125 a_text_document"
    Path("web.txt").write_text("1 e_text_document\n")
    code, _, err = run(capsys, "mix", "--inputs", "1", "web.txt", "1", "dolma.txt")
    assert code == 2 and "its name is that of a corpus in another list" in err
