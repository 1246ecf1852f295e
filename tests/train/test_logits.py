"""What a Hugging Face folder computes is compared with what its Megatron checkpoint computes."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_cpt.train.logits import difference

COMPARE = """
import json, sys
from pathlib import Path
from megatron_cpt.train.logits import compare_logits

def main():
    checkpoint, *folders = map(Path, sys.argv[1:])
    print(json.dumps([vars(compare_logits(folder, checkpoint)) for folder in folders]))

if __name__ == "__main__":
    main()
"""


@pytest.fixture(scope="module")
def compared(tmp_path_factory) -> list[dict]:
    """Return the differences of a checkpoint from its own folder, from one with another rotary base, and from another."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from megatron_cpt.checkpoint.convert import hf_to_mcore

    root: Path = tmp_path_factory.mktemp("logits")
    for seed, name in enumerate(("own", "other")):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=300,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            initializer_range=0.1,
        )
        LlamaForCausalLM(config).save_pretrained(root / name)
    shutil.copytree(root / "own", root / "rotary")
    settings = json.loads((root / "rotary" / "config.json").read_text())
    settings["rope_parameters"]["rope_theta"] = 500.0
    (root / "rotary" / "config.json").write_text(json.dumps(settings))
    hf_to_mcore(root / "own", root / "mcore")
    (root / "compare.py").write_text(COMPARE)
    command = [sys.executable, root / "compare.py", root / "mcore" / "release"]
    result = subprocess.run(
        [*command, root / "own", root / "rotary", root / "other"],
        capture_output=True,
        text=True,
        timeout=200,
        cwd=Path(__file__).parents[2],
        env={"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"},
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.strip().split("\n")[-1])


def test_a_converted_model_gives_the_same_logits(compared):
    assert compared[0]["largest"] < 1e-5
    assert compared[0]["loss"] < 1e-6
    assert compared[0]["agreement"] == 1.0


def test_the_same_weights_with_another_rotary_base_are_told_apart(compared):
    assert compared[1]["mean"] > 1e-2


def test_another_model_is_told_apart(compared):
    assert compared[2]["mean"] > 0.1
    assert compared[2]["agreement"] < 0.5


def test_a_difference_is_measured_over_all_positions():
    tokens = torch.tensor([[0, 1, 1]])
    one = torch.tensor([[[2.0, 0.0], [0.0, 2.0], [0.0, 0.0]]])
    other = one.clone()
    other[0, 2] += torch.tensor([0.0, 3.0])
    found = difference(one, other, tokens)
    assert (found.largest, found.mean, found.loss) == (3.0, 0.5, 0.0)
    assert found.agreement == pytest.approx(2 / 3)
    assert found.num_tokens == 3
