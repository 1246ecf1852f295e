"""Plans: parameters and memory by formula against a real model, checkpoints on disk, time."""

import dataclasses
import json
import subprocess
import sys

import pytest

from megatron_cpt.config.checks.parallel import parallel_problems
from megatron_cpt.config.loading.sources import CHECKOUT
from megatron_cpt.config.settings.schema import (
    CheckpointConfig,
    LaunchConfig,
    ModelConfig,
    ParallelConfig,
    PathsConfig,
    RunConfig,
    TrainingConfig,
)
from megatron_cpt.launch.planning.memory import stage_memories
from megatron_cpt.launch.planning.model_size import num_active_parameters, num_parameters, stage_layers
from megatron_cpt.launch.planning.plan import GIB, measured_tokens_per_second, num_checkpoints, plan_run, plan_text
from megatron_cpt.launch.planning.search import Hardware, hardware_of, search_layouts, search_text
from megatron_cpt.launch.scheduler.site import Site
from tests.tolerances import assert_about

LLAMA_3_8B = ModelConfig(
    num_layers=32,
    hidden_size=4096,
    ffn_hidden_size=14336,
    num_attention_heads=32,
    num_query_groups=8,
    vocab_size=128256,
    max_position_embeddings=8192,
)
MIXTRAL_8X7B = dataclasses.replace(
    LLAMA_3_8B, vocab_size=32000, num_moe_experts=8, moe_ffn_hidden_size=14336, moe_router_topk=2
)
TINY = ModelConfig(
    num_layers=2,
    hidden_size=64,
    ffn_hidden_size=176,
    num_attention_heads=4,
    num_query_groups=2,
    vocab_size=500,
    max_position_embeddings=512,
)


def run_config(model=TINY, parallel=None, launch=None, **training) -> RunConfig:
    training = {"seq_length": 128, "micro_batch_size": 2, "global_batch_size": 8, "train_iters": 10} | training
    return RunConfig(
        task="t",
        params="p",
        size="s",
        model=model,
        parallel=ParallelConfig(**(parallel or {})),
        training=TrainingConfig(**training),
        launch=LaunchConfig(**(launch or {})),
    )


def test_parameters_equal_the_published_counts():
    assert num_parameters(LLAMA_3_8B) == 8_030_261_248
    assert num_parameters(MIXTRAL_8X7B) == 46_702_792_704
    assert num_active_parameters(MIXTRAL_8X7B) == 12_879_925_248


MEASURE = """
import json, torch
from configs import configs
from megatron_cpt.train.backend.parallel import finish_parallel, initialize_parallel
from megatron_cpt.train.model.build import build_model_chunks
initialize_parallel(configs[0])
numbers = []
for config in configs:
    (chunk,) = build_model_chunks(config)
    own = {t.untyped_storage().data_ptr() for t in [*chunk.parameters(), *chunk.buffers()]}
    kept = {}
    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor
    training = config.training
    tokens = torch.randint(0, 500, (training.micro_batch_size, training.seq_length))
    positions = torch.arange(training.seq_length).expand_as(tokens)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = chunk(tokens, positions, None, labels=tokens)
    activations = sum(size for size, tensor in kept.values() if 512 not in tensor.shape)  # the vocabulary's apart
    numbers.append({"parameters": sum(p.numel() for p in chunk.parameters()), "activations": activations})
print(json.dumps(numbers))
finish_parallel()
"""
TINY_MOE = dataclasses.replace(
    TINY, num_layers=3, num_moe_experts=4, moe_ffn_hidden_size=96, moe_num_dense_layers=1,
    moe_shared_expert_intermediate_size=64,
)  # fmt: skip
TINY_MLA = dataclasses.replace(
    TINY, num_query_groups=None, multi_latent_attention=True,
    qk_layernorm=True, q_lora_rank=32, kv_lora_rank=32, qk_head_dim=16,
    qk_pos_emb_head_dim=8, v_head_dim=16,
)  # fmt: skip
TINY_QWEN = dataclasses.replace(TINY, untie_embeddings_and_output_weights=False, qk_layernorm=True, add_qkv_bias=True)


