"""Relations between a model, its batch and the ranks it is spread over."""

from collections.abc import Iterator

from megatron_cpt.config.checks.problem import Problem, nearest_multiples, not_multiple
from megatron_cpt.config.settings import derived
from megatron_cpt.config.settings.batch_sizes import shared_sizes
from megatron_cpt.config.settings.schema import OptimizerConfig, ParallelConfig, RunConfig

TP = "parallel.tensor_model_parallel_size"
PP = "parallel.pipeline_model_parallel_size"
VPP = "parallel.virtual_pipeline_model_parallel_size"
CP = "parallel.context_parallel_size"
EP = "parallel.expert_model_parallel_size"
ETP = "parallel.expert_tensor_parallel_size"
SP = "parallel.sequence_parallel"


def parallel_problems(config: RunConfig) -> Iterator[Problem]:
    """Yield what makes a layout or a batch impossible."""
    yield from _tensor_problems(config)
    yield from _sequence_problems(config)
    yield from _pipeline_problems(config)
    yield from _world_problems(config)
    yield from _expert_problems(config)
    yield from _option_problems(config.parallel)
    for name in ("hidden_dropout", "attention_dropout"):
        if config.training.compile and getattr(config.model, name):
            yield Problem(
                ("training.compile", f"model.{name}"),
                f"training.compile is true with model.{name} {getattr(config.model, name):g}. Compiled layers draw their random "
                "numbers otherwise, and recomputed ones might drop others. Set one of them to its default.",
            )
    if config.optimizer.name == "muon" and config.parallel.use_distributed_optimizer:
        yield Problem(
            ("optimizer.name", "parallel.use_distributed_optimizer"),
            "optimizer.name is muon with parallel.use_distributed_optimizer true. Muon needs whole matrices on a rank. "
            "Set parallel.use_distributed_optimizer: false.",
        )
    if config.optimizer.name != "muon" and config.optimizer.muon_momentum != OptimizerConfig.muon_momentum:
        yield Problem(
            ("optimizer.muon_momentum", "optimizer.name"),
            f"optimizer.muon_momentum is {config.optimizer.muon_momentum:g} and has no effect with optimizer.name "
            f"{config.optimizer.name}. Remove it.",
        )


def _tensor_problems(config: RunConfig) -> Iterator[Problem]:
    model, size = config.model, config.parallel.tensor_model_parallel_size
    divisor, advice = ("tensor_model_parallel_size", size), "Choose a smaller tensor-parallel size."
    yield from not_multiple(("model.num_attention_heads", model.num_attention_heads), divisor, (TP,), advice)
    if not model.multi_latent_attention:
        groups = derived.num_query_groups(model)
        if not (groups == model.num_attention_heads and groups % size):  # said already
            yield from not_multiple(("model.num_query_groups", groups), divisor, (TP,), advice)
    yield from not_multiple(("model.ffn_hidden_size", model.ffn_hidden_size), divisor, (TP,), advice)
    if model.moe_shared_expert_intermediate_size:
        yield from not_multiple(
            ("model.moe_shared_expert_intermediate_size", model.moe_shared_expert_intermediate_size),
            divisor,
            (TP,),
            advice,
        )
    padded = derived.padded_vocab_size(model)
    if padded % size:
        yield Problem(
            ("model.make_vocab_size_divisible_by", TP),
            f"the padded vocabulary has {padded} rows, not a multiple of tensor_model_parallel_size ({size}). "
            f"Set model.make_vocab_size_divisible_by to a multiple of {size}.",
        )


