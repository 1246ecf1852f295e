"""The table from settings to Megatron-Core arguments and Megatron-LM flags; imports no megatron.

Each field of `RunConfig` has exactly one row. A row lists the Megatron-Core arguments of a setting or, if Megatron-Core
has none, the module that implements the setting; and the equivalent Megatron-LM flag, if there is one. Tests hold both
directions: no setting without a row, no row whose argument the installed megatron-core lacks.

The file is long because the table is. Source: argument names from megatron-core 0.19.2, flags from Megatron-LM's
`megatron/training/arguments.py`.
"""

from dataclasses import dataclass
from typing import Any

from megatron_cpt.config.megatron.values import (
    Condition,
    Value,
    always,
    cooldown_samples,
    duration,
    exit_minutes,
    has_weight_decay_schedule,
    is_bf16,
    is_mla,
    is_mla_with_yarn,
    is_moe,
    is_muon,
    is_yarn,
    lm_cooldown_style,
    lm_decay_style,
    moe_layer_freq,
    recompute,
    recomputes_layers,
    step_batch_sizes,
    weight_decay_bound,
    window,
)
from megatron_cpt.config.settings import derived
from megatron_cpt.config.settings.fields import setting_value
from megatron_cpt.config.settings.schema import RunConfig


@dataclass(frozen=True)
class Row:
    """How one setting reaches Megatron-Core and Megatron-LM."""

    setting: str
    """Dotted key."""
    arguments: tuple[str, ...] = ()
    """`Target.argument` of each Megatron-Core argument; none: see `honoured_by`."""
    flag: str | None = None
    """Megatron-LM's flag."""
    value: Value | None = None
    """The argument's value; None: the setting itself."""
    when: Condition = always
    """Whether the arguments and the flag are given at all."""
    flag_value: Value | None = None
    """The flag's value: None omits it, True writes the bare flag; no function: the argument's value."""
    honoured_by: str = ""
    """The module that implements a setting without a Megatron-Core argument."""

    def argument_value(self, config: RunConfig) -> Any:
        """Return what the row's arguments are set to."""
        return setting_value(config, self.setting) if self.value is None else self.value(config)


def _moe(setting: str, **options: Any) -> Row:
    name = options.pop("argument", setting)
    flag = options.pop("flag", "--" + name.replace("_", "-"))
    return Row(f"model.{setting}", (f"TransformerConfig.{name}",), flag, when=is_moe, **options)


def _mla(setting: str, *, when: Condition = is_mla, argument: str | None = None, **options: Any) -> Row:
    name = argument or setting
    flag = options.pop("flag", "--" + name.replace("_", "-"))
    return Row(f"model.{setting}", (f"MLATransformerConfig.{name}",), flag, when=when, **options)


