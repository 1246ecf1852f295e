"""Which values of a single setting make sense: more than nothing, nothing or more, a share."""

from collections.abc import Iterator
from dataclasses import replace
from functools import reduce

from megatron_cpt.config.settings.schema import RunConfig

POSITIVE = {
    "model": "num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels vocab_size "
    "make_vocab_size_divisible_by max_position_embeddings rotary_base rope_scaling_factor rope_low_freq_factor "
    "rope_high_freq_factor rope_original_max_position_embeddings rope_beta_fast rope_beta_slow layernorm_epsilon "
    "window_size init_method_std num_moe_experts moe_ffn_hidden_size moe_router_topk "
    "moe_shared_expert_intermediate_size moe_router_topk_scaling_factor moe_router_num_groups "
    "moe_router_group_topk q_lora_rank kv_lora_rank qk_head_dim qk_pos_emb_head_dim v_head_dim latent_layernorm_epsilon",
    "parallel": "tensor_model_parallel_size pipeline_model_parallel_size virtual_pipeline_model_parallel_size "
    "num_layers_in_first_pipeline_stage num_layers_in_last_pipeline_stage context_parallel_size "
    "expert_model_parallel_size expert_tensor_parallel_size recompute_num_layers",
    "training": "seq_length micro_batch_size global_batch_size train_tokens train_samples train_iters train_epochs "
    "spike_skip_iterations",
    "optimizer": "lr adam_eps",
    "schedule": "lr_hold",
    "data": "max_epochs",
    "checkpoint": "save_interval keep_last keep_every keep_bytes",
    "evaluation": "eval_iters",
    "logging": "log_interval",
    "launch": "nodes gpus_per_node walltime",
}
NOT_NEGATIVE = {
    "model": "rope_mscale rope_mscale_all_dim moe_router_bias_update_rate moe_aux_loss_coeff moe_z_loss_coeff",
    "training": "z_loss_coeff neftune_alpha spike_threshold",
    "optimizer": "min_lr weight_decay weight_decay_start weight_decay_end clip_grad",
    "schedule": "lr_warmup_init",
    "launch": "spare_nodes",
}
BELOW_ONE = {"model": "hidden_dropout attention_dropout", "optimizer": "adam_beta1 adam_beta2 muon_momentum"}


def out_of_range(config: RunConfig) -> Iterator[tuple[str, str]]:
    """Yield the dotted key of each setting outside its range, with the allowed range."""
    for table, needed, is_good in (
        (POSITIVE, "More than 0", lambda value: value > 0),
        (NOT_NEGATIVE, "0 or more", lambda value: value >= 0),
        (BELOW_ONE, "0 or more and less than 1", lambda value: 0 <= value < 1),
    ):
        for section, names in table.items():
            for name in names.split():
                value = getattr(getattr(config, section), name)
                if value is not None and not is_good(value):
                    yield f"{section}.{name}", needed


def with_ones(config: RunConfig, keys: list[str]) -> RunConfig:
    """Return the configuration with 1 for each key, so that the relations of all other settings can be looked at."""

    def with_one(current: RunConfig, key: str) -> RunConfig:
        section, name = key.split(".")
        return replace(current, **{section: replace(getattr(current, section), **{name: 1})})

    return reduce(with_one, keys, config)
