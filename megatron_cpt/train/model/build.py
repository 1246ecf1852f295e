"""The model of a run: megatron-core's GPTModel from our settings, per pipeline stage, and its DDP and optimizer.

GPTModel is marked deprecated in 0.19 in favour of HybridModel, which reads its checkpoints; its construction is
kept in this one file.
"""

import importlib.util
import logging
import math
import os
import warnings
from typing import Any

import torch
import torch._dynamo
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from torch import Tensor

from megatron_cpt.config.megatron.arguments import megatron_arguments
from megatron_cpt.config.settings.derived import kv_channels, rope_original_max_position_embeddings
from megatron_cpt.config.settings.schema import ModelConfig, RunConfig
from megatron_cpt.errors import ConfigError
from megatron_cpt.train.backend import cpu
from megatron_cpt.train.model.attention_bounds import reason_for_mask
from megatron_cpt.train.model.layer_spec import (
    build_layer_spec,
    has_transformer_engine,
    uses_transformer_engines_attention,
)
from megatron_cpt.train.model.loss import vocab_parallel_loss
from megatron_cpt.train.model.neftune import add_embedding_noise

logger = logging.getLogger(__name__)


class CptGPTModel(GPTModel):
    """GPTModel whose loss excludes the padded rows of the vocabulary and optionally adds a z-loss.

    megatron-core does not mask padded logits: the loss then depends on the padding (6.67 instead of 6.49 on a tiny
    model with 125 padded rows), and so on the layout.
    """

    vocab_size_unpadded: int
    z_loss_coeff: float = 0.0
    sample_ids: Tensor | None = None

    def forward(self, *arguments: Any, sample_ids: Tensor | None = None, **options: Any) -> Tensor:
        """Return GPTModel's output; `sample_ids` `[b]` are the samples' numbers in the stage's order."""
        self.sample_ids = sample_ids
        output: Tensor = super().forward(*arguments, **options)
        return output

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Return the loss per token `[b, s]` from labels `[b, s]` and logits `[s, b, v/tp]`."""
        if logits.is_cuda:
            loss = vocab_parallel_loss(
                logits,
                labels.transpose(0, 1),
                vocab_size=self.vocab_size_unpadded,
                z_loss_coeff=self.z_loss_coeff,
                group=parallel_state.get_tensor_model_parallel_group(),
            )
            return loss.transpose(0, 1).contiguous()
        first_row = parallel_state.get_tensor_model_parallel_rank() * logits.shape[-1]
        num_real = min(max(self.vocab_size_unpadded - first_row, 0), logits.shape[-1])
        if num_real < logits.shape[-1]:
            logits[..., num_real:] = torch.finfo(logits.dtype).min
        z_loss = self.z_loss_coeff * log_normalizer(logits).square() if self.z_loss_coeff else None
        loss = super().compute_language_model_loss(labels, logits)
        return loss if z_loss is None else loss + z_loss.transpose(0, 1)


def log_normalizer(logits: Tensor) -> Tensor:
    """Return log(sum(exp(logits))) over the whole vocabulary `[s, b]` from this rank's part `[s, b, v/tp]`."""
    group = parallel_state.get_tensor_model_parallel_group()
    logits = logits.float()
    largest = logits.detach().amax(-1)
    torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX, group=group)
    total = (logits - largest.unsqueeze(-1)).exp().sum(-1)
    total = tensor_parallel.reduce_from_tensor_model_parallel_region(total, group=group)
    return total.log() + largest


def transformer_config(config: RunConfig) -> TransformerConfig:
    """Return megatron's configuration of the model and its layout."""
    is_mla = config.model.multi_latent_attention
    target: type[TransformerConfig] = MLATransformerConfig if is_mla else TransformerConfig
    is_bf16 = config.training.precision == "bf16"
    dtype = torch.bfloat16 if is_bf16 else torch.float32
    on_gpu = not cpu.is_cpu()
    arguments: dict[str, Any] = megatron_arguments(config, target.__name__) | {
        "activation_func": torch.nn.functional.silu,
        "bf16": is_bf16,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "calculate_per_token_loss": True,  # the loss is a mean over the tokens of the global batch, under any layout
        "use_cpu_initialization": not on_gpu,
        "gradient_accumulation_fusion": False,  # needs Apex or Transformer Engine
        "persist_layer_norm": False,
        "bias_activation_fusion": on_gpu,
        "bias_dropout_fusion": on_gpu,
        "masked_softmax_fusion": False,  # attention is SDPA's or Transformer Engine's
        "apply_rope_fusion": False,
        "moe_permute_fusion": False,
        "moe_grouped_gemm": config.model.num_moe_experts is not None and has_transformer_engine(),
        # gloo matches two opposite sends between one pair of ranks in posting order: batched, VPP is silently wrong
        "batch_p2p_comm": on_gpu,
        "attention_softmax_in_fp32": True,
    }
    built = target(**arguments)
    if config.model.rope_scaling_type == "yarn" and not is_mla:
        built.yarn_rotary_scaling_factor = config.model.rope_scaling_factor  # attention scales cosines and sines by it
    return built


