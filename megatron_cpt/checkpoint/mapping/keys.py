"""Keys of config.json that all architectures treat alike: those that change nothing, and those that hold one value.

transformers writes several dozen keys that have nothing to do with the network, and other programs add their own.
"""

from typing import Any

HARMLESS = frozenset(
    """
    architectures model_type transformers_version dtype torch_dtype _name_or_path name_or_path auto_map _commit_hash
    use_cache return_dict return_dict_in_generate output_hidden_states output_attentions output_router_logits
    output_scores bos_token_id eos_token_id pad_token_id sep_token_id unk_token_id cls_token_id mask_token_id
    decoder_start_token_id forced_bos_token_id forced_eos_token_id bad_words_ids suppress_tokens begin_suppress_tokens
    id2label label2id num_labels problem_type finetuning_task task_specific_params prefix tokenizer_class
    chunk_size_feed_forward torchscript tie_encoder_decoder use_bfloat16 tf_legacy_loss max_length min_length do_sample
    early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p typical_p repetition_penalty
    length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size num_return_sequences remove_invalid_values
    exponential_decay_length_penalty generation_config _attn_implementation attn_implementation
    _attn_implementation_autoset _experts_implementation _flash_attn_2_enabled pretraining_tp is_composition
    unsloth_fixed unsloth_version transformers.js_config is_llama_config gradient_checkpointing original_vocab_size
    max_window_layers num_nextn_predict_layers ep_size seq_aux aux_loss_alpha qk_head_dim
    """.split()
)
"""Keys that change nothing in the forward pass, for any value, or are kept with the model (`hf` in the manifest)."""

REQUIRED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "activation": ("swiglu", "silu"),
    "mlp_bias": (False, None),
    "is_encoder_decoder": (False, None),
    "is_decoder": (False, None),
    "add_cross_attention": (False, None),
    "cross_attention_hidden_size": (None,),
    "pruned_heads": ({}, None),
    "decoder_sparse_step": (1,),
    "moe_layer_freq": (1,),
    "router_jitter_noise": (0, 0.0, None),
    "rope_interleave": (True,),
    "partial_rotary_factor": (1, 1.0, None),
    "clip_qkv": (None,),
    "quantization_config": (None,),
    "use_sliding_window_layers": (None, False),
    "embedding_multiplier": (1, 1.0, None),
    "residual_multiplier": (1, 1.0, None),
    "logits_scaling": (1, 1.0, None),
    "logit_scale": (1, 1.0, None),
}
"""Keys that are absent or hold one of these values."""

MEANINGS = {
    "hidden_act": "the activation of the feed-forward network",
    "activation": "the activation of the feed-forward network",
    "mlp_bias": "biases in the feed-forward network",
    "is_encoder_decoder": "an encoder in addition to the decoder",
    "add_cross_attention": "attention to an encoder",
    "decoder_sparse_step": "experts in every n-th layer only",
    "moe_layer_freq": "experts in every n-th layer only",
    "router_jitter_noise": "noise on the router's inputs in training",
    "rope_interleave": "the order of a head's channels in the rotary embedding",
    "rope_interleaved": "the order of a head's channels in the rotary embedding",
    "partial_rotary_factor": "rotary positions on a part of each head",
    "clip_qkv": "queries, keys and values cut off at a bound",
    "quantization_config": "weights stored in another format",
    "use_mrope": "rotary positions in three axes (images)",
    "embedding_multiplier": "a factor on the embeddings",
    "residual_multiplier": "a factor on each layer's output",
    "logits_scaling": "a factor on the logits",
    "logit_scale": "a factor on the logits",
    "attention_multiplier": "a scale of the attention logits of its own",
    "query_pre_attn_scalar": "a scale of the attention logits of its own",
    "attn_logit_softcapping": "a soft bound on the attention logits",
    "final_logit_softcapping": "a soft bound on the logits",
    "no_rope_layers": "layers without rotary positions",
    "no_rope_layer_interval": "layers without rotary positions",
    "use_qk_norm": "norms on queries and keys",
    "use_bias": "biases in the linear layers",
    "bias": "biases in the linear layers",
    "num_experts": "a mixture of experts",
    "num_local_experts": "a mixture of experts",
    "n_routed_experts": "a mixture of experts",
    "shared_expert_intermediate_size": "a shared expert with a gate",
    "vision_config": "a second model for images",
    "text_config": "a model of several parts",
    "audio_config": "a second model for sound",
    "index_topk": "sparse attention with an indexer",
    "attn_output_gate": "a gate on the attention's output",
    "full_attention_interval": "linear attention in the layers between",
}
"""Meaning of a key that changes the model."""
