#!/usr/bin/env python3
"""Mix data lists by global weights, as AuroraGPT's mix_datasets.py, with full precision.

Example: tools/mix_datasets.py --inputs 0.9 papers.txt 0.1 dolma.txt > mix.txt
"""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHON = ROOT / ".venv" / "bin" / "python"

if __name__ == "__main__":
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    python = str(PYTHON) if PYTHON.exists() else sys.executable
    os.execv(python, [python, "-m", "megatron_cpt", "blend", "mix", *sys.argv[1:]])