def build_model_chunks(config: RunConfig, megatron_config: TransformerConfig | None = None) -> list[torch.nn.Module]:
    """Return this rank's model chunks, one per virtual pipeline stage, without DDP, on the training device."""
    if config.training.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # asked for by cuBLAS, before its first product
    megatron_config = megatron_config or transformer_config(config)
    num_chunks = config.parallel.virtual_pipeline_model_parallel_size or 1
    chunks = []
    for chunk in range(num_chunks):
        vp_stage = chunk if num_chunks > 1 else None
        model = CptGPTModel(
            config=megatron_config,
            transformer_layer_spec=build_layer_spec(
                megatron_config,
                vp_stage,
                use_transformer_engine=has_transformer_engine(),
                isolates_documents=config.data.reset_attention_mask,
            ),
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
            vp_stage=vp_stage,
            **megatron_arguments(config, "GPTModel"),
        )
        model.vocab_size_unpadded = config.model.vocab_size
        model.z_loss_coeff = config.training.z_loss_coeff
        if config.training.neftune_alpha and model.pre_process:
            add_embedding_noise(model, config)
        set_rotary_frequencies(model, config.model)
        set_latent_epsilon(model, config.model)
        if not cpu.is_cpu():
            model.cuda(torch.cuda.current_device())
        if config.training.compile:
            compile_layers(model)
        chunks.append(Float16Module(megatron_config, model) if megatron_config.bf16 else model)
    return chunks


def compile_layers(model: GPTModel, backend: str = "inductor") -> None:
    """Compile the forward and backward pass of each layer, one graph for all that are alike."""
    if cpu.is_cpu() and backend == "inductor":
        logger.warning("training.compile is true: layers are compiled on GPUs only, these run on a CPU as they are")
        return
    # megatron-core warns in every row-parallel product, which would cut each layer's graph in pieces
    torch._dynamo.config.ignore_logging_functions.add(warnings.warn)
    for layer in model.decoder.layers:
        layer.forward = torch.compile(layer.forward, backend=backend)


def build_training_model(config: RunConfig) -> tuple[list[DistributedDataParallel], MegatronOptimizer]:
    """Return the model chunks wrapped in megatron's DDP, and their optimizer."""
    if config.optimizer.name == "muon" and importlib.util.find_spec("emerging_optimizers") is None:
        raise ConfigError(
            "optimizer.name is muon, and the package emerging-optimizers is not installed. megatron-core's Muon is made of "
            "it. Install the extra muon (pip install -e '.[muon]' in the checkout, or pip install emerging-optimizers), or "
            "use optimizer.name=adam."
        )
    megatron_config = transformer_config(config)
    _say_what_attends(config)
    chunks = build_model_chunks(config, megatron_config)
    ddp_config = DistributedDataParallelConfig(
        **megatron_arguments(config, "DistributedDataParallelConfig")
        | {"grad_reduce_in_fp32": True, "average_in_collective": False, "check_for_nan_in_grad": False}
    )
    model = [
        DistributedDataParallel(
            config=megatron_config, ddp_config=ddp_config, module=chunk, disable_bucketing=index > 0
        )
        for index, chunk in enumerate(chunks)
    ]
    for chunk in model:
        chunk.broadcast_params()
    optimizer_config = MegatronOptimizerConfig(
        **megatron_arguments(config, "OptimizerConfig")
        | {
            "lr": 1.0,  # neutral: the schedule sets each group's rate at each step (see schedule.py)
            "min_lr": 0.0,
            "bf16": megatron_config.bf16,
            "params_dtype": megatron_config.params_dtype,
        }
    )
    optimizer = get_megatron_optimizer(optimizer_config, model, use_gloo_process_groups=False)
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        part.init_state_fn(part.optimizer, part.config)  # so that a run can be saved before its first update
        for group in part.optimizer.param_groups:
            # Megatron-LM's scheduler reads the groups' own bounds, and its optimizer finds groups by them
            group["max_lr"], group["min_lr"] = config.optimizer.lr, config.optimizer.min_lr
    megatron_config.grad_scale_func = optimizer.scale_loss
    megatron_config.finalize_model_grads_func = finalize_model_grads
    if config.parallel.overlap_grad_reduce:
        syncs = [chunk.no_sync for chunk in model]
        megatron_config.no_sync_func = syncs if len(syncs) > 1 else syncs[0]
    if config.parallel.overlap_param_gather:
        starts = [chunk.start_param_sync for chunk in model]
        megatron_config.param_sync_func = starts if len(starts) > 1 else starts[0]
    return model, optimizer


