"""Conversations to masked shards: what is taken, what is refused, what happens on a second run."""

import gzip
import itertools
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from megatron_cpt.cli import main
from megatron_cpt.data.reading.turns import BadConversation, turns_of
from megatron_cpt.data.shards.indexed import (
    bin_path,
    document_bounds,
    idx_path,
    read_index,
    read_shard_manifest,
    read_tokens,
)
from megatron_cpt.data.shards.masked import LEARNED, PIECE, mask_prefix, read_mask
from megatron_cpt.data.tokenizer.interface import load_tokenizer

TEMPLATE = """{% for m in messages %}{{ '<|im_start|>' ~ m.role ~ '\n' ~ m.content ~ '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""


def chat(*contents, key="conversations", **fields):
    roles = ["user", "assistant"] * len(contents)
    return {key: [{"role": role, "content": text} for role, text in zip(roles, contents)]} | fields


def write_lines(path, records):
    data = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.fixture
def template(tmp_path):
    path = tmp_path / "chatml.jinja"
    path.write_text(TEMPLATE)
    return path


@pytest.fixture
def prepare(tmp_path, chat_dir, template, capsys):
    """Return a function: (inputs, options) -> (exit code, output); shards go to tokens/a."""

    def run(*inputs, options=(), prefix="tokens/a", workers=1):
        arguments = ["data", "prepare-chat", "--input", *map(str, inputs), "--tokenizer", str(chat_dir)]
        arguments += ["--template", str(template), "--output-prefix", str(tmp_path / prefix)]
        with pytest.raises(SystemExit) as left:
            main([*arguments, "--workers", str(workers), *map(str, options)])
        said = capsys.readouterr()
        return left.value.code, said.out + said.err

    return run


def documents(prefix, chat_dir):
    """Return (text, learned text) of each document of a masked shard."""
    tokenizer, index = load_tokenizer(chat_dir), read_index(prefix)
    bounds, ids, mask = document_bounds(index), read_tokens(index), read_mask(index)
    found = []
    for start, end in itertools.pairwise(bounds):
        flags = mask[start:end]
        assert flags[0] & PIECE and not (flags[1:] & PIECE).any()
        assert ids[end - 1] == tokenizer.eod_id
        learned = ids[start:end][(flags & LEARNED).astype(bool)]
        found.append((tokenizer.decode(ids[start:end]), tokenizer.decode(learned)))
    return found


def test_conversations_of_every_spelling_and_completion_data_become_one_shard(prepare, tmp_path, chat_dir):
    import pyarrow as pa
    import pyarrow.parquet as pq

    shared = [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "b?"},
        {"from": "gpt", "value": "b!"},
    ]
    parts = [{"role": "user", "content": [{"type": "text", "text": "c?"}]}, {"role": "assistant", "content": "c!"}]
    write_lines(tmp_path / "in/1.jsonl", [chat("a?", "a!", "more?", "more!"), {"text": "Prose, learned whole."}])
    write_lines(tmp_path / "in/2.jsonl.gz", [{"conversations": shared, "id": 7}, {"messages": parts}])
    pq.write_table(pa.Table.from_pylist([chat("d?", "d!", lang="eu")]), tmp_path / "in/3.parquet")
    code, said = prepare(tmp_path / "in", options=["--text-key", "text"])
    assert code == 0, said
    prefix = tmp_path / "tokens/a_chat_document"
    assert [learned for _, learned in documents(prefix, chat_dir)] == [
        "a!<|im_end|>more!<|im_end|>",
        "Prose, learned whole.<|end_of_text|>",
        "b!<|im_end|>",
        "c!<|im_end|>",
        "d!<|im_end|>",
    ]
    manifest = read_shard_manifest(prefix)
    assert manifest["statistics"]["turns"] == {"system": 1, "user": 5, "assistant": 5}
    assert (manifest["documents"], manifest["mask"]["pieces"]) == (5, 5)
    assert sum(source["documents"] for source in manifest["sources"]) == 5
    assert "4 conversations (1 system, 5 user, 5 assistant turns), 1 texts" in said
    assert np.load(f"{prefix}.provenance.npy").tolist() == [[0, 1], [0, 2], [1, 1], [1, 2], [2, 1]]


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ("a text", "not a list of turns"),
        ([], "no turns"),
        (["a"], "turn is not an object of role and content"),
        ([{"speaker": "me"}], "turn is not an object of role and content"),
        ([{"role": "robot", "content": "a"}], "unknown role"),
        ([{"role": None, "from": "user", "content": "a"}] * 2, "two user turns in a row"),
        (chat("a", "b")["conversations"][1:], "begins with the assistant"),
        (chat("a", " \n")["conversations"], "empty answer"),
        (chat("", "b")["conversations"], "empty prompt"),
        (chat("a", None)["conversations"], "null text"),
        (chat("a", 3)["conversations"], "text is not a string"),
        (chat("a")["conversations"], "no assistant turn"),
        (chat("a", "b", "c")["conversations"], "ends with the user"),
        ([*chat("a", "b")["conversations"], {"role": "system", "content": "s"}], "system turn is not the first"),
        ([*chat("a", "b")["conversations"], {"role": "assistant", "content": "s"}], "two assistant turns in a row"),
        (chat("a", [{"type": "image"}])["conversations"], "text is not a string"),
    ],
)
def test_a_bad_conversation_is_named(turns, reason):
    with pytest.raises(BadConversation) as bad:
        turns_of(turns)
    assert bad.value.kind == reason


def test_an_empty_system_prompt_is_none():
    assert turns_of([{"role": "system", "content": ""}, *chat("a", "b")["conversations"]]) == turns_of(
        [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    )


def test_bad_conversations_stop_the_work_or_are_counted_and_kept_aside(prepare, tmp_path):
    path = tmp_path / "in.jsonl"
    lines = [chat("a?", "a!"), chat("b?"), {"other": 1}, chat("c?", "</s> is a control token"), chat("d?", "d!")]
    write_lines(path, lines)
    path.write_bytes(path.read_bytes() + b"{broken\n")
    code, said = prepare(path)
    assert code == 2 and f"{path}:2: no assistant turn" in said and "--on-bad skip" in said
    assert not list((tmp_path / "tokens").iterdir())
    code, said = prepare(path, options=["--on-bad", "skip"])
    assert code == 0
    rejects = [json.loads(line) for line in (tmp_path / "tokens/a.rejects.jsonl").read_text().splitlines()]
    assert [(entry["line"], entry["reason"]) for entry in rejects] == [
        (2, "no assistant turn"),
        (3, "missing key"),
        (4, "control token in a message"),
        (6, "invalid JSON"),
    ]
    assert json.loads(rejects[0]["raw"]) == lines[1]
    assert "no assistant turn: 1" in said and "rejects.jsonl" in said
    assert read_shard_manifest(tmp_path / "tokens/a_chat_document")["documents"] == 2


def test_filters_duplicate_prompts_and_validation_sets(prepare, tmp_path, chat_dir):
    records = [
        chat(f"q {lang} {n}", f"answer {lang} {n}", lang=lang, id=f"x_{n}") for n in range(20) for lang in ("eu", "en")
    ]
    records += [chat(f"q  en\n{n}", "again", lang="en", id=f"y_{n}") for n in range(5)]
    records += [chat("unwanted", "no", lang="en", id=f"translation_{n}") for n in range(3)]
    path = write_lines(tmp_path / "in.jsonl", records)
    options = ["--drop", "id^=translation_", "--dedup-prompts", "--held-out", "4", "--held-out-by", "lang"]
    code, said = prepare(path, options=options)
    assert code == 0, said
    assert "filtered: 3" in said and "duplicate prompt: 5" in said
    sides = {
        name: {learned for _, learned in documents(tmp_path / f"tokens/a{name}_chat_document", chat_dir)}
        for name in ("", "_held_out_eu", "_held_out_en")
    }
    assert [len(sides[name]) for name in sides] == [32, 4, 4]
    assert not sides[""] & (sides["_held_out_eu"] | sides["_held_out_en"])
    assert all("answer eu" in text for text in sides["_held_out_eu"])

    more = [
        chat(f"fresh {n}", f"answer {lang} fresh {n}", lang=lang, id="z") for n in range(30) for lang in ("eu", "en")
    ]
    write_lines(path, [*more, *records])
    options += ["--held-out-from", tmp_path / "tokens/a.held_out.json"]
    code, said = prepare(path, options=options, prefix="tokens/b")
    assert code == 0, said
    for name, old in sides.items():
        new = {learned for _, learned in documents(tmp_path / f"tokens/b{name}_chat_document", chat_dir)}
        assert old <= new  # what was held out stays so, what was learned stays so
        assert all("fresh" in text for text in new - old)


def test_a_random_subset_depends_on_what_is_said_only(prepare, tmp_path, chat_dir):
    records = [chat(f"q{n}", f"a{n}") for n in range(50)]
    drawn = []
    for order in (records, records[::-1]):
        path = write_lines(tmp_path / f"{len(drawn)}.jsonl", order)
        code, said = prepare(path, options=["--number", "10"], prefix=f"tokens/{len(drawn)}")
        assert code == 0 and "not drawn: 40" in said
        drawn.append({text for text, _ in documents(tmp_path / f"tokens/{len(drawn)}_chat_document", chat_dir)})
    assert drawn[0] == drawn[1] and len(drawn[0]) == 10
    code, said = prepare(path, options=["--number", "51"], prefix="tokens/2")
    assert code == 2 and "only 50 conversations are left to draw from; 51 are wanted" in said


def test_a_long_conversation_is_cut_after_an_assistant_turn(prepare, tmp_path, chat_dir):
    path = write_lines(
        tmp_path / "in.jsonl", [chat(*(f"turn {n}" for n in range(10))), chat("long " * 50, "b"), chat("c", "d")]
    )
    code, said = prepare(path, options=["--max-length", "60"])
    assert code == 0 and "cut at a turn: 1" in said and "conversation too long: 1" in said
    found = documents(tmp_path / "tokens/a_chat_document", chat_dir)
    assert found[0][1].startswith("turn 1<|im_end|>turn 3<|im_end|>") and found[0][1] != found[1][1]
    assert found[0][0].endswith("<|im_end|>\n<|end_of_text|>") and found[1][1] == "d<|im_end|>"
    lengths = read_index(tmp_path / "tokens/a_chat_document").sequence_lengths
    assert lengths.max() <= 60 and lengths[0] > 40
    code, said = prepare(path, options=["--max-length", "60", "--on-long", "fail"], prefix="tokens/b")
    assert code == 2 and f"{path}:1: conversation too long" in said


def test_a_second_run_keeps_the_shard_and_a_changed_one_is_refused(prepare, tmp_path, template):
    path = write_lines(tmp_path / "in.jsonl", [chat("a?", "a!")])
    assert prepare(path)[0] == 0
    stamp = bin_path(tmp_path / "tokens/a_chat_document").stat()
    assert prepare(path)[0] == 0
    assert bin_path(tmp_path / "tokens/a_chat_document").stat() == stamp
    code, said = prepare(path, options=["--train-on-eos", "none"])
    assert code == 2 and "was made with train_on_eos='turn', not 'none'" in said
    template.write_text(TEMPLATE + " ")
    code, said = prepare(path)
    assert code == 2 and "another chat template" in said
    template.write_text(TEMPLATE)
    write_lines(path, [chat("a?", "b!!")])
    code, said = prepare(path)
    assert code == 2 and "other inputs, or they changed" in said


def test_the_date_of_the_first_run_stays(prepare, tmp_path, template):
    path = write_lines(tmp_path / "in.jsonl", [chat("a?", "a!")])
    template.write_text("{{ strftime_now('%Y') }}" + TEMPLATE)
    assert prepare(path, options=["--date", "2024-07-26"])[0] == 0
    assert prepare(path)[0] == 0
    code, said = prepare(path, options=["--date", "2025-01-01"])
    assert code == 2 and "was made with the date 2024-07-26" in said


def test_a_tokenizer_without_the_templates_tokens_is_warned_of(prepare, tmp_path, bpe_dir):
    path = write_lines(tmp_path / "in.jsonl", [chat("a?", "a!")])
    code, said = prepare(path, options=["--tokenizer", bpe_dir])
    assert code == 0 and "ends no answer with a special token" in said
    assert documents(tmp_path / "tokens/a_chat_document", bpe_dir)[0][1] == "a!<|im_end|><|end_of_text|>"


def test_workers_change_nothing(prepare, tmp_path):
    records = [chat(f"question {n} " * 200, f"answer {n} " * 300) for n in range(400)]
    path = write_lines(tmp_path / "in.jsonl.gz", records)
    for prefix, workers in (("tokens/one", 1), ("tokens/two", 2)):
        code, said = prepare(path, options=["--dedup-prompts"], prefix=prefix, workers=workers)
        assert code == 0, said
    one, two = tmp_path / "tokens/one_chat_document", tmp_path / "tokens/two_chat_document"
    for pair in ((one, two), (mask_prefix(one), mask_prefix(two))):
        for path_of in (bin_path, idx_path):
            assert path_of(pair[0]).read_bytes() == path_of(pair[1]).read_bytes()


def test_packing_at_once_gives_packs_and_leaves_no_unpacked_shard(prepare, tmp_path, chat_dir):
    records = [chat(f"q{n}", f"a{n} " * (n % 7), lang="eu") for n in range(1, 60) if n % 7]
    path = write_lines(tmp_path / "in.jsonl", [*records, {"text": "word " * 300}])
    options = ["--pack", "64", "--text-key", "text", "--held-out", "5", "--train-on-eos", "last"]
    code, said = prepare(path, options=options)
    assert code == 0 and "packs of 64 tokens" in said, said
    assert sorted(entry.name for entry in (tmp_path / "tokens").iterdir() if entry.suffix == ".json") == [
        "a.held_out.json",
        "a_chat_document.json",
        "a_held_out_chat_document.json",
    ]
    assert not [entry for entry in (tmp_path / "tokens").iterdir() if entry.name.startswith(".")]
    index = read_index(tmp_path / "tokens/a_chat_document")
    assert set(index.sequence_lengths.tolist()) == {64}
    manifest = read_shard_manifest(tmp_path / "tokens/a_chat_document")
    assert manifest["packed"]["split_documents"] == 1 and manifest["packed"]["lost_tokens"] == 0
    assert manifest["packed"]["fill"] > 0.9
    rows = np.load(tmp_path / "tokens/a_chat_document.provenance.npy")
    assert len(rows) == manifest["mask"]["pieces"]
    code, said = prepare(path, options=options)
    assert code == 0, said
    code, said = prepare(path, options=[*options, "--max-packs", "3"])
    assert code == 2 and "was made with pack=" in said


@pytest.fixture
def verb(capsys):
    """Return a function: words of a command -> (exit code, output)."""

    def run(*words):
        with pytest.raises(SystemExit) as left:
            main([str(word) for word in words])
        said = capsys.readouterr()
        return left.value.code, said.out + said.err

    return run


@pytest.mark.parametrize("options", [[], ["--pack", "64"]], ids=["unpacked", "packed"])
def test_lists_audits_merges_and_traces_take_a_masked_shard_as_one(prepare, verb, tmp_path, chat_dir, options):
    for name in "ab":
        records = [chat(f"{name} asks {n}", f"{name} answers {n}") for n in range(20)]
        path = write_lines(tmp_path / f"{name}.jsonl", records)
        assert prepare(path, prefix=f"tokens/{name}", options=[*options, "--held-out", "2"])[0] == 0
    tokens = tmp_path / "tokens"
    code, said = verb("blend", "list", tokens)
    assert (
        code == 0 and said.count("prefix:") == said.count("left out; it is a validation") == 2 and ".mask" not in said
    ), said
    merged = tokens / "both_chat_document"
    code, said = verb(
        "data", "merge", "--output-prefix", merged, "--input", *(tokens / f"{name}_chat_document" for name in "ab")
    )
    assert code == 0 and "2 shards" in said, said
    manifests = [read_shard_manifest(tokens / f"{name}_chat_document") for name in "ab"]
    joined = read_shard_manifest(merged)
    assert joined["mask"]["learned"] == sum(manifest["mask"]["learned"] for manifest in manifests)
    assert joined["statistics"]["turns"] == {"system": 0, "user": 36, "assistant": 36}
    code, said = verb("data", "audit", "--input", tokens, "--tokenizer", chat_dir)
    assert code == 0 and said.count("its mask fits") == 5 and "5 shards" in said, said
    samples = [int(count) for count in re.findall(r"([0-9]+) samples encode to the same ids and masks", said)]
    assert sorted(samples) == [2, 2, 18, 18, 36]
    code, said = verb("data", "trace", merged, "--tokenizer", chat_dir, "--document", joined["documents"] - 1)
    *_, where, text = said.splitlines()
    line = int(where.rpartition(":")[2])
    assert code == 0 and f"b.jsonl:{line}" in where and f"b answers {line - 1}" in text
    code, said = verb("data", "trace", merged, "--token", "3")
    assert code == 0 and "a.jsonl:" in said


def test_an_audit_finds_a_mask_that_does_not_fit(prepare, verb, tmp_path, chat_dir):
    path = write_lines(tmp_path / "a.jsonl", [chat(f"asks {n}", f"answers {n}") for n in range(9)])
    assert prepare(path, options=["--pack", "64"])[0] == 0
    prefix = tmp_path / "tokens/a_chat_document"
    masks = bin_path(mask_prefix(prefix))
    whole = masks.read_bytes()
    for damage, message in (
        (bytes(len(whole)), "do not start a piece"),
        (whole[:-1], "holds .* bytes; its index promises"),
        (whole.replace(b"\x02\x00\x00", b"\x02\x01\x00"), "in the manifest"),
        (None, "no such file"),
    ):
        if damage is None:
            masks.unlink()
        else:
            masks.write_bytes(damage)
        code, said = verb("data", "audit", "--input", prefix, "--tokenizer", chat_dir)
        assert code == 1 and re.search(message, said), said


def test_an_audit_finds_a_conversation_that_its_source_does_not_give(prepare, verb, tmp_path, chat_dir):
    texts = [chat(*(f"turn {n} of {i}" for n in range(6))) for i in range(9)]
    path = write_lines(tmp_path / "a.jsonl", [*texts, {"text": "long text " * 99}])
    assert prepare(path, options=["--pack", "64", "--text-key", "text"])[0] == 0
    prefix = tmp_path / "tokens/a_chat_document"
    audit = ("data", "audit", "--input", prefix, "--tokenizer", chat_dir)
    code, said = verb(*audit)
    assert code == 0 and "9 samples" in said  # conversations cut to a pack; the split text is passed over
    source, status = path.read_bytes(), path.stat()
    for change in ((b"turn 1 of", b"turn 7 of"), (b"turn 0 of", b"turn 6 of")):  # an answer, a question
        path.write_bytes(source.replace(*change))
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        code, said = verb(*audit)
        assert code == 1 and "gives other ids or another mask than piece" in said
    path.write_bytes(source)
    code, said = verb(*audit)
    assert code == 1 and "is gone or changed since" in said
    ids = np.memmap(bin_path(prefix), dtype=np.uint16, mode="r+")
    ids[5] += 1
    ids.flush()
    code, said = verb(*audit)
    assert code == 1 and "its checksum differs" in said


def test_packs_of_a_tokenized_corpus_are_audited_and_traced(verb, tmp_path, bpe_dir):
    path = write_lines(tmp_path / "a.jsonl", [{"text": f"document {n} " * n} for n in range(1, 30)])
    plain, packed = tmp_path / "tokens/a_text_document", tmp_path / "packed/a_text_document"
    words = ["--input", path, "--tokenizer", bpe_dir, "--output-prefix", tmp_path / "tokens/a", "--provenance"]
    assert verb("tokenize", *words, "--workers", "1")[0] == 0
    code, said = verb("data", "pack", "--input", plain, "--output", packed, "--seq-length", "128")
    assert code == 0 and "packs of 128 tokens" in said
    code, said = verb("data", "audit", "--input", packed, "--tokenizer", bpe_dir)
    assert code == 0 and "its mask fits" in said, said
    code, said = verb("data", "trace", packed, "--document", "0", "--tokenizer", bpe_dir)
    places = said.splitlines()[::2]
    assert code == 0 and all(f"{path}:" in place for place in places) and "pack 0, token 0" in places[0]


def test_an_interrupted_packing_goes_on_unless_the_inputs_changed(prepare, tmp_path, monkeypatch):
    def fail(*_):
        raise KeyboardInterrupt

    path = write_lines(tmp_path / "in.jsonl", [chat(f"q{n}", f"a{n}") for n in range(30)])
    options = ["--pack", "64", "--held-out", "3"]
    with monkeypatch.context() as patch:
        patch.setattr("megatron_cpt.data.chat.driver.pack_shard", fail)
        assert prepare(path, options=options)[0] == 130
    assert [entry.name for entry in (tmp_path / "tokens").iterdir()] == [".a.unpacked"]
    with monkeypatch.context() as patch:
        patch.setattr("megatron_cpt.data.chat.driver.ChatWriting.run", fail)  # nothing is encoded again
        assert prepare(path, options=options)[0] == 0
        (tmp_path / "tokens/a.held_out.json").unlink()
        assert prepare(path, options=options)[0] == 0
    assert (tmp_path / "tokens/a.held_out.json").exists()
    with monkeypatch.context() as patch:
        patch.setattr("megatron_cpt.data.chat.driver.pack_shard", fail)
        assert prepare(path, options=options, prefix="tokens/b")[0] == 130
    write_lines(path, [chat(f"other {n}", f"a{n}") for n in range(30)])
    code, said = prepare(path, options=options, prefix="tokens/b")
    assert code == 0, said


def test_a_sentencepiece_model_is_refused_since_it_has_no_offsets(prepare, tmp_path, sentencepiece_model):
    path = write_lines(tmp_path / "in.jsonl", [chat("a?", "a!")])
    code, said = prepare(path, options=["--tokenizer", sentencepiece_model])
    assert code == 2 and "is a SentencePiece model" in said


def of_session(session):
    """Return the processes of a session that run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, of = path.read_text().rpartition(")")[2].split()[:4]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(of) == session and state != "Z":
            found.append(int(path.parent.name))
    return found


@pytest.mark.slow
def test_workers_end_with_a_killed_command(tmp_path, chat_dir, template):
    """Killed while they load, while they look and while they encode: no process of the command stays."""
    records = [chat(f"question {n} " * 40, f"answer {n} " * 60) for n in range(20_000)]
    path = write_lines(tmp_path / "in.jsonl", records)
    arguments = ["--input", path, "--tokenizer", chat_dir, "--template", template, "--dedup-prompts"]
    command = [sys.executable, "-m", "megatron_cpt", "data", "prepare-chat", *map(str, arguments), "--workers", "3"]
    for number, processes in enumerate((3, 5, 5)):
        output = ["--output-prefix", str(tmp_path / f"tokens{number}/a")]
        environment = {**os.environ, "PYTHONPATH": os.getcwd()}
        process = subprocess.Popen(
            [*command, *output], env=environment, start_new_session=True, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 120
        while len(of_session(process.pid)) < processes and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.5 * number)
        assert process.poll() is None
        process.kill()
        process.wait()
        while of_session(process.pid) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not of_session(process.pid)
