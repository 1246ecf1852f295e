"""docs/python.md is a session that runs as it stands, in an empty folder."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.full
@pytest.mark.timeout(900)
def test_the_page_runs_from_top_to_bottom(tmp_path):
    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    session = "\n".join(re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL))
    for name in "config init dedup tokenize shard plan train convert soup evaluate generate".split():
        assert f"cpt.{name}(" in session, name
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    answer = subprocess.run(
        [sys.executable, "-c", session], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=850
    )
    assert answer.returncode == 0, answer.stderr[-3000:]
    assert (tmp_path / "runs/first/tiny/60K/main/report/report.html").exists()
