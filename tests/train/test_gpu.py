"""What only a GPU can do, or does by other code than a CPU. Each test says why it is skipped where it cannot run.

The functions that ranks run are the same for both devices: the tests' CPU variants hold the functions together, so that the
first run on a GPU tests the GPU's code and not the tests.
"""

import dataclasses
import hashlib
import importlib.util
import os
import re
import subprocess
import sys
import warnings
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from tests.distributed import REPOSITORY
from tests.gpu_ranks import run_on_gpus
from tests.tiers import in_full
from tests.tolerances import FP32_ROUNDING, STEP_ROUNDINGS, STEP_TOKENS, assert_about, assert_bf16_rounding
from tests.train.test_layouts import CP, EP, ETP, PP, TP, VPP
from tests.train.tiny import BATCH, EOD, SEQ, VOCAB, batches, run_steps, tiny_config


@cache
def num_gpus() -> int:
    """Return the GPUs that torch sees, asked in another process so that this one's forks stay free of CUDA."""
    command = [sys.executable, "-c", "import torch; print(torch.cuda.device_count())"]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def needs_gpus(count: int) -> None:
    """Skip the test that calls it where there are fewer GPUs."""
    if num_gpus() < count:
        pytest.skip(f"needs {count} CUDA device{'s' * (count > 1)}, {num_gpus()} here")


CUDA = pytest.param("cuda", marks=pytest.mark.gpu)


@pytest.fixture(params=[in_full("cpu"), CUDA])
def device(request):
    """Where the ranks of the test are."""
    if request.param == "cuda":
        needs_gpus(1)
    return request.param


@pytest.fixture
def run(ranks, device):
    """What runs a function on ranks of the device."""
    return ranks.run if device == "cpu" else run_on_gpus


WHY_GPU = "a GPU approximates exp, rsqrt and powers, and each step builds on the one before"


def assert_as_on_a_cpu(found, expected, precision):
    """Compare losses of two or three steps with those of one CPU rank in fp32."""
    if precision == "fp32":
        assert_about(found, expected, within=2e-4, why=WHY_GPU)
    else:  # the roundings of three steps
        assert_bf16_rounding(found, expected, roundings=3 * STEP_ROUNDINGS, averaged=STEP_TOKENS)


def losses_of(steps):
    return [loss for loss, _ in steps]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["dense", "qwen", "tied", "moe", "mla", "deepseek"])
def test_a_gpu_continues_a_cpus_checkpoint_and_a_cpu_the_gpus(ranks, run, device, trained, tmp_path, kind, precision):
    """Fused loss, RoPE and SwiGLU, NCCL, AdamW and norm kernels, fp32 master weights: all of a step on the GPU."""
    if device == "cpu" and (kind, precision) not in (("dense", "bf16"), ("moe", "fp32")):
        pytest.skip("test_layouts.py has it on CPU")
    checkpoint, expected = trained(kind)
    config = tiny_config(kind, precision=precision)
    (steps,) = run(run_steps, 1, config, 2, 4, checkpoint, str(tmp_path))
    assert_as_on_a_cpu(losses_of(steps), losses_of(expected[:2]), precision)
    if precision == "fp32":
        assert_about([norm for _, norm in steps], [norm for _, norm in expected[:2]], within=2e-3, why=WHY_GPU)
    (after,) = ranks.run(run_steps, 1, config, 4, 5, str(tmp_path / "iter_0000004"), None)
    assert_as_on_a_cpu(losses_of(after), losses_of(expected[2:]), precision)


def steps_by(config, is_by_bounds, *arguments):
    """Run steps whose documents end by bounds (varlen attention on a GPU) or by a mask; return them and what attention got."""
    from megatron_cpt.train.model import attention
    from megatron_cpt.train.samples import batches as building

    building.reason_for_mask = lambda _: None if is_by_bounds else "the test wants one"
    given, forward = set(), attention.SdpaCoreAttention.forward

    def seen(self, query, key, value, attention_mask, *more, **options):
        given.add(str(attention_mask.dtype))
        return forward(self, query, key, value, attention_mask, *more, **options)

    attention.SdpaCoreAttention.forward = seen
    return run_steps(config, *arguments), given


