"""The one configuration object: frozen sections whose fields each carry their meaning, unit and range.

The text under a field is what `show-config --explain` prints. `None` as a default means "follows from other settings"
or "off", as the text states. Types are checked on loading (`config/loading/resolve.py`), relations between fields in
`config/checks/all.py`; the mapping to Megatron-Core in `config/megatron/arguments.py`.
"""

from dataclasses import dataclass, field
from typing import Literal

from megatron_cpt.config.settings.values import BatchRamp, Duration

NONE_AT_ALL = Duration(0, "iterations")
WHOLE_STAGE = Duration(1.0, "fraction")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Architecture, in Megatron's spelling. Set by a params file."""

    num_layers: int
    """Transformer layers. Divisible by pipeline stages unless an uneven split is given."""
    hidden_size: int
    """Width of the residual stream."""
    ffn_hidden_size: int
    """Width of the SwiGLU feed-forward network (of the dense layers, in a mixture of experts)."""
    num_attention_heads: int
    """Query heads. Divisible by tensor_model_parallel_size."""
    num_query_groups: int | None = None
    """Key/value heads of grouped-query attention; None: as many as query heads."""
    kv_channels: int | None = None
    """Dimension of one attention head; None: hidden_size / num_attention_heads."""
    vocab_size: int
    """Rows of the embedding that mean a token, before padding: `vocab_size` of the Hugging Face config."""
    make_vocab_size_divisible_by: int = 128
    """The embedding is padded to a multiple of this, the same under every layout. Padded logits are masked in the
    loss. Divisible by tensor_model_parallel_size."""
    max_position_embeddings: int = 4096
    """Longest sequence that the model supports; seq_length must not exceed it."""
    rotary_base: float = 10000.0
    """Base of the rotary position embedding (`rope_theta`)."""
    rope_scaling_type: Literal["none", "linear", "llama3", "yarn"] = "none"
    """How rotary frequencies are stretched for longer contexts."""
    rope_scaling_factor: float = 1.0
    """Stretch factor of rope_scaling_type."""
    rope_low_freq_factor: float = 1.0
    """Llama-3 scaling: wavelengths longer than original / this are scaled fully."""
    rope_high_freq_factor: float = 4.0
    """Llama-3 scaling: wavelengths shorter than original / this are unchanged."""
    rope_original_max_position_embeddings: int | None = None
    """Context length before scaling (llama3, yarn); None: max_position_embeddings."""
    rope_beta_fast: float = 32.0
    """YaRN: rotations within the original context above which a frequency is kept."""
    rope_beta_slow: float = 1.0
    """YaRN: rotations within the original context below which a frequency is interpolated."""
    rope_mscale: float = 1.0
    """YaRN with multi_latent_attention: attention temperature coefficient."""
    rope_mscale_all_dim: float = 0.0
    """YaRN with multi_latent_attention: attention temperature coefficient over all dimensions (DeepSeek)."""
    layernorm_epsilon: float = 1e-5
    """Epsilon of RMSNorm."""
    untie_embeddings_and_output_weights: bool = True
    """Whether the output layer has weights of its own (`not tie_word_embeddings`)."""
    add_qkv_bias: bool = False
    """Bias on the query, key and value projections (Qwen2)."""
    qk_layernorm: bool = False
    """RMSNorm on queries and keys per head (Qwen3)."""
    window_size: int | None = None
    """Sliding attention window in tokens (Mistral 0.1); None: full causal attention."""
    init_method_std: float = 0.02
    """Standard deviation of initial weights, where a model starts from scratch."""
    hidden_dropout: float = 0.0
    """Dropout on residual branches, 0 to 1."""
    attention_dropout: float = 0.0
    """Dropout on attention weights, 0 to 1."""
    num_moe_experts: int | None = None
    """Experts of a mixture-of-experts layer; None: a dense model."""
    moe_ffn_hidden_size: int | None = None
    """Width of one expert."""
    moe_router_topk: int = 2
    """Experts that a token visits."""
    moe_num_dense_layers: int = 0
    """Leading layers that stay dense (`first_k_dense_replace` of DeepSeek)."""
    moe_shared_expert_intermediate_size: int | None = None
    """Total width of the experts every token visits; None: no shared experts."""
    moe_router_score_function: Literal["softmax", "sigmoid"] = "softmax"
    """How router logits become scores (sigmoid: DeepSeek-V3)."""
    moe_router_pre_softmax: bool = False
    """Whether scores are normalised over all experts before the top-k are chosen (not over the chosen ones)."""
    moe_router_enable_expert_bias: bool = False
    """Whether a per-expert bias balances the load instead of a loss (DeepSeek-V3)."""
    moe_router_topk_scaling_factor: float | None = None
    """Factor on the chosen experts' weights (`routed_scaling_factor`)."""
    moe_router_num_groups: int | None = None
    """Groups of experts for group-limited routing."""
    moe_router_group_topk: int | None = None
    """Groups that a token can be routed to."""
    moe_router_bias_update_rate: float = 1e-3
    """Step of the router bias after each optimizer step, where the bias is on; 0 freezes it."""
    moe_aux_loss_coeff: float = 0.0
    """Weight of the load-balancing loss."""
    moe_z_loss_coeff: float | None = None
    """Weight of the router's z-loss."""
    multi_latent_attention: bool = False
    """Multi-head latent attention (DeepSeek). Its four dimensions follow."""
    q_lora_rank: int | None = None
    """MLA: rank of the query down-projection; None: queries are projected directly."""
    kv_lora_rank: int = 512
    """MLA: rank of the joint key/value down-projection."""
    qk_head_dim: int = 128
    """MLA: part of a query/key head without position."""
    qk_pos_emb_head_dim: int = 64
    """MLA: part of a query/key head with rotary position."""
    v_head_dim: int = 128
    """MLA: dimension of a value head."""
    latent_layernorm_epsilon: float | None = None
    """MLA: epsilon of the norms on the latent vectors (1e-6 in transformers, independent of the other norms); None:
    layernorm_epsilon."""


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How a model is spread over ranks. World size = TP x PP x CP x DP."""

    tensor_model_parallel_size: int = 1
    """TP: ranks that share each layer's matrices."""
    pipeline_model_parallel_size: int = 1
    """PP: stages that share the layers."""
    virtual_pipeline_model_parallel_size: int | None = None
    """VPP: model chunks per stage (interleaved schedule); None: 1."""
    num_layers_in_first_pipeline_stage: int | None = None
    """Uneven split: layers in the first stage; None: even."""
    num_layers_in_last_pipeline_stage: int | None = None
    """Uneven split: layers in the last stage; None: even."""
    context_parallel_size: int = 1
    """CP: ranks that share one sequence."""
    expert_model_parallel_size: int = 1
    """EP: ranks that share the experts."""
    expert_tensor_parallel_size: int | None = None
    """TP inside the experts; None: as TP."""
    sequence_parallel: bool = False
    """SP: split activations along the sequence between tensor-parallel regions. Needs TP > 1."""
    use_distributed_optimizer: bool = True
    """Spread optimizer state over data-parallel ranks (ZeRO-1)."""
    overlap_grad_reduce: bool = False
    """Reduce gradients while the backward pass still runs."""
    overlap_param_gather: bool = False
    """Gather parameters while the next forward pass already runs. Needs overlap_grad_reduce."""
    recompute_granularity: Literal["none", "selective", "full"] = "none"
    """Activations recomputed in the backward pass: none, attention only, or whole layers."""
    recompute_method: Literal["uniform", "block"] = "uniform"
    """Full recompute: in groups of layers, or for the first layers only."""
    recompute_num_layers: int = 1
    """Full recompute: layers per group (uniform) or layers recomputed (block)."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Length, batch and precision of one stage. Exactly one of the four lengths is given."""

    seq_length: int = 4096
    """Tokens per sample."""
    micro_batch_size: int = 1
    """Samples that pass through a rank at once."""
    global_batch_size: int = 512
    """Samples per optimizer step over all ranks. A multiple of micro_batch_size x data-parallel size."""
    rampup_batch_size: BatchRamp | None = None
    """Batch ramp-up; None: none. [start, increment, length]: the global batch grows from start by increment to
    global_batch_size in equal shares of the stage's first `length`, a duration (`"50B tokens"`, `"500 iterations"`, `0.05`; a
    bare number counts samples, as in Megatron-LM's --rampup-batch-size). [[batch, until], ...]: each batch until a duration
    from the stage's start (`[[64, 1B], [128, 5B]]`; a bare number counts iterations), then global_batch_size."""
    train_tokens: int | None = None
    """Length in tokens (`50B`); iterations = ceil(tokens / seq_length / global_batch_size)."""
    train_samples: int | None = None
    """Length in samples; iterations = ceil(samples / global_batch_size)."""
    train_iters: int | None = None
    """Length in iterations."""
    train_epochs: float | None = None
    """Length in epochs of the corpus with the largest share of data.mix (instruction data), counted from its token
    files when a verb plans or trains the stage, and rounded down to whole iterations: show-config prints the resulting
    train_iters. Before they are made, plan and submit estimate it from the documents. With data.rules: the longest stage in which the corpus that has the largest share is read so often at
    most."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Compute precision; bf16 keeps fp32 master weights and reduces gradients in fp32."""
    seed: int = 1234
    """Seed of initial weights, dropout and data order."""
    z_loss_coeff: float = 0.0
    """Weight of the square of the log of the softmax's normaliser in the loss (PaLM, section 5); 0: off."""
    neftune_alpha: float = 0.0
    """NEFTune: uniform noise of at most alpha / sqrt(seq_length x hidden_size) on the embeddings while training
    (arXiv:2310.05914; 5 to 15 for instruction data); 0: off. Seeded by the sample, so the same under every layout."""
    deterministic: bool = False
    """Choose deterministic kernels; two runs on the same hardware are then bit-identical."""
    compile: bool = False
    """Compile each transformer layer with torch.compile, on GPUs; a CPU runs the layers uncompiled and logs this. The
    first steps take minutes longer. Not with dropout."""
    spike_threshold: float = 0.0
    """A loss above the median of the last 16 by more than this many robust standard deviations of its noise over the
    last 128 is a spike, reported with the step's samples and shards; 0: not looked for. Begin with 10."""
    spike_action: Literal["report", "rollback"] = "report"
    """Action after a spike: a report, or a report and a roll-back to the last checkpoint. The spike's iterations are
    then skipped (they are added to `<run>/skip_iterations.txt`)."""
    spike_skip_iterations: int = 2
    """Iterations that a roll-back skips: the spike's and those just before it."""
    spike_max_rollbacks: int = 3
    """Roll-backs of a run, over all its jobs; spikes beyond are only reported."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with decoupled weight decay, or Muon for the matrices with AdamW for the rest."""

    name: Literal["adam", "muon"] = "adam"
    """muon: orthogonalised momentum on the layers' matrices, scaled to AdamW's step so that lr can stay the same
    (arXiv:2502.16982), AdamW on embeddings, output and norms. Needs the extra muon (the installers bring it) and
    parallel.use_distributed_optimizer: false."""
    muon_momentum: float = 0.95
    """Muon: decay of the (Nesterov) momentum."""
    lr: float = 3e-4
    """Peak learning rate."""
    min_lr: float = 0.0
    """Learning rate at the end of the decay."""
    weight_decay: float = 0.1
    """Decoupled weight decay on matrices; norms and biases have none."""
    weight_decay_start: float | None = None
    """Weight decay at sample 0, where weight_decay_incr_style is not constant; None: weight_decay."""
    weight_decay_end: float | None = None
    """Weight decay after weight_decay_incr, where weight_decay_incr_style is not constant; None: weight_decay."""
    weight_decay_incr_style: Literal["constant", "linear", "cosine"] = "constant"
    """How weight decay runs from its start to its end over weight_decay_incr; constant: weight_decay throughout."""
    weight_decay_incr: Duration = WHOLE_STAGE
    """How long weight decay takes from its start to its end, from the stage's first sample; then it stays at its end."""
    adam_beta1: float = 0.9
    """Decay of the first moment."""
    adam_beta2: float = 0.95
    """Decay of the second moment."""
    adam_eps: float = 1e-8
    """Added to the root of the second moment."""
    clip_grad: float = 1.0
    """Gradients are scaled to this global norm at most; 0: no clipping."""


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Learning rate as a function of samples consumed in this stage. Durations: `2000` (iterations), `"50B tokens"`,
    `"1M samples"`, or a fraction of the stage (`0.01`)."""

    lr_decay_style: Literal[
        "constant", "linear", "cosine", "inverse-square-root", "WSD", "infinite-cosine", "infinite-inverse-square-root"
    ] = "cosine"
    """Shape after the warm-up. WSD and the infinite forms hold a constant rate before they anneal."""
    lr_decay: Duration | None = None
    """cosine and linear: the point where they reach min_lr, counted from the stage's start; the rest of the stage stays
    at min_lr. In tokens, samples or iterations it can exceed the stage, which then ends above min_lr. None: at the
    stage's end."""
    lr_warmup: Duration = NONE_AT_ALL
    """Linear warm-up from lr_warmup_init to lr."""
    lr_warmup_init: float = 0.0
    """Learning rate at sample 0, where there is a warm-up."""
    lr_cooldown: Duration = NONE_AT_ALL
    """Length of the anneal that ends the stage (WSD, infinite forms, constant); 0: the stage ends before its
    cooldown, ready to be forked."""
    lr_cooldown_style: Literal["linear", "cosine", "exponential", "minus_sqrt", "geometric"] = "linear"
    """Shape of that anneal, from the held rate to min_lr. exponential is Megatron-LM's (2 x 0.5^r - 1 of the way); geometric
    falls by the same factor per sample (the infinite forms' own, arXiv:2403.08763) and needs a min_lr above 0."""
    lr_hold: float | None = None
    """Infinite forms: the constant rate after the first decay."""
    lr_hold_start: Duration | None = None
    """Infinite schedules: the end of the first decay and start of the constant part."""


@dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """One corpus: the paths of its documents and token files."""

    documents: tuple[str, ...] = ()
    """Files, folders or globs of documents to tokenize, relative to paths.data_dir."""
    tokens: tuple[str, ...] = ()
    """Prefixes of `.bin/.idx` pairs (without extension), folders or globs of them, relative to paths.data_dir."""
    validation: tuple[str, ...] = ()
    """Prefixes of held-out `.bin/.idx` pairs, folders or globs of them, relative to paths.data_dir."""
    validation_documents: tuple[str, ...] = ()
    """Held-out documents as text, for bits per byte, relative to paths.data_dir."""
    held_out: float | None = None
    """Part of the documents to hold out, such as 1/100, chosen by their hashes: a stage of the pipeline splits them,
    and names tokens, validation and validation_documents itself. None: the task sets the validation files."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Input data: corpora by name and their mix in a stage."""

    tokenizer: str | None = None
    """Hugging Face tokenizer folder, `tokenizer.json` or SentencePiece `.model`, relative to paths.data_dir."""
    corpora: dict[str, CorpusConfig] = field(default_factory=dict)
    """The corpora of the task by name (D0, D1, ...)."""
    mix: dict[str, float] = field(default_factory=dict)
    """Share of the stage's tokens per corpus; must sum to 1."""
    rules: dict[str, str] = field(default_factory=dict)
    """Instead of mix: the amount per corpus, glob over prefixes or part of a path; the first match applies:
    `share 0.3` (of the stage), `epochs 2` (exactly), `weight 3` or `ratio 0.5` (proportions of the rest)."""
    base_pool: str | None = None
    """With rules: a corpus or pattern whose shards get base_ratio of the stage; the rules apply within each pool."""
    base_ratio: float | None = None
    """With rules: part of the stage's tokens from base_pool, 0 to 1."""
    cap_epochs: float | None = None
    """With rules: how often a shard is read at most; others of its pool make up for it. None: no cap."""
    train_data_path: str | None = None
    """A ready data list (any format of `megatron-cpt blend formats`) instead of mix, relative to paths.data_dir."""
    order: Literal["own", "continue"] = "own"
    """own: from sample 0 of an order that follows from training.seed. continue: exactly the samples that the run of
    init.from_path (`variant:NAME[@ITERATION]`, of the same data) would have read next; past its end every shard
    continues from its last drawn sample, without replacement."""
    max_epochs: float = 4.0
    """A corpus repeated more often than this is refused."""
    buffer: str | None = None
    """Replay buffer, a YAML file relative to paths.data_dir. The corpus `buffer` of mix draws from the corpora that
    earlier stages appended, without replacement until exhausted; a stage that finishes appends its own corpora."""
    shuffle_in_corpus: bool = False
    """Shuffle a corpus's samples among its shards, by training.seed, instead of spreading every shard evenly over the
    run. Documents within a shard are shuffled in both cases."""
    skip_list: str | None = None
    """Documents to leave out, relative to paths.data_dir: lines `<prefix> <first document> <last document>`."""
    skip_iterations: tuple[str, ...] = ()
    """Iterations to pass without a step, as the log counts them: `["120-140", "200"]`. Their samples are consumed but
    not trained on and not counted per corpus. `<run>/skip_iterations.txt` adds to it, one range a line."""
    fim_rate: float = 0.0
    """Fill in the middle (code): share of the documents within a sample that are rearranged, 0 to 1 (arXiv:2207.14255;
    0.5 to 0.9 is usual); 0: off. Cut between characters if the tokenizer reproduces the text, otherwise between tokens.
    Shards with a loss mask and validation sets are unchanged."""
    fim_spm_rate: float = 0.5
    """Of the rearranged documents, the share in the order suffix, prefix, middle; the others: prefix, suffix, middle."""
    fim_prefix_token: str | None = None
    """The tokenizer's token before a prefix, such as `<|fim_prefix|>`. Needed where fim_rate is not 0."""
    fim_middle_token: str | None = None
    """The tokenizer's token before a middle, such as `<|fim_middle|>`."""
    fim_suffix_token: str | None = None
    """The tokenizer's token before a suffix, such as `<|fim_suffix|>`."""
    fim_corpora: tuple[str, ...] = ()
    """Corpora whose documents are rearranged; empty: all."""
    prompt_loss_weight: float = 0.0
    """Weight of a prompt's tokens in the loss, 0 to 1; the assistant's tokens have weight 1. In shards with a mask, the
    prompt is every token that is neither the assistant's nor excluded by its record. The loss is the weighted mean.
    Validation counts the assistant's alone."""
    reset_attention_mask: bool = True
    """Documents (the pieces, where a shard has a mask) in a sample do not see each other. Attention then runs on
    torch's varlen or SDPA kernels, also within Transformer Engine's layers, whose own attention ignores masks."""
    eod_mask_loss: bool = False
    """Whether predicting the first token after a document's end is left out of the loss."""


