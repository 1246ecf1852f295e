"""Public models' complete config.json: each converts there and back in small, or is refused for its true reason."""

import json

import pytest
import torch
from safetensors.torch import save_file

from megatron_cpt.checkpoint.convert.hf_mcore import hf_to_mcore, mcore_to_hf
from megatron_cpt.checkpoint.convert.verify import compare_weights
from megatron_cpt.checkpoint.huggingface.quantized import quantization
from megatron_cpt.checkpoint.huggingface.read_config import family_of_config, model_config_from_hf
from megatron_cpt.checkpoint.mapping.units import units
from megatron_cpt.errors import CheckpointError
from tests.checkpoint.public_configs import CONVERTS, REFUSED

SMALL = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 40, "num_attention_heads": 4,
    "moe_intermediate_size": 8, "num_experts": 8, "num_local_experts": 8, "n_routed_experts": 8, "kv_lora_rank": 8,
    "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 4, "head_dim": 4, "first_k_dense_replace": 1,
}  # fmt: skip


def in_small(config):
    """Return a configuration with the same keys and small sizes, and without what its weights would be stored in."""
    small = {key: SMALL.get(key, value) for key, value in config.items() if key != "quantization_config"}
    groups = config.get("num_key_value_heads")
    if groups is not None:
        small["num_key_value_heads"] = 4 if groups == config["num_attention_heads"] else 2
    if config.get("q_lora_rank"):
        small["q_lora_rank"] = 8
    if config.get("layer_types"):
        small["layer_types"] = config["layer_types"][:2]
    if (config.get("n_group") or 1) > 1:
        small["n_group"] = 4
    return small


@pytest.mark.parametrize("name", CONVERTS)
def test_a_public_base_converts_there_and_back_without_an_option(name, tmp_path):
    full = model_config_from_hf({key: value for key, value in CONVERTS[name].items() if key != "quantization_config"})
    assert full.num_layers == CONVERTS[name]["num_hidden_layers"]
    quantization(CONVERTS[name], name)
    config = in_small(CONVERTS[name])
    model = model_config_from_hf(config)
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    tensors = {
        part: torch.randn(shape).bfloat16()
        for unit in units(model, family_of_config(config))
        for part, shape in zip(unit.hf, unit.hf_shapes, strict=True)
    }
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    release = hf_to_mcore(source, tmp_path / "mcore")
    exported = mcore_to_hf(release, tmp_path / "hf")
    assert len(compare_weights(exported, release)) == len(tensors) == len(compare_weights(source, release))
    written = json.loads((exported / "config.json").read_text())
    assert written["model_type"] == family_of_config(config).model_type
    assert written["rope_theta"] == written["rope_parameters"]["rope_theta"] == model.rotary_base
    assert model_config_from_hf(written) == model


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_would_compute_otherwise_is_refused_for_its_true_reason(name):
    config, reason = REFUSED[name]
    with pytest.raises(CheckpointError, match=reason):
        quantization(config, "config.json")
        model_config_from_hf({key: value for key, value in config.items() if key != "quantization_config"})


def test_there_are_as_many_models_as_are_promised():
    assert len(CONVERTS) + len(REFUSED) >= 60
