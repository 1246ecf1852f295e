"""The variables of AuroraGPT's `train_alcf.sh`: the setting for each, or the reason for refusing it and its
replacement.

Source: argonne-lcf/Megatron-DeepSpeed, `ALCF/helpers.sh` (`setParams`, `set_args`, `get_training_args`).
"""

SETTINGS = {
    "TRAIN_TOKENS": "training.train_tokens",
    "TRAIN_ITERS": "training.train_iters",
    "MICRO_BATCH": "training.micro_batch_size",
    "GLOBAL_BATCH": "training.global_batch_size",
    "SEQ": "training.seq_length",
    "TP": "parallel.tensor_model_parallel_size",
    "PP": "parallel.pipeline_model_parallel_size",
    "SP": "parallel.context_parallel_size",
    "ACT_CKPT_NUM_LAYERS": "parallel.recompute_num_layers",
    "LR": "optimizer.lr",
    "MIN_LR": "optimizer.min_lr",
    "WEIGHT_DECAY": "optimizer.weight_decay",
    "ADAM_BETA1": "optimizer.adam_beta1",
    "ADAM_BETA2": "optimizer.adam_beta2",
    "ADAM_EPS": "optimizer.adam_eps",
    "CLIP_GRAD": "optimizer.clip_grad",
    "LR_WARMUP_FRACTION": "schedule.lr_warmup",
    "LR_DECAY_STYLE": "schedule.lr_decay_style",
    "LR_DECAY_ITERS": "schedule.lr_decay",
    "LOAD": "init.from_path",
    "SAVE": "paths.runs_dir",
    "SAVE_INTERVAL": "checkpoint.save_interval",
    "EVAL_INTERVAL": "evaluation.eval_interval",
    "EVAL_ITERS": "evaluation.eval_iters",
    "LOG_INTERVAL": "logging.log_interval",
    "HEADS": "model.num_attention_heads",
    "NLAYERS": "model.num_layers",
    "HIDDEN": "model.hidden_size",
    "NUM_KV_HEAD": "model.num_query_groups",
    "FFN_HIDDEN_SIZE": "model.ffn_hidden_size",
    "INIT_METHOD_STD": "model.init_method_std",
}
"""Variable -> setting that takes its value unchanged. SP, Ulysses' ranks per sequence, becomes context parallelism;
SAVE names the folder under which the run directory, with its checkpoints, is made."""

SAME = {
    "LR_WARMUP_FRAC": "LR_WARMUP_FRACTION",
    "SEQ_LEN": "SEQ",
    "TRAIN_ITER": "TRAIN_ITERS",
    "NHEADS": "HEADS",
    "NUM_LAYERS": "NLAYERS",
}
"""Other spellings of a variable."""

VALUES = {
    "OPT": {"adamw": "optimizer.name=adam", "adam": "optimizer.name=adam", "muon": "optimizer.name=muon"},
    "DTYPE": {"bf16": "training.precision=bf16", "fp32": "training.precision=fp32"},
    "ZERO_STAGE": {
        "0": "parallel.use_distributed_optimizer=false",
        "1": "parallel.use_distributed_optimizer=true",
    },
    "USE_ACTIVATION_CHECKPOINTING": {"1": "parallel.recompute_granularity=full"},
    "NO_TENSORBOARD": {"1": "logging.tensorboard=false"},
}
"""Variable -> setting of each value that has one."""

INSTEAD = {
    "OPT": "The optimizers are adam (AdamW) and muon: optimizer.name",
    "DTYPE": "The precisions are bf16 and fp32: training.precision",
    "ZERO_STAGE": "Optimizer state is spread (ZeRO-1) or not; save memory with TP, PP or parallel.recompute_granularity=full",
    "USE_ACTIVATION_CHECKPOINTING": "1 turns recomputing on: parallel.recompute_granularity=full",
    "NO_TENSORBOARD": "1 turns it off: logging.tensorboard=false",
}
"""Error message for a value that is not in `VALUES`."""

REFUSED = {
    "MODEL_ARCH": "Name the architecture with --params, such as llama2-7b",
    "NSTAGES": "Pipeline stages are PP, parallel.pipeline_model_parallel_size; the stages of a task are its variants (--variant)",
    "NO_LLAMA": "Name the architecture with --params",
    "MUP_BASE_WIDTH": "Scaled initialisation is not offered; model.init_method_std and optimizer.lr are set directly",
    "DEPTH_BASE": "Scaled initialisation is not offered; model.init_method_std is set directly",
    "TOKENIZER_TYPE": "A tokenizer is told by its files: TOKENIZER_MODEL, data.tokenizer",
    "TRAIN_SPLIT": "Validation sets are documents of their own: `megatron-cpt data split`, data.corpora.NAME.validation_tokens",
    "VAL_SPLIT": "Validation sets are documents of their own: `megatron-cpt data split`, data.corpora.NAME.validation_tokens",
    "TEST_SPLIT": "Validation sets are documents of their own: `megatron-cpt data split`, data.corpora.NAME.validation_tokens",
    "DS_CONFIG": "DeepSpeed is not used: give its settings as KEY=VALUE (`megatron-cpt show-config --explain`)",
    "CKPT_DIR": "LOAD (init.from_path) and SAVE (paths.runs_dir) say where checkpoints lie",
    "EXEC": "The training program is megatron-cpt train",
    "NO_FLASH_ATTN": "The attention kernel is chosen by the machine and the model",
    "LAUNCH_CMD": "The site file names the launcher: --site",
    "LAUNCH_WITH": "The site file names the launcher: --site",
    "FLASH_ARG": "The attention kernel is chosen by the machine and the model",
    "TIMING_STR": "`megatron-cpt report` and metrics.jsonl hold the times of a run",
}
"""Variable -> what replaces it."""

HARMLESS = frozenset(
    "BE CCL NCCL DATA_CACHE_PATH DEBUG DIST_LAUNCH GPUS_PER_NODE HOSTFILE MACHINE MODEL_TYPE NGPU_PER_HOST NGPUS NHOSTS "
    "OVERRIDE_CKPT_OPT_PARAM OUTPUT_DIR OUTPUT_LOG TIMING_LOG_LEVEL WORKING_DIR WORLD_SIZE TRAIN_ARGS".split()
)
"""Variables of the original or of a job's environment that do not affect a run's result: the layout comes from
launch.nodes and the site file, caches are found by content, optimizer settings always come from the configuration."""