def _sequence_problems(config: RunConfig) -> Iterator[Problem]:
    parallel, length = config.parallel, config.training.seq_length
    tp, cp = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    if parallel.sequence_parallel and tp == 1:
        yield Problem((SP, TP), f"{SP} is true with tensor_model_parallel_size 1. It needs TP > 1. Set it to false.")
    if config.model.multi_latent_attention and tp > 1 and not parallel.sequence_parallel:
        yield Problem(
            (SP, TP),
            f"{SP} is false with multi_latent_attention and tensor_model_parallel_size {tp}. Without it the gradients "
            f"of the shared down-projections are wrong. Set {SP}: true.",
        )
    if config.model.num_moe_experts is not None and tp > 1 and not parallel.sequence_parallel:
        yield Problem(
            (SP, TP),
            f"{SP} is false with experts and tensor_model_parallel_size {tp}. Megatron-Core trains experts under TP "
            f"only with it. Set {SP}: true.",
        )
    step = (2 * cp if cp > 1 else 1) * (tp if parallel.sequence_parallel else 1)
    if length % step:
        parts = [f"2 x context_parallel_size ({2 * cp})"] if cp > 1 else []
        parts += [f"tensor_model_parallel_size ({tp})"] if parallel.sequence_parallel and tp > 1 else []
        yield Problem(
            ("training.seq_length", CP, TP, SP),
            f"training.seq_length is {length}, not a multiple of {' x '.join(parts)}"
            f"{f' = {step}' if len(parts) > 1 else ''}. Use {nearest_multiples(length, step)}.",
        )


