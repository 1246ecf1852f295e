"""Layouts that fit: TP, PP, CP, EP, micro-batch and recomputation for given nodes, the likely fastest first.

Every candidate passes the same checks as a run's settings and the memory formula. The order comes from a simple model of
an iteration, good for ranking and not for predicting: compute at half of a device's peak, tensor and expert parallel traffic
at the speed inside a node where the group lies inside one, context, data and pipeline parallel traffic at the speed between nodes, the pipeline's bubble
(P - 1) / M (arXiv:2104.04473, section 2.2), and a third more compute for full recomputation. Among layouts within 5 percent the one
with the least model parallelism comes first.
"""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_cpt.config.checks.parallel import parallel_problems
from megatron_cpt.config.settings.derived import (
    data_parallel_size,
    kv_channels,
    model_parallel_size,
    num_microbatches,
    num_query_groups,
    padded_vocab_size,
    world_size,
)
from megatron_cpt.config.settings.schema import LaunchConfig, RunConfig
from megatron_cpt.launch.planning.memory import stage_memories
from megatron_cpt.launch.planning.model_size import num_active_parameters
from megatron_cpt.launch.planning.plan import GIB, GPU_RESERVE_BYTES
from megatron_cpt.launch.scheduler.site import Site

MICRO_BATCHES = (1, 2, 4, 8)


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """Compute and network rates of a rank's device; the defaults are an H100's (NVIDIA H100 SXM data sheet, dense bf16;
    NVLink 4 and one 400 Gb/s link, at about 70 and 80 percent)."""

    peak_flops: float = 989e12
    inside_node: float = 300e9
    """Bytes per second with other ranks of the node."""
    between_nodes: float = 40e9

    @property
    def flops(self) -> float:
        """Half of the peak, which training reaches in practice."""
        return 0.5 * self.peak_flops


def hardware_of(site: Site) -> Hardware:
    """Return the devices and links of a site file."""
    given = {
        "peak_flops": (site.gpu_tflops, 1e12),
        "inside_node": (site.gigabytes_inside_node, 1e9),
        "between_nodes": (site.gigabytes_between_nodes, 1e9),
    }
    return Hardware(**{name: value * unit for name, (value, unit) in given.items() if value is not None})


@dataclass(frozen=True)
class Layout:
    """A configuration that fits, with its cost."""

    config: RunConfig
    peak_bytes: int
    seconds: float
    """Modelled time of one iteration; only its order among layouts means something."""

    def overrides(self) -> list[str]:
        """Return the settings that make a run use this layout."""
        parallel = self.config.parallel
        names = (
            "tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size",
            "expert_model_parallel_size", "sequence_parallel", "recompute_granularity",
        )  # fmt: skip
        settings = [f"parallel.{name}={str(getattr(parallel, name)).lower()}" for name in names]
        return [*settings, f"training.micro_batch_size={self.config.training.micro_batch_size}"]


def search_layouts(config: RunConfig, gpu_memory_bytes: int, hardware: Hardware = Hardware()) -> list[Layout]:
    """Return every layout of the run's nodes that fits into `gpu_memory_bytes` with the reserve, best first."""
    layouts = []
    for candidate in _candidates(config):
        if any(parallel_problems(candidate)):
            continue
        peak = max(stage.total for stage in stage_memories(candidate))
        if peak + GPU_RESERVE_BYTES <= gpu_memory_bytes:
            layouts.append(Layout(candidate, peak, iteration_seconds(candidate, hardware)))
    fastest = min((layout.seconds for layout in layouts), default=1.0)

    def order(layout: Layout) -> tuple[int, int, float]:
        steps = round(
            math.log(layout.seconds / fastest) / math.log(1.05)
        )  # closer than the model can tell: the simpler
        return steps, model_parallel_size(layout.config.parallel), layout.seconds

    return sorted(layouts, key=order)


