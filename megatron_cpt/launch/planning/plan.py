"""Requirements of a run, computed on a login node: tokens, iterations, memory per rank, disk, time, links, node hours.

Nothing is allocated and no model is built; the numbers follow from the configuration, the free space of the run
directory's file system, and a throughput that is stated or read from the run's own metrics.
"""

import json
import os
import shutil
import statistics
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_cpt.config.settings.batch_sizes import ramp_text
from megatron_cpt.config.settings.derived import (
    data_parallel_size,
    num_microbatches,
    train_iters,
    train_samples,
    train_tokens,
    world_size,
)
from megatron_cpt.config.settings.schema import CheckpointConfig, RunConfig, TrainingConfig
from megatron_cpt.launch.planning.memory import StageMemory, checkpoint_bytes, stage_memories
from megatron_cpt.launch.planning.model_size import num_active_parameters, num_parameters
from megatron_cpt.launch.planning.quota import Quota, tightest_quota
from megatron_cpt.log import format_bytes, format_count, format_seconds
from megatron_cpt.run.directory import run_dir

GIB = 1 << 30
GPU_RESERVE_BYTES = 6 * GIB
"""GPU memory beyond the formula: CUDA context, NCCL's buffers, fragmentation."""
WEIGHTS_BYTES = {"bf16": 2, "fp32": 4}
"""Checkpoint bytes per parameter of weights alone."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The needs of one stage."""

    config: RunConfig
    stages: list[StageMemory]
    gpu_memory_bytes: int | None
    checkpoint_bytes: int
    num_checkpoints: int
    free_bytes: int
    quota: Quota | None
    tokens_per_second: float | None
    throughput_source: str

    @property
    def peak_bytes(self) -> int:
        """Memory of the fullest rank."""
        return max(stage.total for stage in self.stages)

    @property
    def fits_memory(self) -> bool | None:
        """Whether the fullest rank fits its GPU with the reserve; None when the GPU's memory is not known."""
        if self.gpu_memory_bytes is None:
            return None
        return self.peak_bytes + GPU_RESERVE_BYTES <= self.gpu_memory_bytes

    @property
    def room_bytes(self) -> int:
        """Bytes that can be written: free space, or the rest of a quota if that is less."""
        return self.free_bytes if self.quota is None else min(self.free_bytes, self.quota.left_bytes)

    @property
    def fits_disk(self) -> bool:
        """Whether the checkpoints that are kept fit."""
        return self.num_checkpoints * self.checkpoint_bytes <= self.room_bytes

    @property
    def seconds(self) -> float | None:
        """Training time at the throughput."""
        return train_tokens(self.config.training) / self.tokens_per_second if self.tokens_per_second else None

    @property
    def num_links(self) -> int | None:
        """Jobs of one walltime each."""
        if self.seconds is None:
            return None
        launch = self.config.launch
        return -(-int(self.seconds) // max(launch.walltime - launch.exit_before_walltime, 1)) or 1

    @property
    def node_hours(self) -> float | None:
        """Node hours of the whole stage."""
        return None if self.seconds is None else self.seconds / 3600 * self.config.launch.nodes


def plan_run(
    config: RunConfig,
    *,
    tokens_per_second: float | None = None,
    gpu_memory_bytes: int | None = None,
    is_fused: bool = True,
) -> Plan:
    """Return the plan of a run; without a stated throughput the one measured in its metrics is used."""
    source = "stated"
    if tokens_per_second is None:
        tokens_per_second = measured_tokens_per_second(run_dir(config).metrics_path)
        source = "measured in this run" if tokens_per_second else "unknown"
    size = checkpoint_bytes(config)
    return Plan(
        config=config,
        stages=stage_memories(config, is_fused=is_fused),
        gpu_memory_bytes=gpu_memory_bytes,
        checkpoint_bytes=size,
        num_checkpoints=num_checkpoints(config.checkpoint, train_iters(config.training), size),
        free_bytes=free_bytes(Path(config.paths.runs_dir)),
        quota=tightest_quota(Path(config.paths.runs_dir)),
        tokens_per_second=tokens_per_second,
        throughput_source=source,
    )


def num_checkpoints(checkpoint: CheckpointConfig, iterations: int, checkpoint_bytes: int = 0) -> int:
    """Return how many checkpoints of `checkpoint_bytes` lie on disk at most, the one being written included."""
    saved = [*range(checkpoint.save_interval, iterations, checkpoint.save_interval), iterations]
    if checkpoint.keep_bytes is not None and checkpoint_bytes:
        allowed = max(checkpoint.keep_bytes // checkpoint_bytes, 1) + 1
        return min(allowed, num_checkpoints(replace(checkpoint, keep_bytes=None), iterations))
    if checkpoint.keep_last is None:
        return len(saved)
    newest = set(saved[-checkpoint.keep_last :]) if checkpoint.keep_last else set()
    every = {iteration for iteration in saved if checkpoint.keep_every and iteration % checkpoint.keep_every == 0}
    return min(len(newest | every) + 1, len(saved))


def free_bytes(path: Path) -> int:
    """Return the free space of the file system that `path`, or its nearest existing parent, lies on."""
    while not path.exists():
        path = path.absolute().parent
    return shutil.disk_usage(path).free


def measured_tokens_per_second(metrics_path: Path, last: int = 50) -> float | None:
    """Return the median throughput of the last logged steps, None where there are none."""
    try:
        with metrics_path.open("rb") as file:
            file.seek(max(os.path.getsize(metrics_path) - (1 << 17), 0))
            lines = file.read().decode("utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return None
    rates = []
    for line in lines:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:  # the first line may be cut, the last one half-written
            continue
        if record.get("kind") == "train" and record.get("tokens_per_second"):
            rates.append(record["tokens_per_second"])
    return statistics.median(rates[-last:]) if rates else None


def plan_text(plan: Plan, estimate: str = "") -> str:
    """Return the plan as a page of text; `estimate` says how a length was found that is not counted yet."""
    config = plan.config
    model, parallel, training, launch = config.model, config.parallel, config.training, config.launch
    tokens = train_tokens(training)
    num_active = num_active_parameters(model)
    active = f", {format_count(num_active)} active" if model.num_moe_experts else ""
    layout = (
        f"TP{parallel.tensor_model_parallel_size} PP{parallel.pipeline_model_parallel_size} "
        f"CP{parallel.context_parallel_size} EP{parallel.expert_model_parallel_size} DP{data_parallel_size(config)}"
    )
    rows = [
        ("run", str(run_dir(config).path)),
        (
            "model",
            f"{format_count(num_parameters(model))} parameters{active}, {model.num_layers} layers, "
            f"hidden {model.hidden_size}",
        ),
        ("layout", f"{layout} on {launch.nodes} x {launch.gpus_per_node} = {world_size(config)} ranks"),
        (
            "batch",
            f"{training.global_batch_size} sequences = {training.micro_batch_size} x {num_microbatches(config)} "
            f"micro-batches x DP {data_parallel_size(config)}; "
            f"{format_count(training.global_batch_size * training.seq_length)} tokens{_ramp(training)}",
        ),
        (
            "length",
            f"{tokens:,} tokens = {train_iters(training):,} iterations = {train_samples(training):,} sequences of "
            f"{training.seq_length:,}",
        ),
        *([("", estimate)] if estimate else []),
        ("compute", f"{6 * num_active * tokens:.3g} FLOP (6 x parameters x tokens, attention not counted)"),
    ]
    lines = [f"{name:<12}{text}" for name, text in rows]
    lines += ["", *_memory_lines(plan), "", *_disk_and_time_lines(plan)]
    return "\n".join(lines) + "\n"


def _ramp(training: TrainingConfig) -> str:
    return "" if training.rampup_batch_size is None else f"; {ramp_text(training.rampup_batch_size)}"


def _memory_lines(plan: Plan) -> list[str]:
    columns = ("weights", "gradients", "optimizer", "activations", "loss", "total")
    lines = ["memory per rank in GiB", "stage  parameters  " + "  ".join(f"{name:>11}" for name in columns)]
    for stage, memory in enumerate(plan.stages):
        sizes = "  ".join(f"{getattr(memory, name) / GIB:11.3f}" for name in columns)
        lines.append(f"{stage:>5}  {format_count(memory.parameters):>10}  {sizes}")
    if plan.gpu_memory_bytes is not None:
        verdict = "fits" if plan.fits_memory else "DOES NOT FIT"
        lines.append(
            f"{verdict}: {plan.peak_bytes / GIB:.1f} GiB and a reserve of {GPU_RESERVE_BYTES / GIB:.0f} GiB in "
            f"{plan.gpu_memory_bytes / GIB:.0f} GiB"
        )
    return lines


def _disk_and_time_lines(plan: Plan) -> list[str]:
    needed = plan.num_checkpoints * plan.checkpoint_bytes
    verdict = "" if plan.fits_disk else "  NOT ENOUGH: lower checkpoint.keep_last"
    quota = plan.quota
    allowed = f", quota of {quota.owner} leaves {format_bytes(quota.left_bytes)}" if quota else ""
    weights = num_parameters(plan.config.model) * WEIGHTS_BYTES[plan.config.training.precision]
    lines = [
        f"checkpoint  {format_bytes(plan.checkpoint_bytes)} each ({format_bytes(weights)} of weights), at most "
        f"{plan.num_checkpoints} kept: {format_bytes(needed)} of {format_bytes(plan.free_bytes)} free{allowed}{verdict}"
    ]
    if plan.seconds is None:
        return [*lines, "time        unknown: state a throughput with --tokens-per-second"]
    launch = plan.config.launch
    return [
        *lines,
        f"time        {format_seconds(plan.seconds)} at {plan.tokens_per_second:,.0f} tokens/s "
        f"({plan.throughput_source})",
        f"jobs        {plan.num_links} of {format_seconds(launch.walltime)} on {launch.nodes} nodes, "
        f"{plan.node_hours:,.1f} node hours",
    ]