_MODEL = (
    Row("model.num_layers", ("TransformerConfig.num_layers",), "--num-layers"),
    Row("model.hidden_size", ("TransformerConfig.hidden_size",), "--hidden-size"),
    Row("model.ffn_hidden_size", ("TransformerConfig.ffn_hidden_size",), "--ffn-hidden-size"),
    Row("model.num_attention_heads", ("TransformerConfig.num_attention_heads",), "--num-attention-heads"),
    Row(
        "model.num_query_groups",
        ("TransformerConfig.num_query_groups",),
        "--num-query-groups",
        value=lambda config: derived.num_query_groups(config.model),
    ),
    Row(
        "model.kv_channels",
        ("TransformerConfig.kv_channels",),
        "--kv-channels",
        value=lambda config: derived.kv_channels(config.model),
    ),
    Row(
        "model.vocab_size",
        ("GPTModel.vocab_size",),
        "--vocab-size",
        value=lambda config: derived.padded_vocab_size(config.model),
        flag_value=lambda config: config.model.vocab_size,
    ),
    Row(
        "model.make_vocab_size_divisible_by",
        flag="--make-vocab-size-divisible-by",
        # Megatron-LM pads to a multiple of this times TP, we to a multiple of this under every layout.
        flag_value=lambda config: max(
            config.model.make_vocab_size_divisible_by // config.parallel.tensor_model_parallel_size, 1
        ),
        honoured_by="config/settings/derived.py, padded_vocab_size",
    ),
    Row("model.max_position_embeddings", ("GPTModel.max_sequence_length",), "--max-position-embeddings"),
    Row("model.rotary_base", ("GPTModel.rotary_base", "MLATransformerConfig.rotary_base"), "--rotary-base"),
    Row(
        "model.rope_scaling_type",
        ("MLATransformerConfig.rope_type",),
        "--use-rope-scaling",
        value=lambda config: "yarn" if is_yarn(config) else "rope",
        flag_value=lambda config: config.model.rope_scaling_type == "llama3",
        honoured_by="train/model/build.py computes the scaled rotary frequencies without multi-latent attention",
    ),
    Row(
        "model.rope_scaling_factor",
        ("MLATransformerConfig.rotary_scaling_factor",),
        flag_value=lambda config: None,  # one flag per type of scaling: see megatron_flags
        honoured_by="train/model/build.py computes the scaled rotary frequencies without multi-latent attention",
    ),
    Row("model.rope_low_freq_factor", honoured_by="train/model/build.py, rotary_frequencies"),
    Row("model.rope_high_freq_factor", honoured_by="train/model/build.py, rotary_frequencies"),
    _mla(
        "rope_original_max_position_embeddings",
        argument="original_max_position_embeddings",
        flag=None,
        when=is_mla_with_yarn,
        value=lambda config: derived.rope_original_max_position_embeddings(config.model),
    ),
    _mla("rope_beta_fast", argument="beta_fast", flag=None, when=is_mla_with_yarn),
    _mla("rope_beta_slow", argument="beta_slow", flag=None, when=is_mla_with_yarn),
    _mla("rope_mscale", argument="mscale", when=is_mla_with_yarn),
    _mla("rope_mscale_all_dim", argument="mscale_all_dim", when=is_mla_with_yarn),
    Row("model.latent_layernorm_epsilon", honoured_by="train/model/build.py, set_latent_epsilon"),
    Row("model.layernorm_epsilon", ("TransformerConfig.layernorm_epsilon",), "--norm-epsilon"),
    Row(
        "model.untie_embeddings_and_output_weights",
        ("GPTModel.share_embeddings_and_output_weights",),
        "--untie-embeddings-and-output-weights",
        value=lambda config: not config.model.untie_embeddings_and_output_weights,
        flag_value=lambda config: config.model.untie_embeddings_and_output_weights,
    ),
    Row("model.add_qkv_bias", ("TransformerConfig.add_qkv_bias",), "--add-qkv-bias"),
    Row("model.qk_layernorm", ("TransformerConfig.qk_layernorm",), "--qk-layernorm"),
    Row("model.window_size", ("TransformerConfig.window_size",), "--window-size", value=window),
    Row("model.init_method_std", ("TransformerConfig.init_method_std",), "--init-method-std"),
    Row("model.hidden_dropout", ("TransformerConfig.hidden_dropout",), "--hidden-dropout"),
    Row("model.attention_dropout", ("TransformerConfig.attention_dropout",), "--attention-dropout"),
    _moe("num_moe_experts", flag="--num-experts"),
    _moe("moe_ffn_hidden_size"),
    _moe("moe_router_topk"),
    _moe("moe_num_dense_layers", argument="moe_layer_freq", value=moe_layer_freq),
    _moe("moe_shared_expert_intermediate_size"),
    _moe("moe_router_score_function"),
    _moe("moe_router_pre_softmax"),
    _moe("moe_router_enable_expert_bias"),
    _moe("moe_router_topk_scaling_factor"),
    _moe("moe_router_num_groups"),
    _moe("moe_router_group_topk"),
    _moe("moe_router_bias_update_rate"),
    _moe("moe_aux_loss_coeff"),
    _moe("moe_z_loss_coeff"),
    Row("model.multi_latent_attention", ("TransformerConfig.multi_latent_attention",), "--multi-latent-attention"),
    _mla("q_lora_rank"),
    _mla("kv_lora_rank"),
    _mla("qk_head_dim"),
    _mla("qk_pos_emb_head_dim"),
    _mla("v_head_dim"),
)

