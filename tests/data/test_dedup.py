"""Deduplication finds what is alike, keeps the same document every time, and survives being killed."""

import json
import random
import subprocess
import sys
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_cpt import cli
from megatron_cpt.data.cleaning import dedup as dedup_module
from megatron_cpt.data.cleaning.clusters import _union, bands_and_rows
from megatron_cpt.data.cleaning.dedup import DedupOptions, deduplicate
from megatron_cpt.data.cleaning.shingles import shingle_hashes, words_at, words_of
from megatron_cpt.data.cleaning.signatures import MinHashOptions
from megatron_cpt.data.reading.named_corpora import named_corpora
from megatron_cpt.data.reading.record_files import Reading
from megatron_cpt.errors import DataError


def words(rng, count):
    return [f"w{rng.randrange(5000)}" for _ in range(count)]


def write(path, documents):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text, "id": index}) + "\n" for index, text in enumerate(documents)))


def texts(path):
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


@pytest.fixture
def corpora(tmp_path):
    """Sixty unlike documents; b repeats ten of a exactly and ten with one word in 400 changed."""
    rng = random.Random(0)
    base = [words(rng, 400) for _ in range(60)]
    near = [[*document[:200], "changed", *document[201:]] for document in base[10:20]]
    write(tmp_path / "in" / "a.jsonl", [" ".join(document) for document in base])
    write(tmp_path / "in" / "b.jsonl", [" ".join(document) for document in base[:10] + near])
    return tmp_path


def run(folder, output, options=None, reading=None, **more):
    sources = named_corpora([f"a={folder}/in/a.jsonl", f"b={folder}/in/b.jsonl"])
    return deduplicate(sources, folder / output, reading or Reading(), options or DedupOptions(), **more)


def test_exact_and_near_duplicates_go_and_the_first_of_a_cluster_stays(corpora):
    report = run(corpora, "out")
    lines = {"blank_lines": 0, "rejects": {}}
    a = {"documents": 60, "exact": 0, "near": 0, "kept": 60, "removed_share": 0.0, "lines": 60, **lines}
    b = {"documents": 20, "exact": 10, "near": 10, "kept": 0, "removed_share": 1.0, "lines": 20, **lines}
    assert report["corpora"] == {"a": a, "b": b}
    assert report["clusters"] == 20 and report["largest_cluster"] == 2
    assert texts(corpora / "out/a/a.jsonl") == texts(corpora / "in/a.jsonl")
    assert (corpora / "out/b/b.jsonl").read_text() == ""
    assert json.loads((corpora / "out/report.json").read_text()) == json.loads(json.dumps(report))
    example = report["examples"][0]
    assert example["kept"]["line"] == 11 and example["removed"]["line"] == 11
    assert not (corpora / ".out.work").exists()


def test_within_each_corpus_nothing_is_a_duplicate_here(corpora):
    report = run(corpora, "out", DedupOptions(scope="corpus"))
    assert report["kept"] == 80 and report["clusters"] == 0


def test_exact_only_leaves_near_duplicates(corpora):
    report = run(corpora, "out", DedupOptions(minhash=MinHashOptions(is_exact_only=True)))
    assert report["corpora"]["b"]["exact"] == 10 and report["corpora"]["b"]["kept"] == 10


def test_the_longest_document_of_a_cluster_can_stay(corpora):
    rng = random.Random(1)
    document = words(rng, 400)
    longer = [*document, "tail"]
    write(corpora / "in" / "a.jsonl", [" ".join(document)])
    write(corpora / "in" / "b.jsonl", [" ".join(longer)])
    report = run(corpora, "out", DedupOptions(keep="longest"))
    assert report["corpora"]["a"]["kept"] == 0
    assert texts(corpora / "out/b/b.jsonl") == [" ".join(longer)]


