"""The quick start of docs/first-run.md, as a stranger runs it: an empty folder, three commands, a page at the end."""

import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CPU_SECONDS = 150
"""90 seconds on two idle cores, most of it on one: what is measured does not depend on what else the machine does."""


@pytest.mark.full
@pytest.mark.timeout(1500)
def test_three_commands_lead_to_a_better_model_and_a_page(tmp_path):
    page = (ROOT / "docs" / "first-run.md").read_text(encoding="utf-8")
    first_block = re.findall(r"^```bash\n(.*?)^```", page, re.MULTILINE | re.DOTALL)[0]
    commands = [line.partition("#")[0].split() for line in first_block.splitlines()]
    assert [words[:2] for words in commands] == [
        ["megatron-cpt", "init"],
        ["megatron-cpt", "submit"],
        ["megatron-cpt", "report"],
    ]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for words in commands:
        command = [sys.executable, "-m", "megatron_cpt", *words[1:]]
        answer = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1400)
        assert answer.returncode == 0, answer.stderr[-3000:]
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    run = tmp_path / "runs/first/tiny/400K/main"
    assert (tmp_path / "runs/first/report/report.html").exists() and (run / "report/report.html").exists()
    table = (run / "report/evaluation/forgetting.md").read_text()
    assert len(re.findall(r"-\d\.\d+ \(", table)) == 2, table  # both texts are learned
    assert seconds < CPU_SECONDS
