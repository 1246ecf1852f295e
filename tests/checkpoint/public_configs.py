"""Complete config.json key sets of public models: keys and values as published, nothing else.

`CONVERTS` are bases that are converted; `REFUSED` are read to the end and refused for the reason given.
"""

_IDS = {"bos_token_id": 1, "eos_token_id": 2}
_LLAMA2 = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", **_IDS, "hidden_act": "silu", "hidden_size": 4096,
    "initializer_range": 0.02, "intermediate_size": 11008, "max_position_embeddings": 4096, "num_attention_heads": 32,
    "num_hidden_layers": 32, "num_key_value_heads": 32, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": None,
    "tie_word_embeddings": False, "torch_dtype": "float16", "transformers_version": "4.31.0.dev0", "use_cache": True,
    "vocab_size": 32000,
}  # fmt: skip
_LLAMA3 = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 128000,
    "eos_token_id": 128001, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
    "intermediate_size": 14336, "max_position_embeddings": 8192, "model_type": "llama", "num_attention_heads": 32,
    "num_hidden_layers": 32, "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": None,
    "rope_theta": 500000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.40.0.dev0",
    "use_cache": True, "vocab_size": 128256,
}  # fmt: skip
_ROPE31 = {
    "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}  # fmt: skip
_LLAMA31 = {**_LLAMA3, "mlp_bias": False, "max_position_embeddings": 131072, "rope_scaling": _ROPE31}
_LLAMA32 = {
    **_LLAMA31, "head_dim": 64, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "tie_word_embeddings": True, "rope_scaling": {**_ROPE31, "factor": 32.0}, "transformers_version": "4.45.0.dev0",
}  # fmt: skip
_MISTRAL = {
    "architectures": ["MistralForCausalLM"], **_IDS, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
    "intermediate_size": 14336, "max_position_embeddings": 32768, "model_type": "mistral", "num_attention_heads": 32,
    "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 10000.0,
    "sliding_window": 4096, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.34.0.dev0",
    "use_cache": True, "vocab_size": 32000,
}  # fmt: skip
_QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151643,
    "hidden_act": "silu", "hidden_size": 3584, "initializer_range": 0.02, "intermediate_size": 18944,
    "max_position_embeddings": 131072, "max_window_layers": 28, "model_type": "qwen2", "num_attention_heads": 28,
    "num_hidden_layers": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
    "sliding_window": 131072, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.40.1",
    "use_cache": True, "use_sliding_window": False, "vocab_size": 152064,
}  # fmt: skip
_QWEN25 = {**_QWEN2, "use_mrope": False}
_QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 151643,
    "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
    "intermediate_size": 12288, "max_position_embeddings": 40960, "max_window_layers": 36, "model_type": "qwen3",
    "num_attention_heads": 32, "num_hidden_layers": 36, "num_key_value_heads": 8, "rms_norm_eps": 1e-06,
    "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "transformers_version": "4.51.0", "use_cache": True, "use_sliding_window": False,
    "vocab_size": 151936,
}  # fmt: skip
_QWEN3_MOE = {
    **_QWEN3, "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "decoder_sparse_step": 1,
    "hidden_size": 2048, "intermediate_size": 6144, "max_window_layers": 48, "mlp_only_layers": [],
    "moe_intermediate_size": 768, "norm_topk_prob": True, "num_experts": 128, "num_experts_per_tok": 8,
    "num_hidden_layers": 48, "num_key_value_heads": 4, "output_router_logits": False, "router_aux_loss_coef": 0.001,
}  # fmt: skip
_MIXTRAL = {
    "architectures": ["MixtralForCausalLM"], "attention_dropout": 0.0, **_IDS, "hidden_act": "silu", "hidden_size": 4096,
    "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 32768, "model_type": "mixtral",
    "num_attention_heads": 32, "num_experts_per_tok": 2, "num_hidden_layers": 32, "num_key_value_heads": 8,
    "num_local_experts": 8, "output_router_logits": False, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.02, "sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "transformers_version": "4.36.0.dev0", "use_cache": True, "vocab_size": 32000,
}  # fmt: skip
_V2_LITE = {
    "architectures": ["DeepseekV2ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV2Config"}, "aux_loss_alpha": 0.001,
    "bos_token_id": 100000, "eos_token_id": 100001, "first_k_dense_replace": 1, "hidden_act": "silu", "hidden_size": 2048,
    "initializer_range": 0.02, "intermediate_size": 10944, "kv_lora_rank": 512, "max_position_embeddings": 163840,
    "model_type": "deepseek_v2", "moe_intermediate_size": 1408, "moe_layer_freq": 1, "n_group": 1, "n_routed_experts": 64,
    "n_shared_experts": 2, "norm_topk_prob": False, "num_attention_heads": 16, "num_experts_per_tok": 6,
    "num_hidden_layers": 27, "num_key_value_heads": 16, "pretraining_tp": 1, "q_lora_rank": None, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06,
    "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707,
                     "original_max_position_embeddings": 4096, "type": "yarn"},
    "rope_theta": 10000, "routed_scaling_factor": 1.0, "scoring_func": "softmax", "seq_aux": True,
    "tie_word_embeddings": False, "topk_group": 1, "topk_method": "greedy", "torch_dtype": "bfloat16",
    "transformers_version": "4.33.1", "use_cache": True, "v_head_dim": 128, "vocab_size": 102400,
}  # fmt: skip
_V3 = {
    "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}, "bos_token_id": 0, "eos_token_id": 1,
    "ep_size": 1, "first_k_dense_replace": 3, "hidden_act": "silu", "hidden_size": 7168, "initializer_range": 0.02,
    "intermediate_size": 18432, "kv_lora_rank": 512, "max_position_embeddings": 163840, "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 8, "n_routed_experts": 256, "n_shared_experts": 1,
    "norm_topk_prob": True, "num_attention_heads": 128, "num_experts_per_tok": 8, "num_hidden_layers": 61,
    "num_key_value_heads": 128, "num_nextn_predict_layers": 1, "q_lora_rank": 1536, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
                            "weight_block_size": [128, 128]},
    "rms_norm_eps": 1e-06,
    "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
                     "original_max_position_embeddings": 4096, "type": "yarn"},
    "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "tie_word_embeddings": False,
    "topk_group": 4, "topk_method": "noaux_tc", "torch_dtype": "bfloat16", "transformers_version": "4.33.1",
    "use_cache": True, "v_head_dim": 128, "vocab_size": 129280,
}  # fmt: skip