def test_the_estimate_agrees_with_the_memory_of_real_models_on_cpu(tmp_path):
    configs = [run_config(TINY, precision="fp32"), run_config(TINY, precision="bf16")]
    configs += [run_config(model, precision="fp32") for model in (TINY_QWEN, TINY_MOE, TINY_MLA)]
    imports = (
        "from megatron_cpt.config.settings.schema import *\nfrom megatron_cpt.config.settings.values import Duration\n"
    )
    (tmp_path / "configs.py").write_text(f"{imports}configs = {configs!r}\n")
    (tmp_path / "measure.py").write_text(MEASURE)
    measured = subprocess.run(
        [sys.executable, str(tmp_path / "measure.py")],
        env={
            "PYTHONPATH": f"{CHECKOUT}:{tmp_path}",
            "OMP_NUM_THREADS": "1",
            "PATH": "/usr/bin:/bin",
            "HOME": str(tmp_path),
        },
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert measured.returncode == 0, measured.stderr[-2000:]
    for config, numbers in zip(configs, json.loads(measured.stdout.strip().splitlines()[-1]), strict=True):
        (estimate,) = stage_memories(config, is_fused=False)
        assert estimate.parameters == numbers["parameters"] == num_parameters(config.model)
        assert_about(
            estimate.activations, numbers["activations"], within=0.1, why="an estimate: small tensors are not counted"
        )


def test_bf16_costs_6_bytes_a_parameter_and_12_shared_among_data_parallel_ranks():
    launch = {"nodes": 2, "gpus_per_node": 8}
    (stage,) = stage_memories(run_config(LLAMA_3_8B, {"tensor_model_parallel_size": 4}, launch, precision="bf16"))
    assert stage.weights + stage.gradients == 6 * stage.parameters
    assert_about(stage.optimizer, 12 * stage.parameters / 4, within=1e-6, why="bytes are whole on each rank")
    assert_about(stage.parameters, num_parameters(LLAMA_3_8B) / 4, within=1e-3, why="norms are on every rank")


def test_recomputing_whole_layers_keeps_little_more_than_their_inputs():
    options = {"seq_length": 8192, "micro_batch_size": 1, "precision": "bf16"}
    (plain,) = stage_memories(run_config(LLAMA_3_8B, **options))
    (full,) = stage_memories(run_config(LLAMA_3_8B, {"recompute_granularity": "full"}, **options))
    inputs = 32 * 8192 * 4096 * 2
    assert inputs < full.activations < inputs + plain.activations / 16
    assert full.weights == plain.weights


def test_an_early_pipeline_stage_holds_more_micro_batches():
    stages = stage_memories(
        run_config(LLAMA_3_8B, {"pipeline_model_parallel_size": 4}, {"gpus_per_node": 4}, global_batch_size=64)
    )
    assert_about(stages[0].activations, 4 * stages[3].activations, within=0.05, why="the last stage has a norm more")
    assert stages[0].loss == 0 and stages[3].loss > 0


def test_uneven_pipelines_hold_the_layers_that_the_settings_say():
    parallel = ParallelConfig(pipeline_model_parallel_size=4, num_layers_in_first_pipeline_stage=5,
                              num_layers_in_last_pipeline_stage=7)  # fmt: skip
    assert [len(layers) for layers in stage_layers(LLAMA_3_8B, parallel)] == [5, 10, 10, 7]
    both = dataclasses.replace(
        parallel, virtual_pipeline_model_parallel_size=2, num_layers_in_first_pipeline_stage=4,
        num_layers_in_last_pipeline_stage=8
    )  # fmt: skip
    assert [len(layers) for layers in stage_layers(LLAMA_3_8B, both)] == [4, 10, 10, 8]
    assert stage_layers(LLAMA_3_8B, both)[0] == [0, 1, 16, 17]
    interleaved = ParallelConfig(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=4)
    assert stage_layers(LLAMA_3_8B, interleaved)[0] == [0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27]


@pytest.mark.parametrize(
    ("checkpoint", "kept"),
    [
        ({"save_interval": 100}, 10),
        ({"save_interval": 300}, 4),
        ({"save_interval": 100, "keep_last": 2}, 3),
        ({"save_interval": 100, "keep_last": 1, "keep_every": 500}, 3),
    ],
)
def test_kept_checkpoints_are_counted_with_the_one_being_written(checkpoint, kept):
    assert num_checkpoints(CheckpointConfig(**checkpoint), 1000) == kept


def test_time_links_and_node_hours_follow_from_a_stated_throughput(tmp_path):
    launch = {"nodes": 16, "gpus_per_node": 8, "walltime": 36000, "scheduler": "pbs"}
    config = run_config(LLAMA_3_8B, {"tensor_model_parallel_size": 4}, launch, seq_length=8192, global_batch_size=1024,
                        train_iters=None, train_tokens=80 * 10**9)  # fmt: skip
    config = dataclasses.replace(config, paths=PathsConfig(runs_dir=str(tmp_path)))
    plan = plan_run(config, tokens_per_second=1e6, gpu_memory_bytes=80 * GIB)
    assert plan.num_links == 3
    assert_about(plan.node_hours, 16 * 80e9 / 1e6 / 3600, within=1e-3, why="whole iterations are planned, not tokens")
    text = plan_text(plan)
    assert "9,537 iterations" in text and "TP4 PP1 CP1 EP1 DP32" in text and "3 of 10h00m on 16 nodes" in text


def test_a_search_finds_layouts_that_fit_and_puts_the_plain_ones_first():
    launch = {"nodes": 2, "gpus_per_node": 8, "scheduler": "slurm"}
    options = {"seq_length": 8192, "global_batch_size": 128, "precision": "bf16"}
    config = run_config(LLAMA_3_8B, None, launch, **options)
    layouts = search_layouts(config, 80 * GIB)
    assert all(layout.peak_bytes <= 74 * GIB for layout in layouts)
    assert all(not any(parallel_problems(layout.config)) for layout in layouts)
    best = layouts[0].config.parallel
    assert best.pipeline_model_parallel_size == 1 and best.tensor_model_parallel_size <= 2
    tight = search_layouts(config, 24 * GIB)
    assert 0 < len(tight) < len(layouts)
    assert search_layouts(config, 8 * GIB) == []
    assert "parallel.tensor_model_parallel_size=" in search_text(config, 80 * GIB)
    tiles = run_config(
        LLAMA_3_8B, None, {"nodes": 2, "gpus_per_node": 12, "scheduler": "pbs"}, **{**options, "global_batch_size": 192}
    )
    sizes = {layout.config.parallel.tensor_model_parallel_size for layout in search_layouts(tiles, 80 * GIB)}
    assert sizes and all(12 % size == 0 for size in sizes), "no tensor-parallel group lies across two nodes"
    moe = search_layouts(run_config(MIXTRAL_8X7B, None, launch, **options), 80 * GIB)
    assert any(layout.config.parallel.expert_model_parallel_size == 8 for layout in moe)


def test_throughput_is_read_from_the_runs_own_metrics(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert measured_tokens_per_second(path) is None
    path.write_text('{"kind": "train", "tokens_per_second": 100}\n{"kind": "save"}\n' * 3 + '{"kind": "tra')
    assert measured_tokens_per_second(path) == 100


@pytest.mark.parametrize(
    ("nodes", "per_node", "tensor", "is_refused"),
    [(2, 12, 8, True), (2, 12, 4, False), (1, 12, 8, False), (2, 8, 8, False), (2, 2, 4, False), (4, 6, 4, True)],
)
def test_a_tensor_parallel_group_that_two_nodes_share_is_refused(nodes, per_node, tensor, is_refused):
    launch = {"nodes": nodes, "gpus_per_node": per_node, "scheduler": "pbs"}
    layout = {"tensor_model_parallel_size": tensor, "sequence_parallel": tensor > 1}
    config = run_config(LLAMA_3_8B, layout, launch, seq_length=4096, global_batch_size=1152)
    found = [problem for problem in parallel_problems(config) if "lie across two nodes" in problem.text]
    assert bool(found) == is_refused, list(parallel_problems(config))


def test_a_slow_link_and_a_slow_device_of_a_site_file_change_the_order_of_layouts():
    launch = {"nodes": 2, "gpus_per_node": 8, "scheduler": "slurm"}
    config = run_config(LLAMA_3_8B, None, launch, seq_length=8192, global_batch_size=128, precision="bf16")
    fast, slow = Hardware(), hardware_of(Site(gpu_tflops=100, gigabytes_inside_node=10, gigabytes_between_nodes=10))
    assert slow == Hardware(peak_flops=100e12, inside_node=10e9, between_nodes=10e9) and hardware_of(Site()) == fast

    def penalty(hardware: Hardware) -> float:
        """Return how much longer TP8 takes than TP1."""
        layouts = search_layouts(config, 400 * GIB, hardware)
        seconds = {}
        for layout in layouts:
            parallel = layout.config.parallel
            if parallel.pipeline_model_parallel_size == parallel.context_parallel_size == 1:
                size = parallel.tensor_model_parallel_size
                seconds[size] = min(layout.seconds, seconds.get(size, layout.seconds))
        return seconds[8] / seconds[1]

    assert penalty(Hardware(inside_node=10e9)) > 2 * penalty(fast)
