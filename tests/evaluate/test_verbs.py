"""The verbs evaluate, analyze and report, called as a user calls them."""

import json

import pytest

from megatron_cpt.cli import main


def call(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return int(ended.value.code or 0)


@pytest.fixture
def texts(tmp_path):
    for name, documents in (("D0", ["the cat sat", "on the mat"]), ("D1", ["def f(x):", "    return x", "pass"])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return [part for name in ("D0", "D1") for part in ("--text", f"{name}={tmp_path / name}.jsonl")]


def test_forgetting_writes_table_chart_and_numbers_that_the_report_reads(
    tiny_model, texts, tmp_path, capsys, write_run
):
    output = tmp_path / "evaluation"
    models = ["--model", f"base={tiny_model}", "--model", f"same={tiny_model}"]
    assert call("evaluate", "forgetting", *models, *texts, "--output", output) == 0
    printed = capsys.readouterr().out
    assert printed == (output / "forgetting.md").read_text()
    changes = json.loads((output / "forgetting.json").read_text())["changes"]
    assert {(change["model"], change["verdict"]) for change in changes} == {
        ("base", "unchanged"),
        ("same", "unchanged"),
    }
    assert all(change["change"] == 0 for change in changes)
    assert (output / "forgetting.png").read_bytes().startswith(b"\x89PNG")
    assert not (output / "stages.png").exists()

    records = [
        {"kind": "start", "iteration": 0, "consumed_tokens": 0, "resumed": False, "layout": "TP1"},
        {"kind": "train", "iteration": 1, "consumed_tokens": 100, "loss": 2.0, "lr": 0.1, "tokens_per_second": 5.0},
    ]
    report = ["report", write_run("base", records), "--output", tmp_path / "report"]
    assert call(*report, "--evaluation", output / "forgetting.json") == 0
    assert "| same " in (tmp_path / "report" / "report.md").read_text()


def test_a_series_has_a_table_and_a_chart_per_stage(tiny_model, texts, tmp_path, capsys):
    models = [part for name in ("base", "one", "two") for part in ("--model", f"{name}={tiny_model}")]
    assert call("evaluate", "forgetting", "--series", *models, *texts, "--output", tmp_path / "out") == 0
    assert "change from the model before" in capsys.readouterr().out
    stages = json.loads((tmp_path / "out" / "forgetting.json").read_text())["stages"]
    assert [stage["reference"] for stage in stages[:3]] == ["base", "base", "one"]
    assert (tmp_path / "out" / "stages.png").read_bytes().startswith(b"\x89PNG")


def test_perplexity_prints_a_row_per_model_and_text(tiny_model, texts, tmp_path, capsys):
    output = tmp_path / "results.json"
    assert call("evaluate", "perplexity", "--model", tiny_model, *texts, "--context", 16, "--output", output) == 0
    assert len(capsys.readouterr().out.strip().split("\n")) == 4
    results = json.loads(output.read_text())["results"]
    assert [(result["text"], result["context"], result["documents"]) for result in results] == [
        ("D0", 16, 2),
        ("D1", 16, 3),
    ]


def test_divergence_and_statistics_are_printed_as_tables(tiny_model, tmp_path, capsys):
    models = ["--model", f"base={tiny_model}", "--model", f"same={tiny_model}"]
    assert call("evaluate", "divergence", *models, "--output", tmp_path) == 0
    assert "| same  | attention" in capsys.readouterr().out
    assert (tmp_path / "divergence.png").exists()
    assert call("analyze", "stats", tiny_model, "--output", tmp_path / "stats.json") == 0
    assert "model.embed_tokens.weight" in capsys.readouterr().out
    assert json.loads((tmp_path / "stats.json").read_text())["tensors"][0]["nonfinite"] == 0


def test_continuations_are_printed_side_by_side(tiny_model, capsys):
    arguments = ["--model", f"a={tiny_model}", "--model", f"b={tiny_model}", "--prompt", "the", "--tokens", 3]
    assert call("evaluate", "generate", *arguments) == 0
    lines = capsys.readouterr().out.split("\n")
    assert lines[0] == "prompt: the"
    assert lines[1][5:] == lines[2][5:]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "perplexity", "--model", "x=nowhere", "--text", "y=nowhere"], "nowhere: no such file"),
        (["evaluate", "divergence", "--model", "x=nowhere", "--output", "out"], "one model only"),
        (["analyze", "stats", "nowhere"], "neither config.json nor"),
        (["report", "nowhere", "--output", "out"], "nowhere: no such task folder"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert call(*arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_what_is_measured_is_kept_until_its_model_its_text_or_the_way_changes(tiny_model, texts, tmp_path, monkeypatch):
    import shutil

    from megatron_cpt.evaluate.models import perplexity

    measured = []
    plain = perplexity.measure_perplexity
    monkeypatch.setattr(
        perplexity,
        "measure_perplexity",
        lambda model, text, **options: (measured.append((model.name, text.name)), plain(model, text, **options))[1],
    )
    other = tmp_path / "other"
    shutil.copytree(tiny_model, other)
    call_it = ["evaluate", "forgetting", "--model", f"base={tiny_model}", *texts, "--output", tmp_path / "out"]

    def again(*more: object) -> list[tuple[str, str]]:
        measured.clear()
        assert call(*call_it, *more) == 0
        return list(measured)

    assert again() == [("base", "D0"), ("base", "D1")]
    assert again() == []
    assert again("--model", f"soup={other}") == [("soup", "D0"), ("soup", "D1")], "the base's results are kept"
    with (tmp_path / "D1.jsonl").open("a") as file:
        file.write('{"text": "more"}\n')
    assert again("--model", f"soup={other}") == [("base", "D1"), ("soup", "D1")]
    assert len(again("--model", f"soup={other}", "--context", 16)) == 4
    (tmp_path / "out" / "forgetting.json").write_text("{")
    assert len(again()) == 2, "a damaged file is measured and written again"


def test_paths_of_one_text_set_are_one_set(tiny_model, texts, tmp_path):
    one = [word.replace("D1=", "D0=") for word in texts]
    output = tmp_path / "results.json"
    assert call("evaluate", "perplexity", "--model", f"m={tiny_model}", *one, "--output", output) == 0
    (result,) = json.loads(output.read_text())["results"]
    assert (result["text"], result["documents"]) == ("D0", 5)