def _without(config, *keys):
    return {key: value for key, value in config.items() if key not in keys}


CONVERTS = {
    "meta-llama/Llama-2-7b-hf": _LLAMA2,
    "meta-llama/Llama-2-70b-hf": {**_LLAMA2, "num_attention_heads": 64, "num_key_value_heads": 8, "hidden_size": 8192},
    "codellama/CodeLlama-7b-hf": {**_LLAMA2, "rope_theta": 1000000, "max_position_embeddings": 16384, "vocab_size": 32016},
    "lmsys/vicuna-7b-v1.5": {
        **_LLAMA2, "_name_or_path": "vicuna-7b-v1.5", "temperature": 0.9, "top_p": 0.6, "max_length": 4096,
        "pad_token_id": 0,
    },
    "openlm-research/open_llama_3b": _without(
        {**_LLAMA2, "max_position_embeddings": 2048, "rms_norm_eps": 1e-06}, "num_key_value_heads", "pretraining_tp"
    ),
    "TinyLlama/TinyLlama-1.1B": {**_LLAMA2, "hidden_size": 2048, "num_key_value_heads": 4, "intermediate_size": 5632},
    "tokyotech-llm/Swallow-7b-hf": {**_LLAMA2, "vocab_size": 43176, "attention_bias": False},
    "01-ai/Yi-6B": {**_LLAMA2, "num_key_value_heads": 4, "rope_theta": 5000000.0, "pad_token_id": 0, "vocab_size": 64000},
    "deepseek-ai/deepseek-llm-7b-base": {**_LLAMA2, "rms_norm_eps": 1e-06, "vocab_size": 102400, "bos_token_id": 100000},
    "deepseek-ai/deepseek-coder-6.7b-base": {
        **_LLAMA2, "rope_scaling": {"factor": 4.0, "type": "linear"}, "rope_theta": 100000, "vocab_size": 32256,
    },
    "sbintuitions/sarashina2-7b": {**_LLAMA2, "pad_token_id": 3, "sep_token_id": 5, "unk_token_id": 0, "vocab_size": 102400},
    "llm-jp/llm-jp-3-1.8b": {**_LLAMA3, "head_dim": 128, "vocab_size": 99584, "rope_theta": 10000, "mlp_bias": False},
    "meta-llama/Meta-Llama-3-8B": _LLAMA3,
    "meta-llama/Llama-3.1-8B": _LLAMA31,
    "meta-llama/Llama-3.2-1B": _LLAMA32,
    "meta-llama/Llama-3.3-70B-Instruct": {**_LLAMA31, "eos_token_id": [128001, 128008, 128009], "head_dim": 128},
    "unsloth/Llama-3.2-1B": {
        **_LLAMA32, "_name_or_path": "meta-llama/Llama-3.2-1B", "_attn_implementation_autoset": True,
        "pad_token_id": 128004, "unsloth_fixed": True, "unsloth_version": "2024.9", "transformers_version": "4.47.1",
    },
    "onnx-community/Llama-3.2-1B": {
        **_LLAMA32, "_attn_implementation_autoset": True,
        "transformers.js_config": {"dtype": "q4", "kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
    },
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": {**_LLAMA31, "transformers_version": "4.43.0.dev0"},
    "tokyotech-llm/Llama-3.1-Swallow-8B-v0.2": {**_LLAMA31, "_name_or_path": "model", "transformers_version": "4.45.2"},
    "nvidia/Llama-3.1-Nemotron-Nano-8B-v1": {**_LLAMA31, "_attn_implementation_autoset": True},
    "NousResearch/Hermes-3-Llama-3.1-8B": {**_LLAMA31, "eos_token_id": 128040, "use_cache": False},
    "HuggingFaceTB/SmolLM-135M": {
        **_LLAMA3, "_name_or_path": "smollm", "head_dim": 64, "tie_word_embeddings": True, "vocab_size": 49152,
        "mlp_bias": False, "is_llama_config": True, "rope_interleaved": False, "rope_theta": 10000.0,
    },
    "HuggingFaceTB/SmolLM2-1.7B": {
        **_LLAMA3, "tie_word_embeddings": True, "rope_theta": 130000, "vocab_size": 49152, "mlp_bias": False,
        "is_llama_config": True, "rope_interleaved": False, "transformers.js_config": {"dtype": "q4"},
    },
    "tiiuae/Falcon3-7B-Base": {
        **_LLAMA3, "activation": "swiglu", "head_dim": 256, "mlp_bias": False, "rope_theta": 1000042, "vocab_size": 131072,
        "bos_token_id": None, "eos_token_id": 11, "pad_token_id": 2023, "rms_norm_eps": 1e-06,
    },
    "saved by transformers 5": {
        **_without(_LLAMA31, "rope_theta", "rope_scaling", "torch_dtype"), "dtype": "bfloat16", "head_dim": 128,
        "rope_parameters": {**_ROPE31, "rope_theta": 500000.0}, "transformers_version": "5.0.0", "pad_token_id": None,
    },
    "saved by transformers 5, Qwen3": {
        **_without(_QWEN3, "rope_theta", "rope_scaling", "torch_dtype"), "dtype": "bfloat16",
        "layer_types": ["full_attention"] * 36, "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"},
    },
    "saved by transformers 5, Qwen3 MoE": {
        **_without(_QWEN3_MOE, "num_experts", "rope_theta", "rope_scaling"), "num_local_experts": 128,
        "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"},
    },
    "mistralai/Mistral-7B-v0.1": _MISTRAL,
    "mistralai/Mistral-7B-v0.3": {**_MISTRAL, "sliding_window": None, "rope_theta": 1e6, "vocab_size": 32768},
    "mistralai/Mistral-Nemo-Base-2407": {
        **_MISTRAL, "head_dim": 128, "hidden_size": 5120, "max_position_embeddings": 128000, "rope_theta": 1000000.0,
        "sliding_window": None, "vocab_size": 131072, "attention_dropout": 0.0,
    },
    "mistralai/Mistral-Small-24B-Base-2501": {
        **_MISTRAL, "attention_dropout": 0.0, "head_dim": 128, "hidden_size": 5120, "rope_theta": 100000000.0,
        "sliding_window": None, "vocab_size": 131072,
    },
    "HuggingFaceH4/zephyr-7b-beta": {**_MISTRAL, "_name_or_path": "m", "pad_token_id": 2},
    "mistralai/Mixtral-8x7B-v0.1": _MIXTRAL,
    "mistralai/Mixtral-8x22B-v0.1": {**_MIXTRAL, "router_jitter_noise": 0.0, "num_attention_heads": 48, "hidden_size": 6144},
    "Qwen/Qwen1.5-7B": {**_QWEN2, "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 151936},
    "Qwen/Qwen2-7B": _QWEN2,
    "Qwen/Qwen2.5-0.5B": {**_QWEN25, "tie_word_embeddings": True, "max_window_layers": 24, "vocab_size": 151936},
    "Qwen/Qwen2.5-7B": _QWEN25,
    "Qwen/Qwen2.5-7B-Instruct": {**_QWEN2, "eos_token_id": 151645, "max_position_embeddings": 32768},
    "Qwen/Qwen2.5-Coder-32B": {**_QWEN2, "num_attention_heads": 40, "num_key_value_heads": 8, "hidden_size": 5120},
    "Qwen/Qwen2.5-Math-7B": {**_QWEN25, "rope_theta": 10000, "max_position_embeddings": 4096},
    "Qwen/QwQ-32B": {
        **_QWEN2, "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"},
    },
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": {**_QWEN25, "rope_theta": 10000, "use_mrope": False},
    "unsloth/Qwen2.5-7B": {**_QWEN2, "_attn_implementation_autoset": True, "unsloth_fixed": True, "pad_token_id": 151665},
    "Qwen/Qwen3-0.6B": {**_QWEN3, "tie_word_embeddings": True, "num_attention_heads": 16, "hidden_size": 1024},
    "Qwen/Qwen3-8B-Base": {**_QWEN3, "eos_token_id": 151643, "max_position_embeddings": 32768},
    "Qwen/Qwen3-4B-Instruct-2507": {**_QWEN3, "max_position_embeddings": 262144, "rope_theta": 5000000},
    "Qwen/Qwen3-30B-A3B": _QWEN3_MOE,
    "Qwen/Qwen3-Coder-30B-A3B-Instruct": {
        **_without(_QWEN3_MOE, "bos_token_id"), "qkv_bias": False, "shared_expert_intermediate_size": 0,
        "use_qk_norm": True, "rope_theta": 10000000, "max_position_embeddings": 262144, "max_window_layers": 28,
    },
    "deepseek-ai/DeepSeek-V2-Lite": _V2_LITE,
    "deepseek-ai/DeepSeek-Coder-V2-Lite-Base": _V2_LITE,
    "deepseek-ai/DeepSeek-V3-Base": _V3,
    "deepseek-ai/DeepSeek-R1": {**_V3, "transformers_version": "4.46.3"},
    "moonshotai/Kimi-K2-Base": {
        **_V3, "model_type": "kimi_k2", "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "n_routed_experts": 384,
        "num_attention_heads": 64, "num_nextn_predict_layers": 0, "routed_scaling_factor": 2.827, "aux_loss_alpha": 0.001,
        "seq_aux": True, "pretraining_tp": 1, "rope_theta": 50000.0, "vocab_size": 163840,
        "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
    },
    "moonshotai/Moonlight-16B-A3B": {
        **_without(_V3, "quantization_config", "rope_scaling"), "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
        "n_shared_experts": 2, "num_experts_per_tok": 6, "num_nextn_predict_layers": 0, "q_lora_rank": None,
        "rms_norm_eps": 1e-05, "rope_theta": 50000.0, "routed_scaling_factor": 2.446, "aux_loss_alpha": 0.001,
        "seq_aux": True, "pretraining_tp": 1, "vocab_size": 163840,
    },
}  # fmt: skip
"""Name -> config.json of models that are converted, most of them bases that a team continues."""