_PARALLEL = (
    Row(
        "parallel.tensor_model_parallel_size",
        ("TransformerConfig.tensor_model_parallel_size",),
        "--tensor-model-parallel-size",
    ),
    Row(
        "parallel.pipeline_model_parallel_size",
        ("TransformerConfig.pipeline_model_parallel_size",),
        "--pipeline-model-parallel-size",
    ),
    Row(
        "parallel.virtual_pipeline_model_parallel_size",
        ("TransformerConfig.virtual_pipeline_model_parallel_size",),
        "--num-virtual-stages-per-pipeline-rank",
        value=lambda config: derived.megatron_virtual_size(config.parallel),
    ),
    Row(
        "parallel.num_layers_in_first_pipeline_stage",
        ("TransformerConfig.num_layers_in_first_pipeline_stage",),
        "--decoder-first-pipeline-num-layers",
    ),
    Row(
        "parallel.num_layers_in_last_pipeline_stage",
        ("TransformerConfig.num_layers_in_last_pipeline_stage",),
        "--decoder-last-pipeline-num-layers",
        value=lambda config: derived.stated_last_stage_layers(config.parallel),
    ),
    Row("parallel.context_parallel_size", ("TransformerConfig.context_parallel_size",), "--context-parallel-size"),
    Row(
        "parallel.expert_model_parallel_size",
        ("TransformerConfig.expert_model_parallel_size",),
        "--expert-model-parallel-size",
    ),
    Row(
        "parallel.expert_tensor_parallel_size",
        ("TransformerConfig.expert_tensor_parallel_size",),
        "--expert-tensor-parallel-size",
    ),
    Row("parallel.sequence_parallel", ("TransformerConfig.sequence_parallel",), "--sequence-parallel"),
    Row(
        "parallel.use_distributed_optimizer",
        ("OptimizerConfig.use_distributed_optimizer", "DistributedDataParallelConfig.use_distributed_optimizer"),
        "--use-distributed-optimizer",
    ),
    Row(
        "parallel.overlap_grad_reduce",
        ("DistributedDataParallelConfig.overlap_grad_reduce",),
        "--overlap-grad-reduce",
    ),
    Row(
        "parallel.overlap_param_gather",
        ("OptimizerConfig.overlap_param_gather", "DistributedDataParallelConfig.overlap_param_gather"),
        "--overlap-param-gather",
    ),
    Row(
        "parallel.recompute_granularity",
        ("TransformerConfig.recompute_granularity",),
        "--recompute-granularity",
        value=recompute,
    ),
    Row(
        "parallel.recompute_method",
        ("TransformerConfig.recompute_method",),
        "--recompute-method",
        when=recomputes_layers,
    ),
    Row(
        "parallel.recompute_num_layers",
        ("TransformerConfig.recompute_num_layers",),
        "--recompute-num-layers",
        when=recomputes_layers,
    ),
)

_TRAINING = (
    Row("training.seq_length", ("GPTDatasetConfig.sequence_length",), "--seq-length"),
    Row("training.micro_batch_size", flag="--micro-batch-size", honoured_by="train/samples/batches.py"),
    Row(
        "training.global_batch_size",
        flag="--global-batch-size",
        # Megatron-LM refuses it beside a step schedule, whose last step states it
        flag_value=lambda config: None if config.training.rampup_batch_size else config.training.global_batch_size,
        honoured_by="config/settings/derived.py, num_microbatches",
    ),
    Row(
        "training.train_tokens",
        flag="--train-samples",
        flag_value=lambda config: derived.train_samples(config.training),
        honoured_by="config/settings/derived.py, train_iters; the flag --train-samples states all three lengths",
    ),
    Row(
        "training.rampup_batch_size",
        flag="--step-batch-size-schedule",
        flag_value=step_batch_sizes,
        honoured_by="config/settings/batch_sizes.py",
    ),
    Row("training.train_samples", honoured_by="config/settings/derived.py, train_iters"),
    Row("training.train_epochs", honoured_by="data/blend/epochs.py"),
    Row("training.train_iters", honoured_by="config/settings/derived.py, train_iters"),
    Row(
        "training.precision",
        (
            "TransformerConfig.bf16",
            "OptimizerConfig.bf16",
            "DistributedDataParallelConfig.grad_reduce_in_fp32",
        ),
        "--bf16",
        value=is_bf16,
    ),
    Row("training.seed", ("GPTDatasetConfig.random_seed",), "--seed"),
    Row("training.z_loss_coeff", honoured_by="train/model/build.py, CptGPTModel"),
    Row("training.spike_threshold", honoured_by="train/watch/spikes.py"),
    Row("training.spike_action", honoured_by="train/stage/spike_reaction.py"),
    Row("training.spike_skip_iterations", honoured_by="train/watch/spikes.py"),
    Row("training.spike_max_rollbacks", honoured_by="train/watch/spikes.py"),
    Row("training.neftune_alpha", honoured_by="train/model/neftune.py"),
    Row("training.compile", honoured_by="train/model/build.py, compile_layers"),
    Row("training.deterministic", ("TransformerConfig.deterministic_mode",), "--deterministic-mode"),
)

