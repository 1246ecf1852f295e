"""Tiny random models of every architecture, built once, never downloaded."""

import os

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"

DENSE = {
    "vocab_size": 130,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {**DENSE, "num_experts_per_tok": 2}
LATENT = {
    **EXPERTS,
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
    "original_max_position_embeddings": 16,
}
MODELS = {
    "llama": ("llama", {**DENSE, "rms_norm_eps": 1e-5, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
    "llama-tied-llama3": (
        "llama",
        {**DENSE, "tie_word_embeddings": True, "head_dim": 16, "rope_parameters": LLAMA3_ROPE},
    ),
    "llama-linear": (
        "llama",
        {
            **DENSE,
            "num_key_value_heads": 4,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
        },
    ),
    "mistral": ("mistral", {**DENSE, "sliding_window": 8}),
    "qwen2": ("qwen2", {**DENSE}),
    "qwen3": ("qwen3", {**DENSE, "head_dim": 16}),
    "mixtral": ("mixtral", {**EXPERTS, "num_local_experts": 4, "sliding_window": None}),
    "qwen3-moe": (
        "qwen3_moe",
        {**EXPERTS, "num_experts": 4, "moe_intermediate_size": 24, "head_dim": 16, "norm_topk_prob": True},
    ),
    "qwen3-yarn": (
        "qwen3",
        {
            **DENSE,
            "head_dim": 16,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        },
    ),
    "deepseek-v2": (
        "deepseek_v2",
        {**LATENT, "q_lora_rank": 12, "n_shared_experts": 2, "norm_topk_prob": False, "rope_parameters": YARN_ROPE},
    ),
    "deepseek-v2-lite": (
        "deepseek_v2",
        {**LATENT, "q_lora_rank": None, "n_shared_experts": 2, "norm_topk_prob": False},
    ),
    "deepseek-v3": (
        "deepseek_v3",
        {**LATENT, "q_lora_rank": 12, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "norm_topk_prob": True},
    ),
    "moonlight": (
        "deepseek_v3",
        {**LATENT, "q_lora_rank": None, "n_group": 1, "topk_group": 1, "norm_topk_prob": True, "rms_norm_eps": 1e-2},
    ),
    "deepseek-v3-groups": (
        "deepseek_v3",
        {
            **LATENT,
            "q_lora_rank": None,
            "n_shared_experts": 2,
            "n_group": 2,
            "topk_group": 1,
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.5,
            "rope_parameters": YARN_ROPE,
            "tie_word_embeddings": True,
        },
    ),
}


def pytest_generate_tests(metafunc):
    """Run a test that asks for `architecture` once per tiny model."""
    if "architecture" in metafunc.fixturenames:
        metafunc.parametrize("architecture", MODELS)


def build_hf_model(name, seed=0, **changes):
    """Return a random model of `MODELS`, its norms and biases random too."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, settings = MODELS[name]
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**settings, **changes}))
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if value.ndim == 1 and "inv_freq" not in name:
                value.add_(torch.randn_like(value) * 0.1)
    return model


@pytest.fixture(scope="session")
def hf_models(tmp_path_factory):
    """Return a function name -> folder of a saved tiny model in float32, made on first use."""
    root = tmp_path_factory.mktemp("hf")

    def folder(name):
        path = root / name
        if not path.exists():
            build_hf_model(name).save_pretrained(path)
        return path

    return folder
