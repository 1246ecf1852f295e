"""Decontamination removes what an evaluation set contains, and nothing else."""

import json
import random
import unicodedata

import pytest

from megatron_cpt.data.cleaning import decontaminate as module
from megatron_cpt.data.cleaning.decontaminate import DecontaminationOptions, decontaminate, read_passages
from megatron_cpt.data.reading.named_corpora import named_corpora
from megatron_cpt.data.reading.record_files import Reading
from megatron_cpt.errors import DataError


def words(rng, count):
    return [f"w{rng.randrange(3000)}" for _ in range(count)]


@pytest.fixture
def material(tmp_path):
    """Forty training documents; number 3 holds a question of `quiz`, 7 twelve words of it, 9 a short item of `short`."""
    rng = random.Random(0)
    question = words(rng, 30)
    short = words(rng, 9)
    documents = [words(rng, 200) for _ in range(40)]
    documents[3][50:80] = [word.upper() + "," for word in question]
    documents[7][50:62] = question[:12]
    documents[9][10:19] = short
    rows = [json.dumps({"text": " ".join(document), "id": index}) for index, document in enumerate(documents)]
    (tmp_path / "train.jsonl").write_text("\n".join(rows) + "\n")
    (tmp_path / "quiz.jsonl").write_text(json.dumps({"question": " ".join(question)}) + "\n")
    items = [{"question": " ".join(short)}, {"question": "yes"}]
    (tmp_path / "short.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    return tmp_path


def run(folder, **options):
    options = DecontaminationOptions(**options)
    evaluations = named_corpora([f"quiz={folder}/quiz.jsonl", f"short={folder}/short.jsonl"])
    passages = read_passages(evaluations, Reading(key="question"), options)
    corpora = named_corpora([f"web={folder}/train.jsonl"])
    report = decontaminate(corpora, passages, folder / "out", Reading(), options)
    kept = {json.loads(line)["id"] for line in (folder / "out/web/train.jsonl").read_text().splitlines()}
    return report, set(range(40)) - kept


def test_documents_with_a_passage_or_a_whole_short_item_go(material):
    report, removed = run(material)
    assert removed == {3, 9}
    lines = {"lines": 40, "documents": 40, "blank_lines": 0, "rejects": {}}
    assert report["corpora"]["web"] == {**lines, "removed": 2, "removed_share": 0.05}
    assert report["removed_by_evaluation"] == {"quiz": 1, "short": 1}
    assert report["too_short"] == {"quiz": 0, "short": 1}
    assert report["examples"][0]["line"] == 4 and report["examples"][0]["evaluation"] == "quiz"


def test_shorter_passages_find_more(material):
    assert run(material, ngram=12)[1] == {3, 7, 9}


def test_several_passages_can_be_asked_for(material):
    assert run(material, min_matches=2)[1] == {3}


def test_an_evaluation_set_without_anything_to_look_for_is_refused(material):
    (material / "quiz.jsonl").write_text('{"question": "too short"}\n')
    (material / "short.jsonl").write_text('{"question": "yes"}\n')
    with pytest.raises(DataError, match="no evaluation text has 8 words"):
        run(material)


PASSAGE = "Der größte Käse wog naïve façade 2026 Kilogramm und stand dort final vor dem Haus am Meer"


@pytest.mark.parametrize(
    "spelled",
    [
        PASSAGE.upper().replace("SS", "ß"),
        unicodedata.normalize("NFD", PASSAGE),
        PASSAGE.replace("fi", "ﬁ").replace("2026", "２０２６"),
        PASSAGE.replace(" ", ", — "),
        PASSAGE.replace("stand", "st\u00adand").replace("Haus", "Ha\u200bus"),
        "“" + PASSAGE.replace(" ", "\u00a0\n") + "”!",
    ],
)
def test_spellings_and_punctuation_do_not_hide_a_passage(tmp_path, spelled):
    (tmp_path / "train.jsonl").write_text(json.dumps({"text": f"before {spelled} after"}) + "\n", encoding="utf-8")
    (tmp_path / "quiz.txt").write_text(PASSAGE + "\n", encoding="utf-8")
    passages = read_passages(named_corpora([f"q={tmp_path}/quiz.txt"]), Reading(), DecontaminationOptions())
    corpora = named_corpora([f"t={tmp_path}/train.jsonl"])
    report = decontaminate(corpora, passages, tmp_path / "out", Reading(), DecontaminationOptions())
    assert report["corpora"]["t"]["removed"] == 1


def test_a_text_without_spaces_is_compared_by_character(tmp_path):
    (tmp_path / "quiz.txt").write_text("日本で一番高い山は富士山です。\n")
    (tmp_path / "train.txt").write_text("前。日本で一番高い山は富士山です、と彼は言った。\n日本で一番高い建物\n")
    passages = read_passages(named_corpora([f"q={tmp_path}/quiz.txt"]), Reading(), DecontaminationOptions())
    corpora = named_corpora([f"t={tmp_path}/train.txt"])
    decontaminate(corpora, passages, tmp_path / "out", Reading(), DecontaminationOptions())
    assert (tmp_path / "out/t/train.txt").read_text() == "日本で一番高い建物\n"


@pytest.mark.parametrize(("length", "is_found"), [(7, False), (8, True), (12, True), (13, True), (20, True)])
def test_a_short_evaluation_text_is_looked_for_as_a_whole(tmp_path, length, is_found):
    item = [f"word{i}" for i in range(length)]
    (tmp_path / "quiz.txt").write_text(
        "an item of more than thirteen words that nobody has ever seen before in a text\n"
    )
    with (tmp_path / "quiz.txt").open("a") as file:
        file.write(" ".join(item) + "\n")
    (tmp_path / "train.txt").write_text(f"x {' '.join(item)} y\n{' '.join(item[:-1])} y\n")
    passages = read_passages(named_corpora([f"q={tmp_path}/quiz.txt"]), Reading(), DecontaminationOptions())
    corpora = named_corpora([f"t={tmp_path}/train.txt"])
    report = decontaminate(corpora, passages, tmp_path / "out", Reading(), DecontaminationOptions())
    also_shorter = length > 13
    assert report["corpora"]["t"]["removed"] == is_found + also_shorter
    assert report["too_short"] == {"q": int(not is_found)}


def test_workers_change_nothing_and_a_killed_run_goes_on(material, monkeypatch):
    options = DecontaminationOptions()
    passages = read_passages(named_corpora([f"quiz={material}/quiz.jsonl"]), Reading(key="question"), options)
    lines = (material / "train.jsonl").read_text().splitlines(keepends=True)
    for part in range(4):
        (material / f"in{part}.jsonl").write_text("".join(lines[part::4]))
    corpora = named_corpora([f"web={material}/in*.jsonl"])
    reports = [
        decontaminate(corpora, passages, material / f"out{workers}", Reading(), options, workers) for workers in (1, 3)
    ]
    assert reports[0] == reports[1]
    real, calls = module.record_writer, []

    def killed(path, source):
        calls.append(path)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(path, source)

    monkeypatch.setattr(module, "record_writer", killed)
    with pytest.raises(KeyboardInterrupt):
        decontaminate(corpora, passages, material / "out", Reading(), options)
    assert decontaminate(corpora, passages, material / "out", Reading(), options) == reports[0]
    assert len(calls) == 5  # two were whole
    for path in (material / "out1/web").iterdir():
        assert (material / "out/web" / path.name).read_bytes() == path.read_bytes()
    with pytest.raises(DataError, match="exists already, from other inputs or options"):
        decontaminate(corpora, passages, material / "out", Reading(), DecontaminationOptions(min_matches=2))
