"""Languages of documents are counted, written as a column and kept by; what a record held stays byte for byte."""

import json
from pathlib import Path

import pytest

from megatron_cpt.cli import main
from megatron_cpt.data.cleaning.languages import language_of

SENTENCES = {
    "en": "The weather will be fine tomorrow, and we shall go to the mountains.",
    "de": "Das Wetter wird morgen schön, und wir fahren mit dem Zug in die Berge.",
    "fr": "Il fera beau demain et nous irons nous promener dans la montagne.",
    "da": "Vejret bliver godt i morgen, og vi skal ud at gå en tur i skoven.",
    "eu": "Bihar eguraldi ona egingo du eta mendira joango gara lagunekin.",
    "ja": "明日は天気が良くなるので、私たちは山に行きます。",
    "zh": "明天天气会很好，我们要去山上散步。",
    "ko": "내일은 날씨가 좋아서 우리는 산에 갈 것입니다.",
    "hi": "कल मौसम अच्छा रहेगा और हम पहाड़ों पर जाएंगे।",
    "ta": "நாளை வானிலை நன்றாக இருக்கும், நாங்கள் மலைக்குச் செல்வோம்.",
    "ar": "سيكون الطقس جميلا غدا وسنذهب إلى الجبال.",
    "th": "พรุ่งนี้อากาศจะดีและเราจะไปเที่ยวภูเขา",
    "ru": "Завтра будет хорошая погода, и мы пойдём в горы.",
}


def run(*words: object) -> int:
    with pytest.raises(SystemExit) as left:
        main(["data", *map(str, words)])
    return left.value.code


@pytest.mark.parametrize("language", SENTENCES)
def test_sentences_get_their_language(language):
    assert language_of(SENTENCES[language], 0.5)[0] == language


@pytest.mark.parametrize("text", ["", "  \n", "12345 67.8 !!", "\ud800"])
def test_what_is_no_language_is_undetermined(text):
    assert language_of(text, 0.5)[0] == "und"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("in").mkdir()
    lines = [f'{{"n": 1.50, "text": {json.dumps(text)} }}\n' for text in SENTENCES.values()]
    Path("in/a.jsonl").write_text("".join(lines))
    Path("in/b.txt").write_text(f"{SENTENCES['en']}\n{SENTENCES['ja']}\n", encoding="utf-8")
    return tmp_path


def test_every_document_gets_a_column_and_the_report_counts_languages(folder, capsys):
    assert run("languages", "web=in", "--output", "out", "--workers", 2) == 0
    assert "web                  en                    2   13.33%" in capsys.readouterr().out
    before, after = (Path(name).read_text().splitlines() for name in ("in/a.jsonl", "out/web/a.jsonl"))
    for line, labelled, language in zip(before, after, SENTENCES, strict=True):
        assert labelled.startswith(line.rstrip("} ") + ',"language":')  # the fields of the record byte for byte
        assert json.loads(labelled)["language"] == language and json.loads(labelled)["language_score"] >= 0.5
    assert [json.loads(line)["language"] for line in Path("out/web/b.jsonl").read_text().splitlines()] == ["en", "ja"]
    row = json.loads(Path("out/report.json").read_text())["corpora"]["web"]
    assert row["documents"] == row["kept"] == 15
    assert {name: found["documents"] for name, found in row["languages"].items()} == {
        name: 1 + (name in ("en", "ja")) for name in SENTENCES
    }
    assert row["languages"]["ja"]["bytes"] == 2 * len(SENTENCES["ja"].encode())


def test_languages_are_a_filter_at_once_or_later(folder, capsys):
    assert run("languages", "web=in", "--output", "kept", "--keep", "ja", "da") == 0
    kept = [json.loads(line)["text"] for line in Path("kept/web/a.jsonl").read_text().splitlines()]
    assert kept == [SENTENCES["da"], SENTENCES["ja"]]
    assert run("languages", "web=in", "--output", "all") == 0
    words = ["--where", "language~=^(ja|da)$", "--where", "language_score>=0.5"]
    assert run("sample", "all/web/a.jsonl", "--output", "drawn", *words) == 0
    assert Path("drawn/a.jsonl").read_bytes() == Path("kept/web/a.jsonl").read_bytes()
    assert run("languages", "web=in", "--output", "none", "--keep", "xx") == 2
    assert "--keep xx: no such language. Known: ace af " in capsys.readouterr().err


def test_a_column_that_a_record_has_is_not_written_over(folder, capsys):
    Path("in/a.jsonl").write_text('{"text": "a", "language": "x"}\n')
    assert run("languages", "web=in", "--output", "out") == 2
    assert "a.jsonl:1: has a field 'language' already. Name another with --column" in capsys.readouterr().err
    assert run("languages", "web=in", "--output", "out2", "--column", "lang") == 0
    assert json.loads(Path("out2/web/a.jsonl").read_text())["language"] == "x"


def test_a_text_file_and_a_file_of_records_of_one_name_are_refused(folder, capsys):
    Path("in/b.jsonl").write_text('{"text": "a"}\n')
    assert run("languages", "web=in", "--output", "out") == 2
    assert "would both become out/web/b.jsonl" in capsys.readouterr().err