_NEUTRAL = "train/stage/schedule.py sets it at each step; the optimizer's groups carry neutral constants, so that it may change"
_SCHEDULE = (
    Row("optimizer.name", ("OptimizerConfig.optimizer",), "--optimizer"),
    Row("optimizer.muon_momentum", ("OptimizerConfig.muon_momentum",), "--muon-momentum", when=is_muon),
    Row("optimizer.lr", flag="--lr", honoured_by=_NEUTRAL),
    Row("optimizer.min_lr", flag="--min-lr", honoured_by=_NEUTRAL),
    Row("optimizer.weight_decay", ("OptimizerConfig.weight_decay",), "--weight-decay"),
    Row(
        "optimizer.weight_decay_start",
        flag="--start-weight-decay",
        when=has_weight_decay_schedule,
        flag_value=weight_decay_bound("weight_decay_start"),
        honoured_by="train/stage/schedule.py",
    ),
    Row(
        "optimizer.weight_decay_end",
        flag="--end-weight-decay",
        when=has_weight_decay_schedule,
        flag_value=weight_decay_bound("weight_decay_end"),
        honoured_by="train/stage/schedule.py",
    ),
    Row(
        "optimizer.weight_decay_incr_style",
        flag="--weight-decay-incr-style",
        when=has_weight_decay_schedule,
        honoured_by="train/stage/schedule.py",
    ),
    Row("optimizer.weight_decay_incr", honoured_by="train/stage/schedule.py"),
    Row("optimizer.adam_beta1", ("OptimizerConfig.adam_beta1",), "--adam-beta1"),
    Row("optimizer.adam_beta2", ("OptimizerConfig.adam_beta2",), "--adam-beta2"),
    Row("optimizer.adam_eps", ("OptimizerConfig.adam_eps",), "--adam-eps"),
    Row("optimizer.clip_grad", ("OptimizerConfig.clip_grad",), "--clip-grad"),
    Row(
        "schedule.lr_decay_style",
        flag="--lr-decay-style",
        flag_value=lm_decay_style,
        honoured_by="train/stage/schedule.py",
    ),
    Row(
        "schedule.lr_decay",
        flag="--lr-decay-samples",
        when=lambda config: config.schedule.lr_decay is not None,
        flag_value=duration("schedule.lr_decay"),
        honoured_by="train/stage/schedule.py",
    ),
    Row(
        "schedule.lr_warmup",
        flag="--lr-warmup-samples",
        flag_value=duration("schedule.lr_warmup"),
        honoured_by="train/stage/schedule.py",
    ),
    Row("schedule.lr_warmup_init", flag="--lr-warmup-init", honoured_by="train/stage/schedule.py"),
    Row(
        "schedule.lr_cooldown",
        flag="--lr-wsd-decay-samples",
        flag_value=cooldown_samples,
        honoured_by="train/stage/schedule.py",
    ),
    Row(
        "schedule.lr_cooldown_style",
        flag="--lr-wsd-decay-style",
        flag_value=lm_cooldown_style,
        honoured_by="train/stage/schedule.py",
    ),
    Row("schedule.lr_hold", honoured_by="train/stage/schedule.py"),
    Row("schedule.lr_hold_start", honoured_by="train/stage/schedule.py"),
)

