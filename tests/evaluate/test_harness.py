import json
from pathlib import Path

import pytest

from megatron_cpt.errors import CptError, LaunchError
from megatron_cpt.evaluate.models.harness import model_arguments, run_harness

STAND_IN = """#!/usr/bin/env bash
printf '%s\\n' "$@" > "$0.arguments"
exit "${STAND_IN_CODE:-0}"
"""


@pytest.fixture
def harness(tmp_path, monkeypatch):
    """Put a program named lm_eval on the PATH that notes its arguments."""
    program = tmp_path / "bin" / "lm_eval"
    program.parent.mkdir()
    program.write_text(STAND_IN)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    return program


def test_the_harness_gets_model_tasks_output_and_its_own_options(harness, tiny_model, tmp_path):
    run_harness(tiny_model, ["arc_easy", "piqa"], tmp_path / "out", options=["--limit", "10"])
    expected = ["--model", "hf", "--model_args", f"pretrained={tiny_model}", "--tasks", "arc_easy,piqa"]
    expected += ["--output_path", str(tmp_path / "out"), "--limit", "10"]
    assert Path(f"{harness}.arguments").read_text().split("\n")[:-1] == expected


def test_a_failing_harness_fails_the_measure(harness, tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("STAND_IN_CODE", "3")
    with pytest.raises(LaunchError, match="exit code 3"):
        run_harness(tiny_model, ["piqa"], tmp_path / "out")


def test_without_the_harness_the_message_says_how_to_get_it(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LaunchError, match="pip install lm-eval"):
        run_harness(tiny_model, ["piqa"], tmp_path / "out")


def test_a_path_that_the_harness_would_split_is_refused(tmp_path):
    assert model_arguments(tmp_path / "a", tmp_path / "t") == f"pretrained={tmp_path}/a,tokenizer={tmp_path}/t"
    with pytest.raises(CptError, match="Rename the folder"):
        model_arguments(tmp_path / "lr=1,wd=2", None)


def test_options_after_two_dashes_reach_the_harness(harness, tiny_model, tmp_path, capsys):
    from megatron_cpt.cli import main

    arguments = ["evaluate", "harness", "--model", f"a={tiny_model}", "--tasks", "piqa", "--output", str(tmp_path)]
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--", "--num_fewshot", "0"])
    assert not ended.value.code
    assert "--num_fewshot" in Path(f"{harness}.arguments").read_text()
    assert json.dumps(str(tmp_path / "a"))[1:-1] in capsys.readouterr().out