def _pipeline_problems(config: RunConfig) -> Iterator[Problem]:
    parallel, layers = config.parallel, config.model.num_layers
    pp, vpp = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size or 1
    first, last = parallel.num_layers_in_first_pipeline_stage, parallel.num_layers_in_last_pipeline_stage
    keys = ("parallel.num_layers_in_first_pipeline_stage", "parallel.num_layers_in_last_pipeline_stage", PP, VPP)
    if vpp > 1 and pp == 1:
        yield Problem((VPP, PP), f"{VPP} is {vpp} with pipeline_model_parallel_size 1. It needs PP > 1. Remove it.")
    if vpp > 1 and pp > 1 and derived.num_microbatches(config) % pp:
        yield Problem(
            (VPP, PP, "training.global_batch_size", "training.micro_batch_size"),
            f"{VPP} is {vpp} with {derived.num_microbatches(config)} micro-batches, not a multiple of "
            f"pipeline_model_parallel_size ({pp}). Change global_batch_size or micro_batch_size.",
        )
    if first is None and last is None:
        yield from not_multiple(
            ("model.num_layers", layers),
            ("pipeline_model_parallel_size x virtual size", pp * vpp)
            if vpp > 1
            else ("pipeline_model_parallel_size", pp),
            (PP, VPP),
            "Choose another size, or an uneven split with parallel.num_layers_in_first_pipeline_stage.",
        )
        return
    uneven = [count for count in (first, last) if count is not None]
    middle_stages, middle_layers = pp - len(uneven), layers - sum(uneven)
    split = " + ".join(str(count) for count in uneven)
    if middle_stages < 0 or (middle_stages == 0 and middle_layers != 0):
        yield Problem(
            keys,
            f"the uneven split gives {split} of {layers} layers to {len(uneven)} of {pp} pipeline stages. "
            "All layers must find a stage. Change the split.",
        )
    elif middle_stages and (middle_layers <= 0 or middle_layers % middle_stages):
        yield Problem(
            keys,
            f"the uneven split leaves {middle_layers} of {layers} layers ({split} in the uneven stages) for "
            f"{middle_stages} stages. A positive multiple of {middle_stages} is needed. Change the split.",
        )
    elif any(count % vpp for count in [*uneven, *([middle_layers // middle_stages] if middle_stages else [])]):
        yield Problem(
            keys,
            f"the uneven split ({split}) has a stage whose layers are no multiple of the virtual size ({vpp}). "
            "Change the split.",
        )


def _world_problems(config: RunConfig) -> Iterator[Problem]:
    world, copies = derived.world_size(config), derived.model_parallel_size(config.parallel)
    keys = ("launch.nodes", "launch.gpus_per_node", TP, PP, CP)
    if world % copies:
        yield Problem(
            keys,
            f"launch.nodes x launch.gpus_per_node is {config.launch.nodes} x {config.launch.gpus_per_node} = {world}, "
            f"not a multiple of TP x PP x CP ({config.parallel.tensor_model_parallel_size} x "
            f"{config.parallel.pipeline_model_parallel_size} x {config.parallel.context_parallel_size} = {copies}). "
            f"Use {nearest_multiples(world, copies)} ranks, or another layout.",
        )
        return
    per_node, tp = config.launch.gpus_per_node, config.parallel.tensor_model_parallel_size
    if config.launch.nodes > 1 and per_node % tp and tp % per_node:
        divisors = ", ".join(str(size) for size in range(1, per_node + 1) if per_node % size == 0)
        yield Problem(
            (TP, "launch.gpus_per_node"),
            f"{TP} is {tp} on nodes of {per_node} ranks: some tensor-parallel groups lie across two nodes, whose link is many "
            f"times slower than that inside a node. A divisor of {per_node} is needed. Use one of {divisors}.",
        )
    size, micro, dp = config.training.global_batch_size, config.training.micro_batch_size, world // copies
    if size % (micro * dp):
        yield Problem(
            ("training.global_batch_size", "training.micro_batch_size", *keys),
            f"training.global_batch_size is {size}, not a multiple of micro_batch_size x data-parallel size "
            f"({micro} x {dp} = {micro * dp}). Use {nearest_multiples(size, micro * dp)}.",
        )
    is_interleaved = (config.parallel.virtual_pipeline_model_parallel_size or 1) > 1
    stages = config.parallel.pipeline_model_parallel_size if is_interleaved else 1
    step, shown = micro * dp * stages, f"{micro} x {dp}{f' x {stages}' if is_interleaved else ''}"
    for name, value in shared_sizes(config.training.rampup_batch_size):
        if value % step:
            yield Problem(
                ("training.rampup_batch_size", "training.micro_batch_size", *keys),
                f"training.rampup_batch_size {name} {value}, not a multiple of micro_batch_size x data-parallel size"
                f"{' x pipeline stages (interleaved)' if is_interleaved else ''} ({shown} = {step}). "
                f"Use {nearest_multiples(value, step)}.",
            )


def _expert_problems(config: RunConfig) -> Iterator[Problem]:
    parallel, experts = config.parallel, config.model.num_moe_experts
    ep, tp = parallel.expert_model_parallel_size, parallel.tensor_model_parallel_size
    etp = parallel.expert_tensor_parallel_size or tp
    if experts is None:
        if ep > 1:
            yield Problem((EP,), f"{EP} is {ep} without num_moe_experts. A dense model has no experts. Set it to 1.")
        if parallel.expert_tensor_parallel_size is not None:
            yield Problem((ETP,), f"{ETP} is {etp} without num_moe_experts. A dense model has no experts. Remove it.")
        return
    yield from not_multiple(
        ("model.num_moe_experts", experts),
        ("expert_model_parallel_size", ep),
        (EP,),
        "Each rank holds the same number of experts.",
    )
    stage_ranks = derived.world_size(config) // parallel.pipeline_model_parallel_size
    if stage_ranks % (ep * etp):
        yield Problem(
            (EP, ETP, TP, PP, "launch.nodes", "launch.gpus_per_node"),
            f"{EP} x expert tensor size is {ep} x {etp} = {ep * etp}, no divisor of the {stage_ranks} ranks of a "
            "pipeline stage (TP x CP x DP). Use a smaller one, or more ranks.",
        )
    width = config.model.moe_ffn_hidden_size
    if width is not None:
        yield from not_multiple(
            ("model.moe_ffn_hidden_size", width),
            ("expert_tensor_parallel_size", etp),
            (ETP, TP),
            f"Set {ETP}: 1.",
        )
    if ep == 1 and etp != tp:
        yield Problem(
            (ETP, TP, EP),
            f"{ETP} is {etp} and tensor_model_parallel_size is {tp}, with expert_model_parallel_size 1. Some "
            f"Megatron-Core versions lose expert gradients here. Remove {ETP}, or use expert parallelism.",
        )


def _option_problems(parallel: ParallelConfig) -> Iterator[Problem]:
    if parallel.overlap_param_gather:
        for name in ("overlap_grad_reduce", "use_distributed_optimizer"):
            if not getattr(parallel, name):
                yield Problem(
                    ("parallel.overlap_param_gather", f"parallel.{name}"),
                    f"parallel.overlap_param_gather is true without {name}. It needs it. Set parallel.{name}: true.",
                )
    if parallel.recompute_granularity != "full":
        for name, default in (("recompute_method", "uniform"), ("recompute_num_layers", 1)):
            value = getattr(parallel, name)
            if value != default:
                yield Problem(
                    (f"parallel.{name}", "parallel.recompute_granularity"),
                    f"parallel.{name} is {value} and has no effect with recompute_granularity "
                    f"{parallel.recompute_granularity}. Remove it, or set recompute_granularity: full.",
                )