_DATA = (
    Row("data.tokenizer", flag="--tokenizer-model", honoured_by="data/tokenizer/interface.py"),
    Row("data.corpora", honoured_by="data/blend/plan.py"),
    Row("data.mix", honoured_by="data/blend/plan.py"),
    Row("data.rules", honoured_by="data/blend/sources.py"),
    Row("data.base_pool", honoured_by="data/blend/sources.py"),
    Row("data.base_ratio", honoured_by="data/blend/sources.py"),
    Row("data.cap_epochs", honoured_by="data/blend/sources.py"),
    Row("data.train_data_path", honoured_by="data/blend/plan.py"),
    Row("data.order", honoured_by="data/blend/start_position.py"),
    Row("data.max_epochs", honoured_by="data/blend/plan.py"),
    Row("data.buffer", honoured_by="data/blend/sources.py, data/blend/replay.py"),
    Row("data.shuffle_in_corpus", honoured_by="train/samples/stage_samples.py, data/blend/order.py"),
    Row("data.skip_list", honoured_by="data/shards/skip_list.py, train/samples/stage_samples.py"),
    Row("data.skip_iterations", honoured_by="train/samples/skipped_iterations.py"),
    Row("data.fim_rate", honoured_by="data/blend/fim.py, train/samples/stage_samples.py"),
    Row("data.fim_spm_rate", honoured_by="data/blend/fim.py"),
    Row("data.fim_prefix_token", honoured_by="data/blend/fim.py"),
    Row("data.fim_middle_token", honoured_by="data/blend/fim.py"),
    Row("data.fim_suffix_token", honoured_by="data/blend/fim.py"),
    Row("data.fim_corpora", honoured_by="data/blend/fim.py"),
    Row("data.prompt_loss_weight", honoured_by="train/samples/shard_samples.py, train/stage/step.py"),
    Row("data.reset_attention_mask", ("GPTDatasetConfig.reset_attention_mask",), "--reset-attention-mask"),
    Row("data.eod_mask_loss", ("GPTDatasetConfig.eod_mask_loss",), "--eod-mask-loss"),
)

_RUN = (
    Row("init.from_path", flag="--load", honoured_by="train/state/start_weights.py"),
    Row("init.ignore_config", honoured_by="train/state/start_weights.py"),
    Row("init.skip_tensors", honoured_by="train/state/start_weights.py"),
    Row(
        "init.load",
        flag="--finetune",
        flag_value=lambda config: config.init.load == "weights" and config.init.from_path is not None,
        honoured_by="train/state/checkpointing.py",
    ),
    Row("checkpoint.save_interval", flag="--save-interval", honoured_by="train/stage/loop.py"),
    Row("checkpoint.keep_last", honoured_by="checkpoint/torch_dist/retention.py"),
    Row("checkpoint.keep_every", honoured_by="checkpoint/torch_dist/retention.py"),
    Row("checkpoint.keep_bytes", honoured_by="train/stage/saving.py"),
    Row("checkpoint.verify_on_save", honoured_by="train/stage/saving.py"),
    Row("checkpoint.async_save", flag="--async-save", honoured_by="train/stage/saving.py"),
    Row("checkpoint.verify_on_load", honoured_by="train/state/start_weights.py"),
    Row("checkpoint.accept_changes", honoured_by="train/state/resume_check.py"),
    Row(
        "evaluation.eval_interval",
        flag="--eval-interval",
        flag_value=lambda config: config.evaluation.eval_interval or None,
        honoured_by="train/stage/loop.py",
    ),
    Row("evaluation.eval_iters", flag="--eval-iters", honoured_by="train/stage/validation.py"),
    Row("logging.log_interval", flag="--log-interval", honoured_by="train/stage/loop.py"),
    Row("logging.tensorboard", honoured_by="train/watch/metrics.py"),
    Row("logging.wandb_project", flag="--wandb-project", honoured_by="train/watch/wandb_run.py"),
    Row("logging.wandb_mode", honoured_by="train/watch/wandb_run.py"),
    Row("paths.runs_dir", honoured_by="run/directory.py"),
    Row("paths.data_dir", honoured_by="config/loading/paths.py"),
    Row("launch.scheduler", honoured_by="launch/submission/submit.py"),
    Row("launch.nodes", honoured_by="launch/submission/submit.py"),
    Row("launch.spare_nodes", honoured_by="launch/submission/submit.py, launch/node/hosts.py"),
    Row("launch.gpus_per_node", honoured_by="launch/submission/submit.py"),
    Row("launch.device", honoured_by="train/backend/parallel.py, launch/submission/submit.py"),
    Row("launch.walltime", honoured_by="launch/scheduler/render.py"),
    Row(
        "launch.exit_before_walltime",
        flag="--exit-duration-in-mins",
        flag_value=exit_minutes,
        honoured_by="train/watch/interrupt.py",
    ),
    Row("launch.hang_timeout", honoured_by="train/stage/loop.py"),
    Row("launch.max_restarts", honoured_by="launch/submission/executor.py"),
    Row("task", honoured_by="run/directory.py"),
    Row("params", honoured_by="run/directory.py"),
    Row("size", honoured_by="run/directory.py"),
    Row("variant", honoured_by="run/directory.py"),
)

ROWS: tuple[Row, ...] = (*_MODEL, *_PARALLEL, *_TRAINING, *_SCHEDULE, *_DATA, *_RUN)
