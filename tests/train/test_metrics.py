"""What a run reports: FLOPs by formula, lines that align, records that survive a kill."""

import dataclasses
import json
from pathlib import Path

import pytest
import yaml

from megatron_cpt.config.settings.derived import padded_vocab_size
from megatron_cpt.config.settings.schema import LoggingConfig, ModelConfig, RunConfig
from megatron_cpt.launch.planning.model_size import num_active_parameters
from megatron_cpt.run.directory import RunDir
from megatron_cpt.train.watch.metrics import MetricsWriter, flops_per_token, peak_flops, train_line
from tests.tolerances import assert_about, assert_fp64_rounding

LLAMA = ModelConfig(
    num_layers=32, hidden_size=4096, ffn_hidden_size=14336, num_attention_heads=32, num_query_groups=8,
    vocab_size=128256, max_position_embeddings=8192,
)  # fmt: skip


def config(**logging: object) -> RunConfig:
    return RunConfig(task="t", params="p", size="s", model=LLAMA, logging=LoggingConfig(**logging))  # type: ignore[arg-type]


def test_dense_flops_are_six_per_matrix_parameter_plus_causal_attention():
    layer = 4096 * 128 * (2 * 32 + 2 * 8) + 3 * 4096 * 14336
    matrices = 32 * layer + 4096 * 128256
    attention = 32 * 2 * 32 * 128 * 8192 / 2  # QK^T and AV, the causal half
    assert_fp64_rounding(flops_per_token(LLAMA, 8192), 6 * (matrices + attention))
    assert_about(matrices, 7.5e9, within=0.01, why="published as 8B, of which 0.5B are the input embedding")


def test_a_mixture_counts_the_experts_a_token_visits():
    moe = dataclasses.replace(LLAMA, num_moe_experts=8, moe_ffn_hidden_size=14336, moe_router_topk=2)
    extra = flops_per_token(moe, 8192) - flops_per_token(LLAMA, 8192)
    assert_fp64_rounding(extra, 6 * 32 * (3 * 4096 * 14336 + 4096 * 8))


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[2] / "params").glob("*.yaml")), ids=lambda path: path.stem
)
def test_every_architecture_costs_six_per_active_matrix_parameter_besides_attention(path):
    """Norms, biases and the input embedding are no products; the count comes from another module than the formula."""
    model = ModelConfig(**yaml.safe_load(path.read_text())["model"])
    embedding = padded_vocab_size(model) * model.hidden_size
    inputs = embedding if model.untie_embeddings_and_output_weights else 0
    expected = 6 * (num_active_parameters(model) - inputs)
    assert_about(
        flops_per_token(model, 0), expected, within=2e-3, why="norms and biases are parameters without a product"
    )


def test_latent_attention_costs_its_full_heads():
    mla = dataclasses.replace(
        LLAMA, multi_latent_attention=True, kv_lora_rank=512, qk_head_dim=128, qk_pos_emb_head_dim=64, v_head_dim=128
    )
    per_token = flops_per_token(mla, 8192) - flops_per_token(mla, 0)
    # QK^T over 128 + 64 channels and AV over 128, 2 operations each, half of them causal, three passes
    assert_fp64_rounding(per_token, 3 * 2 * 32 * 32 * (192 + 128) * 8192 / 2)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-64GB", 312e12),
        ("Some other device", None),
    ],
)
def test_the_peak_of_a_device_follows_from_its_name(monkeypatch, name, peak):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: name)
    assert peak_flops() == peak


def test_a_window_bounds_the_attention():
    assert flops_per_token(dataclasses.replace(LLAMA, window_size=1024), 8192) < flops_per_token(LLAMA, 8192)


def test_lines_of_a_run_align():
    record = {
        "iteration": 5, "consumed_tokens": 20480, "loss": 8.81, "lr": 5e-4, "grad_norm": 1.7,
        "tokens_per_second": 1590.0, "tokens_per_second_per_gpu": 795.0, "tflops_per_gpu": 0.02, "mfu": None,
        "data_seconds": 0.004, "memory_bytes": 1 << 30, "eta_seconds": 60.0, "walltime_left_seconds": None,
    }  # fmt: skip
    short, long = (train_line(record | {"iteration": n, "loss": n * 1.0}, 1470) for n in (5, 15))
    assert [i for i, c in enumerate(short) if c == "|"] == [i for i, c in enumerate(long) if c == "|"]
    assert "MFU 41.0%" in train_line(record | {"mfu": 0.41}, 1470)
    slow, fast = (train_line(record | {"mfu": mfu}, 1470) for mfu in (0.041, 0.41))
    assert [i for i, c in enumerate(slow) if c == "|"] == [i for i, c in enumerate(fast) if c == "|"]
    assert short.endswith("ETA 1m00s") and "1.0 GiB" in short
    assert train_line(record | {"walltime_left_seconds": 4000.0}, 1470).endswith("ETA 1m00s, walltime 1h06m")


def test_a_record_cut_short_by_a_kill_is_dropped(tmp_path):
    run = RunDir(tmp_path)
    run.metrics_path.write_text('{"kind": "start"}\n{"kind": "tra')
    writer = MetricsWriter(run, is_writer=True, config=config(tensorboard=False))
    writer.write("end", reason="finished")
    writer.close()
    kinds = [json.loads(line)["kind"] for line in run.metrics_path.read_text().splitlines()]
    assert kinds == ["start", "end"]


def test_other_ranks_write_nothing(tmp_path):
    writer = MetricsWriter(RunDir(tmp_path), is_writer=False, config=config(wandb_project="p"))
    writer.write("end", reason="finished")
    writer.close()
    assert not list(tmp_path.iterdir())
