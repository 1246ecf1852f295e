"""Memory per rank by formula: weights, gradients, optimizer state, activations, in bytes.

Weights, gradients, optimizer (Megatron-Core, `docs/user-guide/features/dist_optimizer.md`, "memory savings"; ZeRO,
arXiv:1910.02054): in bf16 a parameter costs 2 bytes, its fp32 gradient 4, and fp32 master weight and two Adam moments
12 bytes, divided by the data-parallel size under the distributed optimizer; in fp32 4 + 4 + 8. Muon keeps one momentum
for the layers' matrices (Megatron-Core, `optimizer/emerging_optimizers.py`): 4 bytes less each.

Activations (after arXiv:2205.05198, section 4, recomputed for RMSNorm, SwiGLU, grouped queries and an attention kernel
that keeps no `[s, s]` matrix): the tensors that the backward pass needs, per layer and token. Without fused kernels
(CPU) a norm keeps fp32 copies and SwiGLU two more tensors. A pipeline stage p of P holds up to P - p micro-batches at
once (1F1B), more by 1 + (P - 1) / (P v) when interleaved (same, section 4.2.3).

Not included: the CUDA context, NCCL's buffers and fragmentation (about 3 to 6 GiB on a GPU), temporary buffers of
single operations other than the loss.
"""

from dataclasses import dataclass

from megatron_cpt.config.settings.derived import (
    data_parallel_size,
    kv_channels,
    num_microbatches,
    num_query_groups,
    padded_vocab_size,
    world_size,
)
from megatron_cpt.config.settings.schema import ModelConfig, RunConfig, TrainingConfig
from megatron_cpt.launch.planning.model_size import (
    is_moe_layer,
    model_parameters,
    rank_parameters,
    stage_layers,
    stage_parameters,
)