@dataclass(frozen=True, kw_only=True)
class InitConfig:
    """Source of a stage's initial weights. A run's own checkpoints always come first."""

    from_path: str | None = None
    """Relative to paths.data_dir, as all paths of a task file (on the command line to the current folder):
    a Hugging Face folder, a Megatron checkpoint folder (`.../checkpoints` or `.../iter_0001000`, Megatron-LM's own too, `torch`
    or `torch_dist`), a DeepSpeed universal checkpoint, or `variant:NAME[@ITERATION]`, the run of another variant of this task;
    None: random weights. Checkpoints in other formats are converted into `<run>/init` once."""
    load: Literal["weights", "full"] = "weights"
    """weights: a fresh optimizer (Megatron's --finetune); full: optimizer moments too. Iterations and samples start
    at 0 in both."""
    ignore_config: tuple[str, ...] = ()
    """Keys of a Hugging Face folder's config.json that do not change what the model computes (`convert hf-to-mcore
    --ignore-config`). Remembered in the checkpoints, so that an export needs no option."""
    skip_tensors: tuple[str, ...] = ()
    """Globs of a Hugging Face folder's tensors that are left out (`convert hf-to-mcore --skip-tensors`)."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Saving and retention of checkpoints."""

    save_interval: int = 1000
    """Iterations between checkpoints; the last iteration is always saved."""
    keep_last: int | None = None
    """Checkpoints kept, the newest ones; None: all."""
    keep_every: int | None = None
    """Checkpoints at multiples of this are kept besides; None: none."""
    keep_bytes: int | None = None
    """Bytes that all checkpoints of a run can use together, e.g. 2T or 500B (10^9); beyond it the oldest go, but never
    the newest or a protected one (`checkpoint protect`); None: no limit."""
    async_save: bool = False
    """Write checkpoints while training continues."""
    verify_on_save: bool = True
    """Read every file back, on another rank than wrote it, and compare its hash before a checkpoint counts and older ones are
    deleted; False: trust the file system."""
    verify_on_load: Literal["full", "size"] = "full"
    """Check every file's hash, or its size only, before a checkpoint is loaded."""
    accept_changes: tuple[str, ...] = ()
    """Settings (`[optimizer.lr, training.train_iters]`) or sections with which a run continues even though they change
    its results and differ from its last checkpoint; true: all differences."""


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Validation losses per corpus during training."""

    eval_interval: int = 0
    """Iterations between evaluations on each corpus's validation set, also before the first and after the last one; 0:
    off."""
    eval_iters: int = 10
    """Global batches per corpus and evaluation, at most (a smaller set is read once, whole)."""


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """Logging of a run."""

    log_interval: int = 10
    """Iterations per logged line."""
    tensorboard: bool = True
    """Write TensorBoard events in addition to metrics.jsonl."""
    wandb_project: str | None = None
    """Report to this project of Weights & Biases too (needs the extra wandb); None: no."""
    wandb_mode: Literal["online", "offline"] = "online"
    """offline: W&B's files stay in the run directory until `wandb sync`. The variable WANDB_MODE wins."""