def test_workers_and_partitions_change_nothing(corpora):
    run(corpora, "one")
    run(corpora, "two", workers=2, memory_bytes=1 << 10)
    for name in ("a/a.jsonl", "b/b.jsonl"):
        assert (corpora / "one" / name).read_bytes() == (corpora / "two" / name).read_bytes()


@pytest.mark.parametrize(("unit", "memory"), [(1, 1 << 30), (7, 1 << 12), (1000, 1)])
def test_units_and_partitions_of_the_spill_change_nothing(corpora, monkeypatch, unit, memory):
    one = run(corpora, "one")
    monkeypatch.setattr("megatron_cpt.data.cleaning.clusters._MIN_UNIT", unit)
    monkeypatch.setattr("megatron_cpt.data.cleaning.clusters._MAX_UNIT", unit)
    other = run(corpora, "other", memory_bytes=memory if memory > 1 else 1 << 6)
    assert {key: one[key] for key in one if key != "task"} == {key: other[key] for key in other if key != "task"}


def test_documents_below_the_threshold_stay(corpora):
    rng = random.Random(2)
    document = words(rng, 400)
    half = [*document[:250], *words(rng, 150)]
    write(corpora / "in" / "a.jsonl", [" ".join(document)])
    write(corpora / "in" / "b.jsonl", [" ".join(half)])
    assert run(corpora, "out")["kept"] == 2
    assert run(corpora, "low", DedupOptions(minhash=MinHashOptions(threshold=0.3)))["kept"] == 1


def test_recall_and_precision_hold_around_the_threshold(tmp_path):
    rng = random.Random(3)
    left, right = [], []
    for index in range(300):  # half of the pairs far above the threshold, half far below
        document = words(rng, 300)
        changes = 1 if index % 2 else 20
        other = list(document)
        for place in rng.sample(range(300), changes):
            other[place] = f"x{rng.randrange(10**6)}"
        left.append(" ".join(document))
        right.append(" ".join(other))
    write(tmp_path / "in" / "a.jsonl", left)
    write(tmp_path / "in" / "b.jsonl", right)
    report = run(tmp_path, "out")
    assert report["corpora"]["b"]["near"] == 150