@pytest.mark.parametrize(
    ("kind", "model"),
    [("dense", {}), ("qwen", {"window_size": 16}), ("mla", {}), ("dense", {"kv_channels": 20}), ("tied", {})],
)
def test_varlen_attention_trains_as_a_block_mask(run, device, kind, model):
    if device == "cpu" and kind != "qwen":
        pytest.skip("test_attention.py has it on CPU")
    config = tiny_config(kind, precision="bf16", model=model)
    ((bounds, given),) = run(steps_by, 1, config, True, 0, 3, None, None)
    ((mask, given_mask),) = run(steps_by, 1, config, False, 0, 3, None, None)
    assert (given, given_mask) == ({"torch.int32"}, {"torch.bool"})
    # a norm is led by its few largest gradients: 16 of them
    assert_bf16_rounding(bounds, mask, roundings=3 * STEP_ROUNDINGS, averaged=16)
    assert_bf16_rounding(losses_of(bounds), losses_of(mask), roundings=3 * STEP_ROUNDINGS, averaged=STEP_TOKENS)


def rank_of_four(device, heads, window_size):
    """Return a context-parallel rank's context and gradients by the device's attention in bf16, and by a CPU's in fp32."""
    import torch

    from megatron_cpt.train.model.attention import attend_each, attend_varlen
    from megatron_cpt.train.model.attention_bounds import Visibility

    n, g, d, d_v = heads
    pieces = (torch.arange(160) // 37).expand(2, -1)
    positions = torch.cat([torch.arange(20, 40), torch.arange(120, 140)])
    seen = Visibility((2, 160), pieces, window_size, positions).with_bounds()
    count = seen.num_bounds
    generator = torch.Generator().manual_seed(0)
    shapes = (80, n, d), (320, g, d), (320, g, d_v)
    given = [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]
    results = []
    ours = device, torch.bfloat16, attend_varlen if device == "cuda" else attend_each
    for where, dtype, attend in (ours, ("cpu", torch.float32, attend_each)):
        query, key, value = (part.to(where, dtype, copy=True).requires_grad_() for part in given)
        bounds = seen.bounds.to(where)
        queries, keys, numbers = bounds.split([count, count, len(bounds) - 2 * count])
        chosen = (part.index_select(0, numbers) for part in (key, value))
        context = attend(query, *chosen, queries, keys, seen.longest, scale=0.3, window_size=window_size)
        context.float().square().sum().backward()
        results.append([part.detach().float().cpu().numpy() for part in (context, query.grad, key.grad, value.grad)])
    return results


@pytest.mark.parametrize("window_size", [None, 9])
@pytest.mark.parametrize("heads", [(4, 4, 64, 64), (8, 2, 128, 128), (4, 4, 192, 128), (4, 2, 20, 20)], ids=str)
def test_queries_that_see_more_keys_attend_as_on_a_cpu(run, device, heads, window_size):
    """The ends of a piece's queries and keys are aligned, and padded heads move nothing."""
    ((found, expected),) = run(rank_of_four, 1, device, heads, window_size)
    for ours, wanted in zip(found, expected, strict=True):
        assert_bf16_rounding(
            ours, wanted, roundings=64, of_largest=True
        )  # softmax and four products, rounded block by block


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("kind", "layout"),
    [("dense", {}), ("qwen", {}), ("moe", {}), ("mla", {}), ("dense", {"recompute_granularity": "full"})],
    ids=str,
)
def test_compiled_layers_train_as_a_cpus_plain_ones(trained, kind, layout, precision):
    """On CPU their graphs run in test_compile.py."""
    needs_gpus(1)
    checkpoint, expected = trained(kind)
    config = tiny_config(kind, precision=precision, **layout)
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, compile=True))
    (steps,) = run_on_gpus(run_steps, 1, config, 2, 5, checkpoint, None, timeout=600)
    assert_as_on_a_cpu(losses_of(steps), losses_of(expected), precision)


