"""Tiny models and the steps that ranks run in the tests of training."""

import dataclasses
from pathlib import Path
from typing import Any

from megatron_cpt.config.settings.schema import ModelConfig, OptimizerConfig, ParallelConfig, RunConfig, TrainingConfig

VOCAB, SEQ, BATCH, EOD = 500, 64, 8, 7

KINDS: dict[str, dict[str, Any]] = {
    "dense": {"num_query_groups": 2},
    "qwen": {"num_query_groups": 2, "add_qkv_bias": True, "qk_layernorm": True, "kv_channels": 24},
    "tied": {"untie_embeddings_and_output_weights": False},
    "moe": {"num_query_groups": 2, "num_moe_experts": 4, "moe_ffn_hidden_size": 48, "moe_num_dense_layers": 1},
    "mla": {
        "multi_latent_attention": True,
        "q_lora_rank": 32,
        "kv_lora_rank": 32,
        "qk_head_dim": 16,
        "qk_pos_emb_head_dim": 8,
        "v_head_dim": 12,
        "qk_layernorm": True,
    },
}
# DeepSeek-V3's parts, as in OpenSeek-Small: latent attention, a leading dense layer, shared experts, a router bias
KINDS["deepseek"] = KINDS["mla"] | {
    "num_moe_experts": 4,
    "moe_ffn_hidden_size": 48,
    "moe_num_dense_layers": 1,
    "moe_shared_expert_intermediate_size": 32,
    "moe_router_score_function": "sigmoid",
    "moe_router_pre_softmax": True,
    "moe_router_enable_expert_bias": True,
    "moe_router_topk_scaling_factor": 1.5,
}


def tiny_config(
    kind: str = "dense", precision: str = "fp32", model: dict[str, Any] | None = None, **parallel: Any
) -> RunConfig:
    """Return a run of a four-layer model; `parallel` are settings of that section, SP on wherever TP is."""
    parallel.setdefault("sequence_parallel", parallel.get("tensor_model_parallel_size", 1) > 1)
    return RunConfig(
        task="tiny",
        params=kind,
        size="one",
        model=ModelConfig(
            num_layers=4,
            hidden_size=64,
            ffn_hidden_size=96,
            num_attention_heads=4,
            vocab_size=VOCAB,
            max_position_embeddings=SEQ,
            **KINDS[kind] | (model or {}),
        ),
        parallel=ParallelConfig(**parallel),
        training=TrainingConfig(
            seq_length=SEQ, micro_batch_size=2, global_batch_size=BATCH, train_iters=8, precision=precision
        ),
        optimizer=OptimizerConfig(lr=1e-3, clip_grad=0.3),
    )


def tokens(iteration: int) -> Any:
    """Return the global batch `[b, s + 1]` of an iteration, with a document end inside every sample."""
    import torch

    generator = torch.Generator().manual_seed(iteration)
    ids = torch.randint(EOD + 1, VOCAB, (BATCH, SEQ + 1), generator=generator)
    ids[:, 20] = EOD
    return ids


def batches(config: RunConfig, iteration: int) -> list[Any]:
    """Return this rank's micro-batches of an iteration."""
    from megatron.core import parallel_state

    from megatron_cpt.train.samples.batches import build_batch

    size = config.training.micro_batch_size
    rank, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    ids = tokens(iteration)
    return [build_batch(ids[start : start + size], config, EOD) for start in range(rank * size, BATCH, size * ranks)]


def run_steps(
    config: RunConfig, first: int, last: int, load: str | None, save: str | None, with_optimizer: bool = True
) -> list[tuple[float, float]]:
    """Build the model, load a checkpoint, run the steps `[first, last)`, save; return loss and gradient norm of each."""
    from megatron_cpt.train.backend.parallel import finish_parallel, initialize_parallel
    from megatron_cpt.train.model.build import build_training_model
    from megatron_cpt.train.stage.step import train_step
    from megatron_cpt.train.state.checkpointing import load_checkpoint, save_checkpoint

    initialize_parallel(config)
    model, optimizer = build_training_model(config)
    if load:
        load_checkpoint(Path(load), model, optimizer if with_optimizer else None)
        if not with_optimizer:
            optimizer.reload_model_params()
    results = [train_step(model, optimizer, batches(config, step), config, 1e-3) for step in range(first, last)]
    if save:
        save_checkpoint(Path(save), last, model, optimizer, manifest_of(config, last))
    finish_parallel()
    return [(result.loss, result.grad_norm) for result in results]


def manifest_of(config: RunConfig, iteration: int) -> dict[str, Any]:
    """Return the manifest of a checkpoint of these tests."""
    settings = dataclasses.asdict(config)
    return {
        "iteration": iteration,
        "content": "full",
        "model": settings["model"],
        "config": settings,
        "tokenizer": None,
    }


def logits(config: RunConfig, load: str | None, ids: list[list[int]]) -> Any:
    """Return one rank's logits `[b, s, v]` as nested lists for token ids `[b, s]`."""
    import torch

    from megatron_cpt.train.backend.parallel import finish_parallel, initialize_parallel
    from megatron_cpt.train.model.build import build_model_chunks
    from megatron_cpt.train.samples.batches import build_batch
    from megatron_cpt.train.state.checkpointing import load_checkpoint

    initialize_parallel(config)
    (model,) = build_model_chunks(config)
    if load:
        load_checkpoint(Path(load), [model], None)
    model.eval()
    batch = build_batch(torch.tensor([[*row, 0] for row in ids]), config, EOD)
    with torch.no_grad():
        result = model(batch.tokens, batch.position_ids, batch.attention_mask)
    finish_parallel()
    return result[..., :VOCAB].numpy()