def test_a_killed_run_goes_on_and_gives_the_same(corpora, monkeypatch):
    run(corpora, "whole")
    real = dedup_module._write_kept
    calls = []

    def fail_second(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(dedup_module, "_write_kept", fail_second)
    with pytest.raises(KeyboardInterrupt):
        run(corpora, "out")
    with pytest.raises(DataError, match="other inputs or with other options"):
        run(corpora, "out", DedupOptions(keep="longest"))
    stamp = (corpora / "out/a/a.jsonl").stat().st_mtime_ns
    report = run(corpora, "out")
    assert (corpora / "out/a/a.jsonl").stat().st_mtime_ns == stamp
    assert run(corpora, "out") == report and len(calls) == 4  # done: nothing is written again
    for name in ("a/a.jsonl", "b/b.jsonl", "report.json"):
        assert (corpora / "out" / name).read_bytes() == (corpora / "whole" / name).read_bytes()


def test_chats_with_the_same_prompt_count_once(tmp_path):
    def chat(prompt, answer):
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        return json.dumps({"conversations": turns}) + "\n"

    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_text(chat("Hi  there", "A") + chat("Hi there", "B") + chat("Bye", "A"))
    (tmp_path / "in" / "b.jsonl").write_text(chat("Bye", "C"))
    options = DedupOptions(minhash=MinHashOptions(is_prompt=True))
    report = run(tmp_path, "out", options, Reading(key="conversations"))
    assert report["corpora"]["a"]["kept"] == 2 and report["corpora"]["b"]["kept"] == 0


def test_a_bad_line_stops_the_work_with_its_place_or_is_left_out(corpora):
    path = corpora / "in" / "b.jsonl"
    path.write_text(path.read_text() + '{"text": nothing}\n')
    with pytest.raises(DataError, match=r"b.jsonl:21: invalid JSON"):
        run(corpora, "out")
    assert run(corpora, "other", reading=Reading(skip_bad_lines=True))["documents"] == 80


def test_ideographs_are_words_so_that_scripts_without_spaces_have_shingles():
    assert words_of("Hello, 東京タワー2 x") == ["hello", "東", "京", "タ", "ワ", "ー", "2", "x"]
    assert len(shingle_hashes("東京は日本の首都です", 5)) == 6
    assert len(shingle_hashes("two words", 5)) == 1
    assert len(shingle_hashes(" ,. ", 5)) == 0


@settings(max_examples=40, deadline=None)
@given(text=st.text(st.characters(codec="utf-8"), max_size=40))
def test_hashed_words_are_the_words_that_the_pattern_finds(text):
    joined = " ".join(words_of(text))
    assert np.array_equal(shingle_hashes(text, 1), shingle_hashes(joined, 1))
    assert len(shingle_hashes(text, 1)) == len(words_of(text))
    assert len(np.unique(shingle_hashes(text, 1))) == len(set(words_of(text)))


@settings(max_examples=60, deadline=None)
@given(
    text=st.text(
        st.one_of(st.sampled_from("aΣσéﬁ\u0301\u3099ｶ 東京 \n\t.,_9\u00ad"), st.characters(codec="utf-8")), max_size=80
    ),
    part=st.integers(5, 12),
)
def test_a_long_text_in_parts_has_the_hashes_of_the_whole(text, part):
    from megatron_cpt.data.cleaning import shingles

    spaced = "".join(char + " " * (index % 3 == 0) for index, char in enumerate(text))
    whole, words = shingle_hashes(spaced, 3), words_of(spaced)
    before, shingles._PART = shingles._PART, part
    try:
        assert np.array_equal(shingle_hashes(spaced, 3), whole)
    finally:
        shingles._PART = before
    assert words_at(spaced, 2, 3) == words[2:5]


def test_bands_find_nine_of_ten_pairs_at_the_threshold():
    for threshold in (0.5, 0.7, 0.85, 0.95):
        bands, rows = bands_and_rows(64, threshold)
        assert bands * rows <= 64
        assert 1 - (1 - threshold**rows) ** bands >= 0.9


def test_union_joins_chains_to_their_first_document():
    rng = np.random.default_rng(0)
    chain = np.stack([np.arange(999), np.arange(1, 1000)], axis=1)
    assert set(_union(1000, [rng.permutation(chain)]).tolist()) == {0}
    assert _union(4, [np.array([[2, 3]])]).tolist() == [0, 1, 2, 2]


def test_the_verb_prints_the_report_and_never_reuses_an_older_output(corpora, monkeypatch, capsys):
    monkeypatch.chdir(corpora)
    command = ["data", "dedup", "in/a.jsonl", "in/b.jsonl", "--output", "out"]
    with pytest.raises(SystemExit) as left:
        cli.main(command)
    assert left.value.code == 0
    assert "20 clusters, the largest with 2 documents" in capsys.readouterr().out
    with pytest.raises(SystemExit) as left:
        cli.main([*command, "--exact"])
    assert left.value.code == 2
    assert "exists already" in capsys.readouterr().err


def jaccard(left, right, ngram=5):
    sets = [{tuple(text[i : i + ngram]) for i in range(len(text) - ngram + 1)} for text in (left, right)]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def test_duplicates_are_those_that_exact_jaccard_says(tmp_path):
    """64 functions estimate with a standard error of 0.045 at the threshold; 0.13 away from it no pair is mistaken."""
    rng = random.Random(7)
    left, right, similarities = [], [], []
    for index in range(240):
        document = words(rng, 300)
        other = list(document)
        for place in rng.sample(range(300), index % 12):
            other[place] = f"x{rng.randrange(10**6)}"
        left.append(" ".join(document))
        right.append(" ".join(other))
        similarities.append(jaccard(document, other))
    write(tmp_path / "in" / "a.jsonl", left)
    write(tmp_path / "in" / "b.jsonl", right)
    run(tmp_path, "out")
    kept = set(texts(tmp_path / "out/b/b.jsonl"))
    removed = [similarity for similarity, text in zip(similarities, right, strict=True) if text not in kept]
    stayed = [similarity for similarity, text in zip(similarities, right, strict=True) if text in kept]
    assert len(removed) > 60 and len(stayed) > 60
    assert max(stayed) < 0.98 and min(removed) > 0.72
    at_threshold = [abs(s - 0.85) for s in [s for s in removed if s < 0.85] + [s for s in stayed if s >= 0.85]]
    assert len(at_threshold) < 0.15 * 240


def test_the_defaults_are_snakmodels():
    options = DedupOptions().minhash
    assert (options.ngram, options.num_perm, options.threshold, options.seed) == (5, 64, 0.85, 42)


def test_a_huge_bucket_of_boilerplate_is_one_cluster_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_cpt.data.cleaning.clusters._GATHERED", 7)
    rng = random.Random(5)
    notice = words(rng, 100)
    write(tmp_path / "in" / "a.jsonl", [" ".join([*notice, f"tail{index}"]) for index in range(60)])
    write(tmp_path / "in" / "b.jsonl", [" ".join(words(rng, 100)) for _ in range(5)])
    report = run(tmp_path, "out")
    assert report["corpora"]["a"]["kept"] == 1 and report["corpora"]["b"]["kept"] == 5
    assert report["largest_cluster"] == 60


def test_spellings_of_one_text_in_unicode_are_duplicates(tmp_path):
    base = " ".join(["Käse größe façade naïve ﬁnal ２０２６ ﾃｽﾄ"] * 6)
    for name, text in (("a", base), ("b", unicodedata.normalize("NFKD", base).replace("e", "e\u00ad"))):
        write(tmp_path / "in" / f"{name}.jsonl", [text])
    report = run(tmp_path, "out")
    assert report["corpora"]["b"] | {"near": 1, "kept": 0} == report["corpora"]["b"]


def test_another_command_never_writes_over_a_finished_output(corpora):
    run(corpora, "out")
    before = (corpora / "out/report.json").read_bytes()
    for change in ({"options": DedupOptions(keep="longest")}, {"reading": Reading(skip_bad_lines=True)}):
        with pytest.raises(DataError, match="exists already, from other inputs or options"):
            run(corpora, "out", **change)
    assert (corpora / "out/report.json").read_bytes() == before
    (corpora / "out/b/b.jsonl").unlink()
    with pytest.raises(DataError, match="is gone"):
        run(corpora, "out")


def test_two_processes_do_not_work_in_one_folder(corpora, monkeypatch):
    monkeypatch.setattr(dedup_module, "write_signatures", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run(corpora, "out")
    lock = corpora / ".out.work" / "lock"
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"import fcntl; f = open({str(lock)!r}, 'r+'); fcntl.flock(f, 2); print(1, flush=True); input()",
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        holder.stdout.readline()
        with pytest.raises(DataError, match="another process is at this work"):
            run(corpora, "out")
    finally:
        holder.communicate(b"\n")


def test_corpora_are_named_by_folder_glob_or_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("raw/web/a.jsonl", "raw/news/a.jsonl", "lang=ja/a.jsonl", "other/web/b.jsonl"):
        write(tmp_path / name, ["x"])
    inputs = ["raw/web/*.jsonl", "raw/news", "lang=ja/a.jsonl", "w=other/web/b.jsonl"]
    assert list(named_corpora(inputs)) == ["web", "news", "a", "w"]
    assert list(named_corpora(["lang=ja"])) == ["lang=ja"]
    assert list(named_corpora(["raw/*/*.jsonl"])) == ["raw"]
    for inputs, message in (
        (["raw/web", "other/web"], "would both be the corpus web"),
        (["=raw/web"], "cannot name a corpus"),
        (["..=raw/web"], "cannot name a corpus"),
        (["a=raw/web", "b=raw/web/a.jsonl"], "belongs to the corpora a and b"),
    ):
        with pytest.raises(DataError, match=message):
            named_corpora(inputs)


def near_pairs_around_the_threshold(folder):
    """Write 200 pairs of documents whose similarities run from 0.7 to 0.95; return the similarities."""
    rng = random.Random(11)
    left, right, similarities = [], [], []
    for index in range(200):
        document = words(rng, 300)
        other = list(document)
        for place in rng.sample(range(300), 2 + index % 9):
            other[place] = f"x{rng.randrange(10**6)}"
        left.append(" ".join(document))
        right.append(" ".join(other))
        similarities.append(jaccard(document, other))
    write(folder / "in" / "a.jsonl", left)
    write(folder / "in" / "b.jsonl", right)
    return dict(zip(right, similarities, strict=True))


def test_verified_duplicates_are_those_whose_exact_similarity_reaches_the_threshold(tmp_path):
    similarity = near_pairs_around_the_threshold(tmp_path)
    run(tmp_path, "plain")
    run(tmp_path, "out", DedupOptions(is_verified=True))
    kept = {folder: set(texts(tmp_path / folder / "b/b.jsonl")) for folder in ("plain", "out")}
    removed = {folder: [value for text, value in similarity.items() if text not in kept[folder]] for folder in kept}
    assert min(removed["out"]) >= 0.85 > min(removed["plain"])  # not one removal by the noise of signatures
    reached = sum(value >= 0.85 for value in similarity.values())
    assert len(removed["out"]) > 0.9 * reached  # bands find 9 of 10 at the threshold, and more above


def test_a_verified_run_that_was_killed_goes_on(tmp_path, monkeypatch):
    near_pairs_around_the_threshold(tmp_path)
    options = DedupOptions(is_verified=True)
    report = run(tmp_path, "whole", options)
    monkeypatch.setattr(dedup_module, "similarities", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, "out", options, workers=2)
    monkeypatch.undo()
    other = run(tmp_path, "out", options, workers=2)
    assert {**report, "task": 0} == {**other, "task": 0} or report["corpora"] == other["corpora"]
    assert (tmp_path / "out/b/b.jsonl").read_bytes() == (tmp_path / "whole/b/b.jsonl").read_bytes()


def test_chains_are_reported_and_can_be_broken(tmp_path):
    """Each document of a chain differs from the next in 2 of 400 words: neighbours are alike (0.95), the ends are not."""
    rng = random.Random(4)
    document = words(rng, 400)
    chain = [document]
    for step in range(1, 13):
        document = list(document)
        for offset in range(2):
            document[30 * step + 10 * offset] = f"x{step}{offset}"
        chain.append(document)
    assert jaccard(chain[0], chain[1]) > 0.9 and jaccard(chain[0], chain[12]) < 0.6
    write(tmp_path / "in" / "a.jsonl", [" ".join(found) for found in [*chain, chain[12]]])
    write(tmp_path / "in" / "b.jsonl", ["unlike all of them"])
    report = run(tmp_path, "out")
    assert report["corpora"]["a"]["kept"] == 1 and report["largest_cluster"] == 14
    assert 6 <= report["chained"] <= 12
    broken = run(tmp_path, "broken", DedupOptions(similar_to="kept"))
    kept = [text.split() for text in texts(tmp_path / "broken/a/a.jsonl")]
    assert broken["chained"] == report["chained"] and len(kept) > 1
    for index, one in enumerate(kept):  # nothing that stays is a copy; what went is like something that stays
        assert all(jaccard(one, other) < 0.98 for other in kept[:index])
    assert all(max(jaccard(found, one) for one in kept) > 0.75 for found in chain)
    assert len(texts(tmp_path / "broken/a/a.jsonl")) == broken["corpora"]["a"]["kept"]