def changed_document(config, by_bounds):
    """Return the logits of two sequences that differ in their first 20 tokens, in bf16."""
    import torch

    from megatron_cpt.train.backend.parallel import finish_parallel, initialize_parallel
    from megatron_cpt.train.model.build import build_model_chunks
    from megatron_cpt.train.samples import batches as building

    building.reason_for_mask = lambda _: None if by_bounds else "the test wants one"
    initialize_parallel(config)
    (model,) = build_model_chunks(config)
    model.eval()
    ids = torch.randint(EOD + 1, VOCAB, (1, SEQ + 1), generator=torch.Generator().manual_seed(0)).repeat(2, 1)
    ids[:, 20] = EOD
    ids[1, :20] = (ids[0, :20] + 100) % 400 + EOD + 1
    batch = building.build_batch(ids, config, EOD)
    with torch.no_grad():
        result = model(batch.tokens, batch.position_ids, batch.attention_mask)[..., :VOCAB].float().cpu().numpy()
    finish_parallel()
    return result


@pytest.mark.parametrize("by_bounds", [True, False], ids=["bounds", "mask"])
@pytest.mark.parametrize(("kind", "model"), [("dense", {}), ("mla", {}), ("dense", {"window_size": 16})])
def test_no_document_sees_another_in_bf16(run, kind, model, by_bounds):
    (one, other) = run(changed_document, 1, tiny_config(kind, precision="bf16", model=model), by_bounds)[0]
    assert np.array_equal(one[21:], other[21:])
    assert np.abs(one[:21] - other[:21]).max() > 1e-2


def losses_with_layers(config, with_transformer_engine, *arguments):
    """Run steps with Transformer Engine's layers or with the local ones."""
    from megatron_cpt.train.model import build as model
    from megatron_cpt.train.model import layer_spec

    layer_spec.has_transformer_engine = model.has_transformer_engine = lambda: with_transformer_engine
    return run_steps(config, *arguments)


@pytest.mark.parametrize("isolates", [True, False], ids=["isolated", "whole"])
@pytest.mark.parametrize("kind", ["dense", "qwen", "moe", "mla"])
def test_transformer_engines_layers_and_grouped_gemm_train_as_the_local_ones(run, device, trained, kind, isolates):
    if device == "cuda" and importlib.util.find_spec("transformer_engine") is None:
        pytest.skip("needs Transformer Engine")
    if device == "cpu" and kind != "dense":
        pytest.skip("Transformer Engine needs a GPU; one CPU variant holds the function together")
    config = tiny_config(kind, precision="bf16")
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, reset_attention_mask=isolates))
    arguments = (2, 5, trained(kind)[0], None)
    (theirs,) = run(losses_with_layers, 1, config, device == "cuda", *arguments)
    (local,) = run(losses_with_layers, 1, config, False, *arguments)
    assert_bf16_rounding(
        losses_of(theirs), losses_of(local), roundings=6 * STEP_ROUNDINGS, averaged=STEP_TOKENS
    )  # three steps, both sides


def fused_pieces(device):
    """Return how far the compiled loss, RoPE and SwiGLU, and the fused AdamW are from plain torch in fp32."""
    import torch
    from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl
    from megatron.core.models.common.embeddings import rope_utils

    from megatron_cpt.train.backend import cpu
    from megatron_cpt.train.backend.kernels import FusedAdam
    from megatron_cpt.train.backend.parallel import finish_parallel, initialize_parallel
    from megatron_cpt.train.model.loss import vocab_parallel_loss

    plain_rope = rope_utils._apply_rotary_pos_emb_bshd
    initialize_parallel(tiny_config())
    assert (rope_utils._apply_rotary_pos_emb_bshd is plain_rope) == cpu.is_cpu()
    torch.manual_seed(0)
    found = {}

    logits, labels = torch.randn(40, 2, 640, device=device) * 3, torch.randint(600, (40, 2), device=device)
    ours, plain = (logits.clone().requires_grad_() for _ in range(2))
    group = torch.distributed.group.WORLD
    loss = vocab_parallel_loss(ours, labels, vocab_size=600, z_loss_coeff=1e-3, group=group)
    real = plain[..., :600]
    wanted = torch.nn.functional.cross_entropy(real.permute(0, 2, 1), labels, reduction="none")
    wanted = wanted + 1e-3 * real.logsumexp(-1).square()
    for each in (loss, wanted):
        each.sum().backward()
    found["loss"] = float((loss - wanted).abs().max()), float((ours.grad - plain.grad).abs().max())

    angles, x = torch.randn(32, 1, 1, 16, device=device), torch.randn(32, 2, 4, 16, device=device)
    one, other = (x.clone().requires_grad_() for _ in range(2))
    turned = rope_utils._apply_rotary_pos_emb_bshd(one, angles, rotary_interleaved=False)
    wanted = plain_rope(other, angles, rotary_interleaved=False)
    for each in (turned, wanted):
        each.square().cumsum(0).sum().backward()
    found["rope"] = float((turned - wanted).abs().max()), float((one.grad - other.grad).abs().max())

    x = torch.randn(32, 2, 48, device=device)
    one, other = (x.clone().requires_grad_() for _ in range(2))
    gate, up = other.chunk(2, -1)
    pair = bias_swiglu_impl(one, None), torch.nn.functional.silu(gate) * up
    for each in pair:
        each.square().sum().backward()
    found["swiglu"] = float((pair[0] - pair[1]).abs().max()), float((one.grad - other.grad).abs().max())

    settings = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    one, other = (torch.nn.Parameter(x.clone()) for _ in range(2))
    optimizers = FusedAdam([one], **settings), torch.optim.AdamW([other], **settings)
    for _ in range(5):
        one.grad = torch.randn_like(one)
        other.grad = one.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    found["adamw"] = (float((one - other).detach().abs().max()), 0.0)
    finish_parallel()
    return found


