"""transformers and megatron-core compute the same from the two sides of a conversion."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_cpt.checkpoint.convert.hf_mcore import hf_to_mcore
from megatron_cpt.checkpoint.torch_dist import mcore
from tests.tolerances import FP32_ROUNDING, STEP_ROUNDINGS, assert_fp32_rounding

ROOT = Path(__file__).resolve().parents[2]
# In a process of its own, because training on CPU substitutes parts of torch for the whole process.
PROGRAM = """
import json, sys
from pathlib import Path
from megatron_cpt.errors import CheckpointError
from megatron_cpt.train.tools.logits import compare_logits, text_tokens
results = {}
for name, hf_dir, checkpoint in json.loads(sys.argv[1]):
    try:
        report = compare_logits(Path(hf_dir), Path(checkpoint), text_tokens(Path(hf_dir), None, 60, 130), 1e-5)
        results[name] = [report.mean_difference, report.hf_loss, report.megatron_loss, report.table()]
    except CheckpointError as problem:
        results[name] = str(problem)
print("RESULTS" + json.dumps(results))
"""


ARCHITECTURES = (
    "llama", "llama-tied-llama3", "llama-linear", "mistral", "qwen2", "qwen3", "qwen3-yarn", "mixtral", "qwen3-moe", "deepseek-v2", "deepseek-v2-lite",
    "deepseek-v3", "deepseek-v3-groups", "moonlight",
)  # fmt: skip


@pytest.fixture(scope="module")
def results(hf_models, tmp_path_factory):
    """Return name -> [mean |difference|, transformers' loss, megatron's, table] or the error, for every architecture and a wrong one."""
    root = tmp_path_factory.mktemp("megatron")
    pairs = [(name, str(hf_models(name)), str(hf_to_mcore(hf_models(name), root / name))) for name in ARCHITECTURES]
    wrong = hf_to_mcore(hf_models("llama"), root / "wrong")
    manifest = mcore.read_manifest(wrong)
    manifest["model"]["rotary_base"] = 10000.0
    mcore.write_manifest(wrong, manifest)
    pairs.append(("wrong", str(hf_models("llama")), str(wrong)))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(pairs)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
        env={"OMP_NUM_THREADS": "1", **os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.split("RESULTS")[1])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_and_loss_are_equal_to_rounding(name, results):
    assert not isinstance(results[name], str), results[name]
    mean, loss, ours, table = results[name]
    forward = STEP_ROUNDINGS // 4  # two layers instead of four, and no way back
    assert mean < forward * FP32_ROUNDING  # the logits of these random models are smaller than 1
    assert_fp32_rounding(ours, loss, roundings=forward)
    assert "after a layer" in table


def test_a_setting_that_is_wrong_is_found_and_the_layer_named(results):
    assert "logits differ" in results["wrong"] and "(layer " in results["wrong"]