REFUSED = {
    "Qwen/Qwen2.5-7B-Instruct-1M": (
        {**_QWEN2, "dual_chunk_attention_config": {"chunk_size": 262144, "local_size": 8192}},
        "key dual_chunk_attention_config",
    ),
    "Qwen2 with images": ({**_QWEN25, "use_mrope": True}, "use_mrope .*rotary positions in three axes"),
    "Qwen2 with windows in late layers": (
        {**_QWEN2, "use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 20},
        "max_window_layers is 20",
    ),
    "deepseek-ai/DeepSeek-V2": (
        {**_V2_LITE, "n_group": 8, "topk_group": 3, "topk_method": "group_limited_greedy", "q_lora_rank": 1536},
        "topk_group is 3",
    ),
    "deepseek-ai/DeepSeek-V3.2-Exp": (
        {**_V3, "architectures": ["DeepseekV32ForCausalLM"], "model_type": "deepseek_v32", "index_topk": 2048},
        "DeepseekV32ForCausalLM is not known",
    ),
    "THUDM/a Llama with biases": ({**_LLAMA3, "attention_bias": True}, "attention_bias is True"),
    "Llama with MLP biases": ({**_LLAMA31, "mlp_bias": True}, "mlp_bias is True .biases in the feed-forward network"),
    "an older Phi as Llama": ({**_LLAMA2, "partial_rotary_factor": 0.4}, "rotary positions on a part of each head"),
    "a Llama with interleaved rope": ({**_LLAMA3, "rope_interleaved": True}, "order of a head's channels"),
    "togethercomputer/long context": (
        {**_LLAMA2, "rope_scaling": {"type": "dynamic", "factor": 8.0}}, "rope_type is 'dynamic'",
    ),
    "TheBloke/AWQ": (
        {**_LLAMA2, "quantization_config": {"quant_method": "awq", "bits": 4}}, "quantization_config",
    ),
    "tiiuae/falcon-7b": ({"architectures": ["FalconForCausalLM"], "model_type": "falcon"}, "FalconForCausalLM is not known"),
    "mosaicml/mpt-7b": ({"architectures": ["MPTForCausalLM"], "model_type": "mpt"}, "MPTForCausalLM is not known"),
    "EleutherAI/pythia": ({"architectures": ["GPTNeoXForCausalLM"], "model_type": "gpt_neox"}, "GPTNeoXForCausalLM is not"),
    "meta-llama/Llama-4-Scout": (
        {"architectures": ["Llama4ForConditionalGeneration"], "model_type": "llama4", "text_config": {}}, "is not known",
    ),
}  # fmt: skip
"""Name -> config.json and what the error says, of models that are not."""
