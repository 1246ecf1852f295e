"""Exports and soups open in transformers 4 as the model that they are in 5: logits of both are held against each other.

transformers 4.57 is installed beside the environment, in a folder of its own; where it cannot be fetched the test says so.
"""

import json
import os
import subprocess
import sys

import pytest
import torch

from megatron_cpt.checkpoint.convert.hf_mcore import hf_to_mcore, mcore_to_hf
from megatron_cpt.checkpoint.soup.mean import average_hf

PACKAGES = (
    "transformers==4.57.6 huggingface_hub==0.36.0 tokenizers==0.22.1 requests charset-normalizer urllib3 certifi idna"
).split()
NAMES = (
    "llama",
    "llama-tied-llama3",
    "qwen2",
    "qwen3-yarn",
    "mistral",
    "mixtral",
    "qwen3-moe",
    "deepseek-v2-lite",
    "deepseek-v3-groups",
)
"""Not YaRN with deepseek_v2: 4.57 leaves its mscale out of the attention scale, 5 and Megatron-Core do not."""
PROGRAM = """
import json, sys
import torch, transformers
from transformers import AutoModelForCausalLM
assert transformers.__version__ == sys.argv[1], transformers.__version__
result = {}
for name, path in json.loads(sys.argv[2]).items():
    model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=False, attn_implementation="eager").eval()
    with torch.no_grad():
        result[name] = model(torch.arange(40).reshape(2, 20)).logits.flatten().tolist()
print("RESULT" + json.dumps(result))
"""

pytestmark = [pytest.mark.full, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def transformers4(tmp_path_factory):
    """Return a folder with transformers 4.57 and what it needs in other versions than the environment."""
    folder = tmp_path_factory.mktemp("transformers4")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), *PACKAGES]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"transformers 4.57 cannot be installed here: {done.stderr.strip().splitlines()[-1]}")
    return folder


def logits(folders, site=None, version=None):
    """Return name -> logits of each folder, by the environment's transformers or that in `site`."""
    version = version or __import__("transformers").__version__
    paths = {"PYTHONPATH": str(site)} if site else {}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, version, json.dumps({name: str(path) for name, path in folders.items()})],
        capture_output=True,
        text=True,
        env={
            **{key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
            **paths,
            "HF_HUB_OFFLINE": "1",
        },
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {name: torch.tensor(values) for name, values in json.loads(done.stdout.split("RESULT")[1]).items()}


def test_exports_and_soups_are_the_same_model_in_transformers_4_and_5(transformers4, hf_models, tmp_path):
    folders = {}
    for name in NAMES:  # each base is saved by transformers 5: rope_parameters only
        release = hf_to_mcore(hf_models(name), tmp_path / name)
        folders[name] = mcore_to_hf(release, tmp_path / f"{name}-hf")
    folders["soup"] = average_hf([hf_models("llama"), hf_models("llama")], tmp_path / "soup")
    folders["moe-soup"] = average_hf([hf_models("qwen3-moe"), hf_models("qwen3-moe")], tmp_path / "moe-soup")
    old, new = logits(folders, transformers4, "4.57.6"), logits(folders)
    apart = {name: (old[name] - new[name]).abs().max().item() for name in folders}
    assert max(apart.values()) < 1e-4, apart


def test_a_base_of_transformers_5_would_be_another_model_without_the_older_spelling(transformers4, hf_models):
    """The fault that both spellings are written against: theta 10,000 instead of 500,000, without a word."""
    folders = {"llama": hf_models("llama")}
    apart = (logits(folders, transformers4, "4.57.6")["llama"] - logits(folders)["llama"]).abs().max().item()
    assert apart > 1e-4
