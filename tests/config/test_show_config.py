"""show-config: values, origins, meanings and Megatron-LM flags, at once and without torch."""

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_cpt.cli import main
from megatron_cpt.config.loading.explain import field_texts
from megatron_cpt.config.settings.fields import setting_keys

ROOT = Path(__file__).resolve().parents[2]
RUN = ["show-config", "--task", "tasks/template", "--params", "llama3-8b", "--size", "50B"]


def show(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> tuple[str, str]:
    with pytest.raises(SystemExit) as end:
        main([*RUN, *arguments])
    assert end.value.code == code
    captured = capsys.readouterr()
    return captured.out, captured.err


def test_it_prints_each_value_with_its_origin(capsys) -> None:
    text, _ = show(capsys, "optimizer.lr=1e-5")
    assert "  num_layers: 32  # params/llama3-8b.yaml\n" in text
    assert "  lr: 1.0e-05  # command line\n" in text


def test_json_holds_the_same_values(capsys) -> None:
    text, _ = show(capsys, "--format", "json")
    values = json.loads(text)
    assert values["model"]["num_layers"] == 32 and values["data"]["mix"] == {"D0": 0.1, "D1": 0.9}
    assert values["schedule"]["lr_warmup"] == "0.01"


def test_megatron_arguments_come_one_a_line_and_what_is_left_out_is_said(capsys) -> None:
    text, log = show(capsys, "--format", "megatron-args", "training.z_loss_coeff=1e-4")
    lines = text.splitlines()
    assert {"--num-layers 32", "--swiglu", "--bf16", "--tensor-model-parallel-size 2", "--lr 3e-05"} <= set(lines)
    assert all(line.startswith("--") for line in lines)
    assert "data.mix has no Megatron-LM flag" in log and "training.z_loss_coeff has no Megatron-LM flag" in log


@pytest.mark.parametrize("key", ["optimizer.lr", "lr"])
def test_explain_gives_value_origin_and_meaning(capsys, key: str) -> None:
    text, _ = show(capsys, "--explain", key)
    assert text.startswith("optimizer.lr: 3e-05\n    from params/llama3-8b.yaml\n    Peak learning rate.\n")
    assert "Megatron-LM: --lr" in text


def test_explain_takes_a_section_or_nothing(capsys) -> None:
    section, _ = show(capsys, "--explain", "schedule")
    assert section.count("    from ") == 8 and "optimizer.lr" not in section.replace("optimizer.lr:", "")
    everything, _ = show(capsys, "--explain")
    assert everything.count("    from ") == len(setting_keys())


def test_an_override_after_a_bare_explain_is_an_override(capsys) -> None:
    text, _ = show(capsys, "--explain", "optimizer.lr=1e-5")
    assert "optimizer.lr: 1e-05\n    from command line" in text


def test_explain_names_the_nearest_setting(capsys) -> None:
    _, error = show(capsys, "--explain", "optimizer.lrr", code=2)
    assert error == "megatron-cpt show-config: --explain optimizer.lrr: no such setting. Did you mean optimizer.lr?\n"


def test_every_setting_has_a_text() -> None:
    texts = field_texts()
    assert [key for key in setting_keys() if not texts.get(key)] == []


def test_a_mistake_ends_with_2_and_no_output(capsys) -> None:
    text, error = show(capsys, "optimizer.lr=fast", code=2)
    assert text == "" and "command line: optimizer.lr: 'fast' is not a number." in error


def test_it_answers_within_half_a_second_and_imports_nothing_heavy() -> None:
    program = (
        "import sys\nfrom megatron_cpt.cli import main\n"
        "try:\n    main(sys.argv[1:])\nfinally:\n"
        "    heavy = {'torch', 'numpy', 'megatron', 'transformers', 'pyarrow'} & set(sys.modules)\n"
        "    assert not heavy, heavy\n"
    )
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, "-c", program, *RUN], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(seconds) < 0.5  # processor time: other processes share the machine
