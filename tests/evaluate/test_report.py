import json

import pytest

from megatron_cpt.errors import DataError
from megatron_cpt.evaluate.report.drawing import colours
from megatron_cpt.evaluate.report.markdown import write_report
from megatron_cpt.evaluate.report.stages import short_layouts


def records(num_iterations: int, start_loss: float) -> list[dict]:
    found: list[dict] = [
        {"kind": "start", "iteration": 0, "consumed_tokens": 0, "resumed": False, "layout": "TP1 PP1 CP1 EP1 DP2"}
    ]
    for iteration in range(1, num_iterations + 1):
        common = {"iteration": iteration, "consumed_tokens": iteration * 1000}
        found.append(
            {"kind": "train", **common, "loss": start_loss / iteration, "lr": 1e-3, "tokens_per_second": 2000.0}
        )
        found += [
            {"kind": "validation", **common, "corpus": corpus, "loss": 1.0, "bits_per_byte": 2.0 / iteration}
            for corpus in ("D0", "D1")
        ]
    return [*found, {"kind": "end", "iteration": num_iterations, "reason": "finished"}]


def test_a_report_is_one_page_with_its_charts(write_run, tmp_path):
    base = write_run("base", records(8, 9.0), blend={"D0": 8000})
    replay = write_run("replay", records(4, 5.0), parent="base", blend={"D1": 3600, "D0": 400})
    results = [
        {
            "model": model,
            "text": text,
            "bits_per_byte": 2.0,
            "low": 1.9,
            "high": 2.1,
            "perplexity": 9.0,
            "documents": 2,
            "tokens": 10,
            "bytes": 30,
            "context": 32,
            "stride": 32,
            "start_token": "eos",
            "document_nats": [10.0, 20.0 + len(model)],
            "document_bytes": [10, 20],
        }
        for model in ("base", "replay")
        for text in ("D0", "D1")
    ]
    (tmp_path / "evaluation.json").write_text(json.dumps({"results": results}))
    page = write_report([base, replay], tmp_path / "report", tmp_path / "evaluation.json")
    text = page.read_text()
    for name in ("training.png", "blend.png", "validation.png", "forgetting.png"):
        assert f"({name})" in text
        assert (tmp_path / "report" / name).read_bytes().startswith(b"\x89PNG")
    assert "| replay | base |     4K |" in text
    assert "## Learned and forgotten" in text


def test_a_report_of_a_run_without_evaluation_or_blend_leaves_those_parts_out(write_run, tmp_path):
    text = write_report([write_run("base", records(3, 9.0))], tmp_path / "report").read_text()
    assert "forgetting" not in text
    assert "blend" not in text


def test_a_run_that_has_not_trained_yet_is_refused(write_run, tmp_path):
    run = write_run("base", [{"kind": "start", "iteration": 0, "consumed_tokens": 0, "resumed": False}])
    with pytest.raises(DataError, match="Nothing to report yet"):
        write_report([run], tmp_path / "report")
    assert not (tmp_path / "report").exists()


def test_a_name_keeps_its_colour_when_models_are_added():
    stages = ["base", "replay", "no-replay"]
    assert colours([*stages, "base", "replay", "soup"])["replay"] == colours(stages)["replay"]
    assert len(set(colours([*stages, "soup"]).values())) == 4


def test_layouts_are_shortened_to_what_is_not_one():
    assert short_layouts("TP2 PP1 CP1 EP1 DP1", "TP1 PP2 CP1 EP1 DP1") == ("TP2 PP1", "TP1 PP2")
    assert short_layouts("TP1 PP1 DP16", "TP1 PP1 DP8") == ("DP16", "DP8")
