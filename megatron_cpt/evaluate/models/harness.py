"""Optional adapter: EleutherAI's lm-evaluation-harness on a Hugging Face folder, if it is installed in the same
environment.

The harness runs as a separate program, with its own options; the result is its results file. Source:
https://github.com/EleutherAI/lm-evaluation-harness, command `lm_eval`.
"""

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from megatron_cpt.errors import CptError, LaunchError
from megatron_cpt.evaluate.models.folders import hf_folder

PROGRAM = "lm_eval"


def run_harness(
    model: Path, tasks: Sequence[str], output_dir: Path, *, tokenizer: Path | None = None, options: Sequence[str] = ()
) -> None:
    """Run the harness's `tasks` on `model`; its results are below `output_dir`. `options` are passed on unchanged.

    Raises: LaunchError when it is not installed or fails.
    """
    program = shutil.which(PROGRAM)
    if program is None:
        raise LaunchError(
            f"{PROGRAM}: not found. lm-evaluation-harness is needed for this measure. Install it into this environment "
            "(pip install lm-eval) or use `evaluate perplexity`, which needs nothing."
        )
    with hf_folder(model, tokenizer) as folder:
        arguments = ["--model", "hf", "--model_args", model_arguments(folder, tokenizer)]
        arguments += ["--tasks", ",".join(tasks), "--output_path", str(output_dir), *options]
        code = subprocess.run([program, *arguments], check=False).returncode
    if code:
        raise LaunchError(f"{PROGRAM}: ended with exit code {code} on {model}. Its own message stands above.")


def model_arguments(folder: Path, tokenizer: Path | None) -> str:
    """Return the harness's model description. Raises: CptError for a path that it cannot express."""
    parts = {"pretrained": folder.absolute(), **({"tokenizer": tokenizer.absolute()} if tokenizer else {})}
    for path in parts.values():
        if "," in str(path) or "=" in str(path):
            raise CptError(f"{path}: has a comma or an equals sign, which {PROGRAM} splits at. Rename the folder.")
    return ",".join(f"{key}={path}" for key, path in parts.items())