@dataclass(frozen=True, kw_only=True)
class PathsConfig:
    """Roots. Relative ones start at the folder the command is called in."""

    runs_dir: str = "runs"
    """Run directories live here as <task>/<params>/<size>/<variant>."""
    data_dir: str = "data"
    """Documents, token files and tokenizers; relative paths of the data section start here."""


@dataclass(frozen=True, kw_only=True)
class LaunchConfig:
    """Resources and launch of jobs. Set by a site file, the environment or the command line."""

    scheduler: Literal["local", "pbs", "slurm"] = "local"
    """Executor of the job: this machine, PBS Professional, or Slurm."""
    nodes: int = 1
    """Nodes of a training job."""
    spare_nodes: int = 0
    """PBS: nodes that a training job asks for besides. Those that preflight finds bad give their place to them."""
    gpus_per_node: int = 1
    """Ranks per node: GPUs, or processes on CPU."""
    device: Literal["cuda", "xpu", "cpu"] | None = None
    """Device that every rank must find, or it refuses to train: on a cluster a broken driver or a wheel for CPU is to be an
    error and not a run on CPU. `xpu` (Intel GPUs) is refused as long as training does not drive them. None: a CUDA device
    where there is one, else the CPU."""
    walltime: int = 86400
    """Longest run of one job in seconds (`24:00:00` in YAML)."""
    exit_before_walltime: int = 0
    """Seconds before the walltime at which a run saves and ends; 0: only when signalled."""
    hang_timeout: int = 1800
    """Seconds without a step after which a rank writes its stacks to its log and ends with exit code 85; 0: never. Joining
    may take twice as long, an evaluation, a save and loading six times, preparation (indexes, a conversion) twelve times. A
    rank that was stopped, or whose node is gone, is named after 180 s in any of these."""
    max_restarts: int = 0
    """local: how often a training job that died is continued from its last checkpoint at once."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything about one stage of one experiment."""

    task: str
    """Name of the task: its folder's name."""
    params: str
    """Name of the params file without `.yaml`."""
    size: str
    """Name of the size, a key of the task's `sizes`."""
    variant: str = "main"
    """Name of the variant, a key of the task's `variants`; KEY+LABEL is the same variant in a run of its own."""
    model: ModelConfig
    parallel: ParallelConfig = ParallelConfig()
    training: TrainingConfig = TrainingConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    data: DataConfig = DataConfig()
    init: InitConfig = InitConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    logging: LoggingConfig = LoggingConfig()
    paths: PathsConfig = PathsConfig()
    launch: LaunchConfig = LaunchConfig()
