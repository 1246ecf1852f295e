"""How many parameters a model has, per kind of tensor and per pipeline stage and rank; no model is built.

Kinds matter because they are spread differently: matrices over tensor-parallel ranks, experts over expert-parallel
ranks, norms, routers and MLA's down-projections over nobody. And because Muon updates the layers' matrices only.
"""

from dataclasses import dataclass, fields, replace

from megatron_cpt.config.settings.derived import kv_channels, num_query_groups, padded_vocab_size
from megatron_cpt.config.settings.schema import ModelConfig, ParallelConfig


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """Parameters by how they are spread."""

    sharded: int = 0
    """Divided by TP."""
    expert: int = 0
    """Divided by EP and expert TP."""
    replicated: int = 0
    """Whole on every rank."""
    sharded_rest: int = 0
    """Of `sharded`, what is no matrix of a layer: embedding, output layer, biases."""
    replicated_rest: int = 0
    """Of `replicated`, what is no matrix: norms."""

    def __add__(self, other: "Parameters") -> "Parameters":
        names = [field.name for field in fields(self)]
        return Parameters(**{name: getattr(self, name) + getattr(other, name) for name in names})

    @property
    def total(self) -> int:
        """All of them, before they are spread."""
        return self.sharded + self.expert + self.replicated

    @property
    def rest(self) -> int:
        """Those that are no matrix of a layer: Muon leaves them to Adam."""
        return self.sharded_rest + self.replicated_rest


def is_moe_layer(model: ModelConfig, layer: int) -> bool:
    """Return whether layer `layer` (from 0) is a mixture of experts."""
    return model.num_moe_experts is not None and layer >= model.moe_num_dense_layers


def attention_parameters(model: ModelConfig) -> Parameters:
    """Return one layer's attention parameters with its input norm."""
    h, heads = model.hidden_size, model.num_attention_heads
    if model.multi_latent_attention:
        query_dim = model.qk_head_dim + model.qk_pos_emb_head_dim
        key_value_up = model.kv_lora_rank * heads * (model.qk_head_dim + model.v_head_dim)
        sharded = key_value_up + heads * model.v_head_dim * h
        sharded += (model.q_lora_rank or h) * heads * query_dim
        down = h * (model.kv_lora_rank + model.qk_pos_emb_head_dim + (model.q_lora_rank or 0))
        norms = h + model.kv_lora_rank + (model.q_lora_rank or 0)
        return Parameters(sharded=sharded, replicated=down + norms, replicated_rest=norms)
    query_size, key_value_size = heads * kv_channels(model), 2 * num_query_groups(model) * kv_channels(model)
    matrices = (query_size + key_value_size) * h + query_size * h
    bias = query_size + key_value_size if model.add_qkv_bias else 0
    norms = h + (2 * kv_channels(model) if model.qk_layernorm else 0)
    return Parameters(sharded=matrices + bias, replicated=norms, sharded_rest=bias, replicated_rest=norms)


def feed_forward_parameters(model: ModelConfig, layer: int) -> Parameters:
    """Return one layer's feed-forward parameters (SwiGLU: three matrices) with their norm."""
    h = model.hidden_size
    if not is_moe_layer(model, layer):
        return Parameters(sharded=3 * h * model.ffn_hidden_size, replicated=h, replicated_rest=h)
    assert model.num_moe_experts is not None
    return Parameters(
        expert=model.num_moe_experts * 3 * h * (model.moe_ffn_hidden_size or model.ffn_hidden_size),
        sharded=3 * h * (model.moe_shared_expert_intermediate_size or 0),
        replicated=h + h * model.num_moe_experts,
        replicated_rest=h,
    )


def model_parameters(model: ModelConfig) -> Parameters:
    """Return the model's parameters, padded vocabulary rows included."""
    layers = [attention_parameters(model) + feed_forward_parameters(model, layer) for layer in range(model.num_layers)]
    embeddings = (2 if model.untie_embeddings_and_output_weights else 1) * padded_vocab_size(model) * model.hidden_size
    return sum(layers, _ends(embeddings, model.hidden_size))


def num_parameters(model: ModelConfig) -> int:
    """Return the number of the model's parameters, padded vocabulary rows included."""
    return model_parameters(model).total


def num_active_parameters(model: ModelConfig) -> int:
    """Return the parameters a token passes through: of the experts, the top-k only."""
    if model.num_moe_experts is None:
        return num_parameters(model)
    sparse_layers = model.num_layers - model.moe_num_dense_layers
    expert = 3 * model.hidden_size * (model.moe_ffn_hidden_size or model.ffn_hidden_size)
    return num_parameters(model) - sparse_layers * (model.num_moe_experts - model.moe_router_topk) * expert


def stage_layers(model: ModelConfig, parallel: ParallelConfig) -> list[list[int]]:
    """Return the layers of each pipeline stage; under interleaving a stage holds every PP-th group of layers."""
    stages, chunks = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size or 1
    first, last = parallel.num_layers_in_first_pipeline_stage, parallel.num_layers_in_last_pipeline_stage
    middle = stages - (first is not None) - (last is not None)
    rest = model.num_layers - (first or 0) - (last or 0)
    counts = [first] if first is not None else []
    counts += [rest // middle] * middle if middle else []
    counts += [last] if last is not None else []
    layers: list[list[int]] = [[] for _ in counts]
    start = 0
    for _ in range(chunks):
        for stage, count in enumerate(counts):
            layers[stage] += range(start, start + count // chunks)
            start += count // chunks
    return layers


def stage_parameters(model: ModelConfig, parallel: ParallelConfig) -> list[Parameters]:
    """Return the parameters of each pipeline stage over all its ranks; tied embeddings live on both ends."""
    h, vocabulary = model.hidden_size, padded_vocab_size(model)
    stages = []
    for stage, layers in enumerate(stage_layers(model, parallel)):
        parts = [attention_parameters(model) + feed_forward_parameters(model, layer) for layer in layers]
        total = sum(parts, Parameters())
        is_first, is_last = stage == 0, stage == parallel.pipeline_model_parallel_size - 1
        if is_first:
            total += _ends(vocabulary * h, 0)
        if is_last:
            needs_weight = model.untie_embeddings_and_output_weights or not is_first
            total += _ends(vocabulary * h if needs_weight else 0, h)
        stages.append(total)
    return stages


def rank_parameters(stage: Parameters, parallel: ParallelConfig) -> Parameters:
    """Return the parameters of a stage that one of its ranks holds."""
    tp = parallel.tensor_model_parallel_size
    expert_ranks = parallel.expert_model_parallel_size * (parallel.expert_tensor_parallel_size or tp)
    return replace(
        stage,
        sharded=stage.sharded // tp,
        expert=stage.expert // expert_ranks,
        sharded_rest=stage.sharded_rest // tp,
    )


def _ends(embeddings: int, norms: int) -> Parameters:
    return Parameters(sharded=embeddings, sharded_rest=embeddings, replicated=norms, replicated_rest=norms)