def iteration_seconds(config: RunConfig, hardware: Hardware = Hardware()) -> float:
    """Return the modelled time of one iteration."""
    model, parallel, training = config.model, config.parallel, config.training
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    cp, ep = parallel.context_parallel_size, parallel.expert_model_parallel_size
    micro_batches = num_microbatches(config)
    tokens = training.seq_length * training.micro_batch_size / cp
    element = 2 if training.precision == "bf16" else 4
    embedding = padded_vocab_size(model) * model.hidden_size
    compute = 6 * (num_active_parameters(model) - embedding) / (tp * pp) * tokens / hardware.flops
    compute *= 4 / 3 if parallel.recompute_granularity == "full" else 1
    layers = model.num_layers / pp
    boundary = tokens * model.hidden_size * element
    # a group that does not fit into a node, or that two nodes share, goes at the speed between nodes
    tensor_speed = hardware.inside_node if _is_inside(tp, config.launch) else hardware.between_nodes
    inside = layers * 8 * boundary * (tp - 1) / tp / tensor_speed
    if model.num_moe_experts:
        speed = hardware.inside_node if _is_inside(ep * tp, config.launch) else hardware.between_nodes
        inside += layers * 4 * boundary * model.moe_router_topk * (ep - 1) / ep / speed
    keys = 2 * num_query_groups(model) * kv_channels(model) / tp * training.seq_length * training.micro_batch_size
    between = layers * 3 * keys * element * (cp - 1) / cp / hardware.between_nodes
    between += (4 * boundary / tp / hardware.between_nodes) if pp > 1 else 0
    small = 1 + 1024 / tokens  # launching kernels costs as much as about a thousand tokens
    bubble = (pp - 1) / (micro_batches * (parallel.virtual_pipeline_model_parallel_size or 1))
    gradients = (
        stage_memories(config)[0].gradients * 1.5 / hardware.between_nodes if data_parallel_size(config) > 1 else 0
    )
    return micro_batches * (compute * small + inside + between) * (1 + bubble) + gradients


def _is_inside(group: int, launch: LaunchConfig) -> bool:
    """Return whether every group of so many consecutive ranks lies inside one node."""
    return launch.nodes == 1 or launch.gpus_per_node % group == 0


def search_text(config: RunConfig, gpu_memory_bytes: int, limit: int = 8, hardware: Hardware = Hardware()) -> str:
    """Return the best layouts as a table, and the first one's settings."""
    layouts = search_layouts(config, gpu_memory_bytes, hardware)
    where = f"{config.launch.nodes} x {config.launch.gpus_per_node} GPUs of {gpu_memory_bytes / GIB:.0f} GiB"
    if not layouts:
        return (
            f"nothing fits {where}: more nodes, a longer pipeline than the model's layers allow, or a smaller batch\n"
        )
    lines = [f"{len(layouts)} layouts fit {where}; the likely fastest:"]
    lines.append("  TP  PP  CP  EP   DP  micro-batch  recompute  GiB per GPU  time")
    for layout in layouts[:limit]:
        parallel = layout.config.parallel
        lines.append(
            f"{parallel.tensor_model_parallel_size:4}{parallel.pipeline_model_parallel_size:4}"
            f"{parallel.context_parallel_size:4}{parallel.expert_model_parallel_size:4}"
            f"{data_parallel_size(layout.config):5}{layout.config.training.micro_batch_size:13}"
            f"  {parallel.recompute_granularity:>9}{layout.peak_bytes / GIB:13.1f}"
            f"{layout.seconds / layouts[0].seconds:6.2f}"
        )
    return "\n".join([*lines, "", " ".join(layouts[0].overrides())]) + "\n"


def _candidates(config: RunConfig) -> Iterator[RunConfig]:
    world, model = world_size(config), config.model
    experts = model.num_moe_experts or 1
    per_node = config.launch.gpus_per_node
    sizes = [size for size in range(1, min(per_node, model.num_attention_heads) + 1) if per_node % size == 0]
    for tp in sizes:
        for pp in (size for size in range(1, model.num_layers + 1) if model.num_layers % size == 0):
            for cp in _powers(world if config.training.seq_length > 8192 else 1):
                if world % (tp * pp * cp):
                    continue
                for ep in _powers(experts):
                    if experts % ep or world % (pp * ep):
                        continue
                    for micro_batch in MICRO_BATCHES:
                        for recompute in ("none", "full"):
                            yield _with_layout(config, tp, pp, cp, ep, micro_batch, recompute)


def _with_layout(config: RunConfig, tp: int, pp: int, cp: int, ep: int, micro_batch: int, recompute: str) -> RunConfig:
    parallel = dataclasses.replace(
        config.parallel,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=None,
        num_layers_in_first_pipeline_stage=None,
        num_layers_in_last_pipeline_stage=None,
        context_parallel_size=cp,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=1 if ep > 1 else None,
        sequence_parallel=tp > 1,
        recompute_granularity=recompute,  # type: ignore[arg-type]
    )
    training = dataclasses.replace(config.training, micro_batch_size=micro_batch)
    return dataclasses.replace(config, parallel=parallel, training=training)


def _powers(limit: int) -> list[int]:
    return [1 << exponent for exponent in range(limit.bit_length()) if 1 << exponent <= limit]
