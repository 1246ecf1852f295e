import json

import pytest

from megatron_cpt.errors import DataError
from megatron_cpt.evaluate.models.forgetting import Change
from megatron_cpt.evaluate.report import plots
from megatron_cpt.evaluate.report.drawing import colours
from megatron_cpt.evaluate.report.markdown import write_report
from megatron_cpt.evaluate.report.stages import read_stage, short_layouts
from tests.tolerances import assert_fp64_rounding


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


def change(model: str, text: str, value: float, low: float, high: float) -> Change:
    return Change(
        model=model,
        text=text,
        bits_per_byte=2 + value,
        low=1.9,
        high=2.1,
        change=value,
        change_low=low,
        change_high=high,
    )


def test_all_texts_of_the_forgetting_chart_have_one_scale_and_few_documents_no_negative_error(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "save_chart", lambda figure, path: drawn.append(figure))
    # a bootstrap over one document: the interval lies beside the value
    changes = [change("base", "old", 0, 0, 0), change("cpt", "old", 0.087, 0.09, 0.1)]
    changes += [change("base", "new", 0, 0, 0), change("cpt", "new", -1.001, -1.1, -0.9)]
    plots.plot_forgetting(changes, colours(["base", "cpt"]), tmp_path / "f.png")
    (axis,) = drawn[0].axes
    widths = sorted(abs(bar.get_width()) for bar in axis.patches)
    assert_fp64_rounding(widths, [0.087, 1.001])
    low, high = axis.get_xlim()
    assert low < -1.1 and high > 0.1


@pytest.mark.parametrize(("number", "rows"), [(1, 1), (3, 1), (4, 2), (7, 3)])
def test_panels_wrap_at_three_a_row(write_run, tmp_path, monkeypatch, number, rows):
    drawn = []
    monkeypatch.setattr(plots, "save_chart", lambda figure, path: drawn.append(figure))
    names = [f"c{index}" for index in range(number)]
    place = {"iteration": 1, "consumed_tokens": 10}
    validations = [{"kind": "validation", **place, "corpus": name, "loss": 1.0, "bits_per_byte": 1.0} for name in names]
    stage = read_stage(write_run("base", [*records(3, 9.0)[:-1], *validations]))
    stage.validation = stage.validation[-number:]
    plots.plot_validation([stage], {"base": "#000000"}, tmp_path / "v.png")
    shown = [axis for axis in drawn[0].axes if axis.get_visible()]
    assert len(shown) == number
    assert len({round(axis.get_position().y0, 3) for axis in shown}) == rows


def test_the_highest_point_of_a_divergence_is_inside_its_panel(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "save_chart", lambda figure, path: drawn.append(figure))
    plots.plot_divergence({"a": {"mlp": [0.1, 0.5]}, "b": {"mlp": [0.1, 0.7]}}, "base", tmp_path / "d.png")
    assert drawn[0].axes[0].get_ylim()[1] > 0.75