def _say_what_attends(config: RunConfig) -> None:
    if not config.data.reset_attention_mask and config.model.window_size is None:
        return
    if uses_transformer_engines_attention(config.data):
        logger.info("windows end in Transformer Engine's attention")
    elif reason := reason_for_mask(config):
        logger.info("documents or windows end by a mask of sequence x sequence: %s", reason)
    else:
        logger.info("documents or windows end by their bounds, without a mask")


def unwrap(chunk: torch.nn.Module) -> CptGPTModel:
    """Return the GPTModel inside DDP and precision wrappers."""
    while not isinstance(chunk, CptGPTModel):
        chunk = chunk.module
    return chunk


def set_rotary_frequencies(chunk: GPTModel, model: ModelConfig) -> None:
    """Give a model chunk the frequencies that its settings state; latent attention has an embedding of its own."""
    if hasattr(chunk, "rotary_pos_emb") and not (model.multi_latent_attention and model.rope_scaling_type == "yarn"):
        embedding = chunk.rotary_pos_emb
        embedding.inv_freq = rotary_frequencies(model).to(embedding.inv_freq.device)


def set_latent_epsilon(chunk: GPTModel, model: ModelConfig) -> None:
    """Give the norms on the latent vectors their own epsilon; megatron-core has one for all norms.

    They are modules of their own, or part of the projection that follows (Transformer Engine).
    """
    if model.latent_layernorm_epsilon is None:
        return
    names = ("q_layernorm", "kv_layernorm", "linear_q_up_proj", "linear_kv_up_proj")
    for layer in chunk.decoder.layers:
        found: list[Any] = [getattr(layer.self_attention, name, None) for name in names]
        norms = [norm for norm in found if hasattr(norm, "eps")]
        if len(norms) != (2 if model.q_lora_rank else 1):
            raise RuntimeError(f"{len(norms)} norms of latent vectors have an epsilon to set, {names} were looked at")
        for norm in norms:
            norm.eps = model.latent_layernorm_epsilon


def rotary_frequencies(model: ModelConfig) -> Tensor:
    """Return the rotary embedding's inverse frequencies `[kv_channels / 2]` in float32, scaled as the model wants.

    megatron's own Llama-3 scaling fixes the low and high factors and the original context; here they are settings.

    Source: RoPE, arXiv:2104.09864; YaRN, arXiv:2309.00071, section 3.2; Llama-3 scaling, transformers 5
    `modeling_rope_utils.py`, `_compute_llama3_parameters`.
    """
    channels = kv_channels(model)
    frequencies = 1.0 / model.rotary_base ** (torch.arange(0, channels, 2, dtype=torch.int64).float() / channels)
    if model.rope_scaling_type == "linear":
        return frequencies / model.rope_scaling_factor
    if model.rope_scaling_type == "none":
        return frequencies
    original = rope_original_max_position_embeddings(model)
    if model.rope_scaling_type == "yarn":
        # a pair of channels turns `rotations` times within the original context at this (fractional) index
        first, last = (
            channels * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(model.rotary_base))
            for rotations in (model.rope_beta_fast, model.rope_beta_slow)
        )
        first, last = max(math.floor(first), 0), min(math.ceil(last), channels - 1)
        ramp = ((torch.arange(channels // 2).float() - first) / max(last - first, 0.001)).clamp(0, 1)
        return frequencies * (1 - ramp) + frequencies / model.rope_scaling_factor * ramp
    low, high = model.rope_low_freq_factor, model.rope_high_freq_factor
    wavelengths = 2 * math.pi / frequencies
    smooth = (original / wavelengths - low) / (high - low)
    blended = (1 - smooth) * frequencies / model.rope_scaling_factor + smooth * frequencies
    scaled = torch.where(wavelengths > original / low, frequencies / model.rope_scaling_factor, frequencies)
    is_between = (wavelengths <= original / low) & (wavelengths >= original / high)
    return torch.where(is_between, blended, scaled)