@pytest.mark.parametrize("device", ["cpu", CUDA], indirect=True)  # the CPU variant that `make test` runs
def test_fused_and_compiled_pieces_compute_what_plain_ones_do(run, device):
    (found,) = run(fused_pieces, 1, device)
    assert set(found) == {"loss", "rope", "swiglu", "adamw"}
    for name, differences in found.items():
        # values and gradients up to 30 after sums of 64 terms, and a GPU's exp and rsqrt: 100 roundings of fp32
        assert max(differences) < 100 * FP32_ROUNDING * 32, name


def measured(config):
    """Return the device's name, its peak in FLOP/s, its memory, the memory a step reports, and the batch's device."""
    import torch

    from megatron_cpt.train.backend.parallel import finish_parallel, initialize_parallel
    from megatron_cpt.train.model.build import build_training_model
    from megatron_cpt.train.stage.step import train_step
    from megatron_cpt.train.watch.metrics import peak_flops, peak_memory_bytes

    initialize_parallel(config)
    model, optimizer = build_training_model(config)
    given = batches(config, 0)
    result = train_step(model, optimizer, given, config, 1e-3)
    on_gpu = torch.cuda.is_available()
    name = torch.cuda.get_device_name() if on_gpu else "CPU"
    total = torch.cuda.get_device_properties(0).total_memory if on_gpu else None
    values = name, peak_flops(), total, peak_memory_bytes(), given[0].tokens.device.type, result.is_updated
    finish_parallel()
    return values


def test_memory_and_the_peak_of_the_device_are_known(run, device):
    ((name, peak, total, used, where, is_updated),) = run(measured, 1, tiny_config(precision="bf16"))
    assert is_updated and where == device and used > 1e6
    if device == "cpu":
        assert peak is None
        return
    assert used < total
    if re.search("A100|H100|H200|B200", name):
        assert peak > 3e14
        return
    assert peak is None, f"{name}: say in this test what its peak is"


