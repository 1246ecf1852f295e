"""config.json to ModelConfig and back, in both styles, every key accounted for."""

import json

import pytest

from megatron_cpt.checkpoint.huggingface.read_config import differing_fields, model_config_from_hf
from megatron_cpt.checkpoint.huggingface.write_config import hf_config_from_model
from megatron_cpt.config.settings.schema import ModelConfig
from megatron_cpt.errors import CheckpointError

OLD_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.45.0.dev0",
    "use_cache": True,
    "vocab_size": 128256,
}


def test_reads_the_older_style():
    model = model_config_from_hf(OLD_LLAMA)
    assert (model.rotary_base, model.rope_scaling_type, model.rope_scaling_factor) == (500000.0, "llama3", 32.0)
    assert model.rope_original_max_position_embeddings == 8192
    assert not model.untie_embeddings_and_output_weights
    assert model.kv_channels == 64 and model.num_query_groups == 8


def test_both_styles_read_alike():
    newer = {key: value for key, value in OLD_LLAMA.items() if key not in ("rope_scaling", "rope_theta", "torch_dtype")}
    newer |= {"rope_parameters": {**OLD_LLAMA["rope_scaling"], "rope_theta": 500000.0}, "dtype": "bfloat16"}
    assert model_config_from_hf(newer) == model_config_from_hf(OLD_LLAMA)


def test_the_source_configuration_is_kept_as_it_is_when_it_describes_the_model():
    config = hf_config_from_model(model_config_from_hf(OLD_LLAMA), OLD_LLAMA, dtype="float32")
    newer = {"rope_parameters": {**OLD_LLAMA["rope_scaling"], "rope_theta": 500000.0}}
    assert config == {**OLD_LLAMA, **newer, "dtype": "float32", "torch_dtype": "float32"}


def test_a_changed_model_gets_a_configuration_of_its_own_and_keeps_the_token_ids():
    longer = ModelConfig(**{**vars(model_config_from_hf(OLD_LLAMA)), "rotary_base": 1e6})
    config = hf_config_from_model(longer, OLD_LLAMA)
    assert config["rope_theta"] == 1e6 and config["rope_parameters"]["rope_theta"] == 1e6
    assert config["bos_token_id"] == 128000
    assert differing_fields(model_config_from_hf(config), longer) == []


def test_a_configuration_derived_from_the_model_alone_describes_it(architecture, hf_models):
    model = model_config_from_hf(json.loads((hf_models(architecture) / "config.json").read_text()))
    config = hf_config_from_model(model)
    assert differing_fields(model_config_from_hf(config), model, {"moe_aux_loss_coeff"}) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logit_cap": 30.0}, "key logit_cap .* is not understood"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2}}, "longrope"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2, "odd": 1}}, "without odd"),
        ({"architectures": ["GemmaForCausalLM"]}, "GemmaForCausalLM is not known"),
        ({"architectures": None, "model_type": "gemma"}, "'gemma'"),
    ],
)
def test_what_megatron_cannot_compute_is_an_error_that_names_it(changes, message):
    with pytest.raises(CheckpointError, match=message):
        model_config_from_hf({**OLD_LLAMA, **changes})


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("MixtralForCausalLM", {"num_experts_per_tok": 1}, "num_experts_per_tok is 1. 2 or more"),
        ("Qwen3MoeForCausalLM", {"norm_topk_prob": True, "num_experts_per_tok": 1}, "num_experts_per_tok is 1"),
        ("DeepseekV2ForCausalLM", {"norm_topk_prob": True}, "norm_topk_prob is True"),
    ],
)
def test_what_the_two_sides_compute_differently_is_refused(name, changes, message):
    latent = {"kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8, "rms_norm_eps": 1e-6}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "architectures": [name], "mlp_bias": False}
    config = {**OLD_LLAMA, **experts, **(latent if "Deepseek" in name else {})}
    model_config_from_hf(config)
    with pytest.raises(CheckpointError, match=message):
        model_config_from_hf({**config, **changes})


def test_a_missing_key_is_named():
    with pytest.raises(CheckpointError, match="no hidden_size"):
        model_config_from_hf({key: value for key, value in OLD_LLAMA.items() if key != "hidden_size"})


def test_a_key_that_the_user_vouches_for_is_passed_over():
    assert model_config_from_hf({**OLD_LLAMA, "logit_cap": 0}, ignore=["logit_cap"]) == model_config_from_hf(OLD_LLAMA)


def test_layers_that_differ_in_attention_are_refused():
    mixed = {**OLD_LLAMA, "architectures": ["Qwen2ForCausalLM"], "layer_types": ["full_attention", "sliding_attention"]}
    del mixed["mlp_bias"]
    with pytest.raises(CheckpointError, match="same attention in every layer"):
        model_config_from_hf(mixed)


def test_group_limited_routing_that_megatron_scores_otherwise_is_refused(hf_models):
    config = json.loads((hf_models("deepseek-v3") / "config.json").read_text())
    fitting = model_config_from_hf({**config, "n_group": 4, "topk_group": 1})
    assert (fitting.moe_router_num_groups, fitting.moe_router_group_topk) == (4, 1)
    with pytest.raises(CheckpointError, match="topk_group is 2"):
        model_config_from_hf({**config, "n_group": 4, "topk_group": 2})


def test_a_model_that_no_architecture_expresses_is_refused():
    odd = ModelConfig(
        num_layers=1,
        hidden_size=8,
        ffn_hidden_size=8,
        num_attention_heads=1,
        vocab_size=8,
        add_qkv_bias=True,
        qk_layernorm=True,
    )
    with pytest.raises(CheckpointError, match="qk_layernorm: False != True"):
        hf_config_from_model(odd)