@dataclass(frozen=True, kw_only=True)
class StageMemory:
    """Bytes on each rank of one pipeline stage."""

    parameters: int
    """Parameters on the rank (a count, not bytes)."""
    weights: int
    gradients: int
    optimizer: int
    activations: int
    """Kept for the backward pass, over all micro-batches in flight."""
    loss: int
    """Logits and their gradient, and the softmax where the loss is not fused, for one micro-batch; last stage only."""

    @property
    def total(self) -> int:
        """Peak of the stage."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.loss


def stage_memories(config: RunConfig, *, is_fused: bool = True) -> list[StageMemory]:
    """Return the memory of a rank of each pipeline stage; `is_fused`: with the fused kernels of a GPU."""
    model, parallel = config.model, config.parallel
    weight_bytes = _element_bytes(config.training)
    matrix_bytes, rest_bytes = state_bytes(config)
    dp = data_parallel_size(config) * parallel.context_parallel_size if parallel.use_distributed_optimizer else 1
    tp = parallel.tensor_model_parallel_size
    expert_ranks = parallel.expert_model_parallel_size * (parallel.expert_tensor_parallel_size or tp)
    expert_dp = max(world_size(config) // (parallel.pipeline_model_parallel_size * expert_ranks), 1)
    if not parallel.use_distributed_optimizer:
        expert_dp = 1
    memories = []
    for stage, (parameters, layers) in enumerate(
        zip(stage_parameters(model, parallel), stage_layers(model, parallel), strict=True)
    ):
        held = rank_parameters(parameters, parallel)
        whole = held.sharded + held.replicated
        is_last = stage == parallel.pipeline_model_parallel_size - 1
        memories.append(
            StageMemory(
                parameters=held.total,
                weights=held.total * weight_bytes,
                gradients=held.total * 4,
                optimizer=((whole - held.rest) * matrix_bytes + held.rest * rest_bytes) // dp
                + held.expert * matrix_bytes // expert_dp,
                activations=_stage_activations(config, stage, layers, is_fused),
                loss=_loss_bytes(config, is_fused) if is_last else 0,
            )
        )
    return memories


def state_bytes(config: RunConfig) -> tuple[int, int]:
    """Return the optimizer's bytes for a parameter of a layer's matrix, and for another one (norm, bias, embedding)."""
    master = 4 if config.training.precision == "bf16" else 0
    return master + (4 if config.optimizer.name == "muon" else 8), master + 8


def checkpoint_bytes(config: RunConfig) -> int:
    """Return the bytes of a whole checkpoint: weights and optimizer state, each parameter once.

    In fp32 the distributed optimizer stores the parameters it updates besides the weights.
    """
    parameters = model_parameters(config.model)
    matrix_bytes, rest_bytes = state_bytes(config)
    is_bf16, is_distributed = config.training.precision == "bf16", config.parallel.use_distributed_optimizer
    copies = _element_bytes(config.training) + (4 if is_distributed and not is_bf16 else 0)
    return parameters.total * (copies + matrix_bytes) + parameters.rest * (rest_bytes - matrix_bytes)


def layer_activation_bytes(config: RunConfig, layer: int, is_fused: bool) -> int:
    """Return what the backward pass of one layer and micro-batch keeps on a rank, without recomputation."""
    norms = 2 * _norm_bytes(config, is_fused)
    return norms + _attention_activations(config, is_fused) + _feed_forward_activations(config, layer, is_fused)


def _stage_activations(config: RunConfig, stage: int, layers: list[int], is_fused: bool) -> int:
    parallel = config.parallel
    stages = parallel.pipeline_model_parallel_size
    chunks = parallel.virtual_pipeline_model_parallel_size or 1
    per_layer = [layer_activation_bytes(config, layer, is_fused) for layer in layers]
    recomputing = 0
    if parallel.recompute_granularity == "full":
        kept = _boundary_bytes(config)
        count = parallel.recompute_num_layers
        if parallel.recompute_method == "uniform":
            # one input per group of layers, and the activations of the group being recomputed
            recomputing = max(
                (sum(per_layer[start : start + count]) for start in range(0, len(layers), count)), default=0
            )
            per_layer = [kept] * -(-len(layers) // count)
        else:
            recomputing = max(per_layer[:count], default=0)
            per_layer = [kept] * min(count, len(layers)) + per_layer[count:]
    in_flight: float = min(stages - stage, num_microbatches(config)) if stages > 1 else 1
    if chunks > 1:
        in_flight = min(in_flight + (stages - 1) / chunks, num_microbatches(config))
    ends = 0
    if stage == stages - 1:
        ends = _norm_bytes(config, is_fused)
    return round(sum(per_layer) * in_flight) + recomputing + ends


def _tokens(config: RunConfig) -> int:
    training, parallel = config.training, config.parallel
    return training.seq_length * training.micro_batch_size // parallel.context_parallel_size


def _element_bytes(training: TrainingConfig) -> int:
    return 2 if training.precision == "bf16" else 4


def _boundary_bytes(config: RunConfig) -> int:
    """Return the bytes of one `[s/cp, b, h]` tensor between layers; split over TP under sequence parallelism."""
    parallel = config.parallel
    split = parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
    return _tokens(config) * config.model.hidden_size * _element_bytes(config.training) // split


def _norm_bytes(config: RunConfig, is_fused: bool) -> int:
    """Return what a norm keeps: its input and output; unfused its output, and in fp32 its input and the quotient."""
    element = _element_bytes(config.training)
    return _boundary_bytes(config) * (2 * element if is_fused else 8 + element) // element


def _attention_activations(config: RunConfig, is_fused: bool) -> int:
    """Queries, keys, values; the attention's output and its log-sum-exp (fp32)."""
    model, tp = config.model, config.parallel.tensor_model_parallel_size
    tokens, element = _tokens(config), _element_bytes(config.training)
    heads = model.num_attention_heads
    if model.multi_latent_attention:
        query_dim = model.qk_head_dim + model.qk_pos_emb_head_dim
        # down-projections before and after their norms (whole on every rank), up-projections, then q, k, v assembled
        down = 2 * (model.q_lora_rank or 0) + 2 * model.kv_lora_rank + model.qk_pos_emb_head_dim
        up = heads * (model.qk_head_dim + model.v_head_dim)
        width = down + (up + heads * (2 * query_dim + model.v_head_dim)) / tp
        if not is_fused and query_dim != model.v_head_dim:  # SDPA on CPU then keeps its [s, s] weights
            width += heads / tp * config.training.seq_length
    else:
        channels = kv_channels(model)
        queries, keys = heads * channels, num_query_groups(model) * channels
        qkv = queries + 2 * keys  # the projection's output, which v is a view of, and q and k after rotation
        width = (qkv + queries + keys + (queries + keys if model.qk_layernorm else 0)) / tp
    output = heads * (model.v_head_dim if model.multi_latent_attention else kv_channels(model)) / tp
    log_sum_exp = heads / tp * 4
    cp = config.parallel.context_parallel_size
    gathered = 2 * num_query_groups(model) * kv_channels(model) / tp * (cp - 1)  # keys and values of the other CP ranks
    return round(tokens * ((width + output + gathered) * element + log_sum_exp))


def _feed_forward_activations(config: RunConfig, layer: int, is_fused: bool) -> int:
    """Gate and up and their product, the last matrix's input; unfused also SiLU of the gate and a copy of up."""
    model, tp = config.model, config.parallel.tensor_model_parallel_size
    tokens, element = _tokens(config), _element_bytes(config.training)
    widths = 3 if is_fused else 5
    if not is_moe_layer(model, layer):
        return round(tokens * widths * model.ffn_hidden_size / tp * element)
    split = tp if config.parallel.sequence_parallel else 1
    expert_tp = config.parallel.expert_tensor_parallel_size or tp
    routed_tokens = tokens / split * model.moe_router_topk * expert_tp  # balanced routing
    expert_width = widths * (model.moe_ffn_hidden_size or model.ffn_hidden_size) / expert_tp
    routed = routed_tokens * (expert_width + 2 * model.hidden_size) * element  # input and output, permuted
    shared = tokens * widths * (model.moe_shared_expert_intermediate_size or 0) / tp * element
    router = tokens / split * (model.num_moe_experts or 0) * 4 * 2  # logits and probabilities in fp32
    return round(routed + shared + router)


def _loss_bytes(config: RunConfig, is_fused: bool) -> int:
    """Logits and their gradient in compute precision; unfused also the softmax in fp32, from which the gradient is made."""
    model: ModelConfig = config.model
    rows = padded_vocab_size(model) // config.parallel.tensor_model_parallel_size
    element = _element_bytes(config.training)
    return _tokens(config) * rows * (2 * element if is_fused else element + 4 + 4)