def synchronizations(config, micro_batch_size):
    """Return how often a step waits for the GPU, after a first step that compiles and allocates."""
    import torch

    from megatron_cpt.train.backend.parallel import finish_parallel, initialize_parallel
    from megatron_cpt.train.model.build import build_training_model
    from megatron_cpt.train.stage.step import train_step

    training = dataclasses.replace(config.training, micro_batch_size=micro_batch_size)
    config = dataclasses.replace(config, training=training)
    initialize_parallel(config)
    model, optimizer = build_training_model(config)
    train_step(model, optimizer, batches(config, 0), config, 1e-3)
    given = batches(config, 1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("warn")
        train_step(model, optimizer, given, config, 1e-3)
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("default")
    finish_parallel()
    return [str(warning.message) for warning in caught if "synchronizing CUDA" in str(warning.message)], len(given)


def test_a_step_waits_for_the_gpu_as_often_with_many_micro_batches(run, device):
    config = tiny_config(precision="bf16")
    ((few, one),) = run(synchronizations, 1, config, BATCH)
    ((many, eight),) = run(synchronizations, 1, config, 1)
    assert (one, eight) == (1, BATCH)
    assert len(few) == len(many) <= (4 if device == "cuda" else 0), many


def weights_after(config):
    """Return a hash of losses and weights after three steps in deterministic mode."""
    import torch

    from megatron_cpt.train.backend.parallel import finish_parallel, initialize_parallel
    from megatron_cpt.train.model.build import build_training_model
    from megatron_cpt.train.stage.step import train_step

    config = dataclasses.replace(config, training=dataclasses.replace(config.training, deterministic=True))
    initialize_parallel(config)
    torch.use_deterministic_algorithms(True)
    model, optimizer = build_training_model(config)
    losses = [train_step(model, optimizer, batches(config, step), config, 1e-3).loss for step in range(3)]
    digest = hashlib.blake2b(repr(losses).encode())
    for name, parameter in sorted(model[0].named_parameters()):
        digest.update(name.encode() + parameter.detach().float().cpu().numpy().tobytes())
    finish_parallel()
    return digest.hexdigest(), os.environ.get("CUBLAS_WORKSPACE_CONFIG")


@pytest.mark.parametrize("kind", ["dense", "moe", "mla"])
def test_deterministic_mode_gives_the_same_bits_twice_in_bf16(run, device, kind):
    if device == "cpu" and kind != "dense":
        pytest.skip("test_deterministic.py has it on CPU")
    config = tiny_config(kind, precision="bf16", model={"hidden_dropout": 0.1})
    first, second = (run(weights_after, 1, config)[0] for _ in range(2))
    assert first == second and first[1] == ":4096:8"


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("kind", "world_size", "layout"),
    [
        ("dense", 2, {TP: 2}),
        ("dense", 2, {PP: 2}),
        ("dense", 2, {PP: 2, VPP: 2}),
        ("dense", 2, {CP: 2}),
        ("dense", 2, {}),
        ("dense", 2, {"overlap_grad_reduce": True, "overlap_param_gather": True}),
        ("moe", 2, {EP: 2}),
        ("moe", 2, {TP: 2, EP: 2, ETP: 1}),
        ("mla", 2, {TP: 2}),
        ("mla", 2, {CP: 2}),
        ("dense", 4, {TP: 2, PP: 2}),
        ("deepseek", 4, {PP: 2, EP: 2}),
    ],
    ids=str,
)
def test_a_layout_on_gpus_continues_as_one_cpu_rank_does(trained, kind, world_size, layout, precision):
    """NCCL, batched point-to-point messages; on CPU this is test_layouts.py."""
    needs_gpus(world_size)
    checkpoint, expected = trained(kind)
    config = tiny_config(kind, precision=precision, **layout)
    for steps in run_on_gpus(run_steps, world_size, config, 2, 5, checkpoint, None):
        assert_as_on_a_cpu(losses_of(steps), losses_of(expected), precision)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compile"])
def test_the_benchmark_measures_every_variant(device, compiled, tmp_path):
    """`benchmarks/train.py --gpu --tiny [--compile]`: the whole program, isolated or not, and what it is compared with."""
    if device == "cpu" and compiled:
        pytest.skip("layers are compiled on GPUs only")
    variants = ["ours", "plain"] if device == "cpu" else ["ours", "isolated", "plain", "unfused"]
    words = ["--tiny", "--runs", "1", "--steps", "4", "--scratch", str(tmp_path), "--variants", *variants]
    words += ["--gpu"] * (device == "cuda") + ["--compile"] * compiled
    answer = subprocess.run(
        [sys.executable, str(Path(REPOSITORY) / "benchmarks" / "train.py"), *words],
        capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert answer.returncode == 0, answer.stderr[-3000:]
    rows = [line.split(" | ") for line in answer.stdout.splitlines() if line.split(" | ")[0] in variants]
    assert [row[0] for row in rows] == variants
    losses = np.array([[float(value) for value in row[-2:]] for row in rows])
    assert np.isfinite(losses).all() and (losses[:, 0] < 7).all()
    shares = re.findall(r"(\w+): ([\d.]+)% of a step outside", answer.stdout)
    assert [name for name, _ in shares] == [name for name in variants if name in ("ours", "isolated")]
