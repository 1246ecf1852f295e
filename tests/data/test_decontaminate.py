"""Decontamination removes what an evaluation set contains, and nothing else."""

import json
import random

import pytest

from megatron_cpt.data.corpus_inputs import named_corpora
from megatron_cpt.data.decontaminate import DecontaminationOptions, decontaminate, read_passages
from megatron_cpt.data.record_files import Reading
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
