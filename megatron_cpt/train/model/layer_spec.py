"""Transformer layer specs: Transformer Engine's where it is importable, else megatron's local one on SDPA.

Both name their checkpoint tensors alike (`sharded_state_dict_keys_map`), so a checkpoint saved under one loads under
the other. The local spec differs from megatron's in three places: RMSNorm that works under sequence parallelism, core
attention on SDPA, and MLA's down-projections duplicated over tensor-parallel ranks, as Transformer Engine has them
(megatron's column-parallel ones lose part of the gradient of the rotary key at TP > 1).
"""

import copy
import importlib.util
from typing import Any

import torch
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.transformer import multi_latent_attention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megatron_cpt.config.settings.schema import DataConfig
from megatron_cpt.train.model.attention import SdpaCoreAttention


def has_transformer_engine() -> bool:
    """Return whether Transformer Engine can be used: installed, and a GPU is present."""
    return torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None


def uses_transformer_engines_attention(data: DataConfig) -> bool:
    """Return whether Transformer Engine attends itself; isolated documents it would not see."""
    return has_transformer_engine() and not data.reset_attention_mask


def build_layer_spec(
    config: TransformerConfig,
    vp_stage: int | None,
    *,
    use_transformer_engine: bool = False,
    isolates_documents: bool = False,
) -> TransformerBlockSubmodules | ModuleSpec:
    """Return the spec of the layers that this pipeline stage (and virtual stage) builds.

    With isolated documents, Transformer Engine's layers use attention on SDPA, because its own ignores masks.
    """
    if use_transformer_engine:
        block = gpt_layer_specs.get_gpt_decoder_block_spec(config, use_transformer_engine=True, vp_stage=vp_stage)
        if config.multi_latent_attention:
            block = _with_named_norms(block)
        return _with_sdpa(block) if isolates_documents else block
    offset = get_transformer_layer_offset(config, vp_stage=vp_stage)
    layers = range(offset, offset + get_num_layers_to_build(config, vp_stage=vp_stage))
    frequency = config.moe_layer_freq
    return TransformerBlockSubmodules(
        layer_specs=[
            _local_layer_spec(config, is_moe=config.num_moe_experts is not None and bool(_at(frequency, layer)))
            for layer in layers
        ],
        layer_norm=LocalRMSNorm,
    )


class LocalRMSNorm(torch.nn.RMSNorm):
    """RMSNorm whose weight is marked so that its gradient is summed over tensor-parallel ranks under sequence
    parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **ignored: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        if torch.cuda.is_available():
            self.to(torch.cuda.current_device())
        self.weight.sequence_parallel = config.sequence_parallel


class DuplicatedLinear(torch.nn.Module):
    """`y = x W^T` with the same `[out, in]` weight on every tensor-parallel rank.

    Under sequence parallelism each rank sees its part of the sequence, so the weight's gradient is summed.
    """

    def __init__(
        self, input_size: int, output_size: int, *, config: TransformerConfig, init_method: Any, **ignored: Any
    ) -> None:
        super().__init__()
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.empty(output_size, input_size, dtype=config.params_dtype, device=device))
        if config.perform_initialization:
            init_method(self.weight)
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, inputs: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Return the projection `[s, b, out]` and no bias."""
        return torch.nn.functional.linear(inputs, self.weight), None


class NamedNormsMLASelfAttention(multi_latent_attention.MLASelfAttention):
    """Latent attention with the norms that the spec names, under the local spec and under Transformer Engine's.

    megatron-core 0.19 puts a fused norm on queries that are projected directly, one weight more per layer and another
    function; models without `q_lora_rank` (DeepSeek-V2-Lite) have no norm there.
    """

    def _resolve_qk_norm_config(self, submodules: Any) -> dict[str, Any]:
        names = ("linear_q_proj", "linear_q_up_proj", "linear_kv_up_proj", "q_layernorm", "kv_layernorm")
        return {name: getattr(submodules, name) for name in names}


class LocalMLASelfAttention(NamedNormsMLASelfAttention):
    """Latent attention whose down-projections are duplicated over tensor-parallel ranks.

    megatron-core's attribute check accepts a duplicated projection only under the name `TELinear`, so the name refers
    to our class only while the module is built: Transformer Engine's models of the same process need it.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        before = multi_latent_attention.TELinear
        multi_latent_attention.TELinear = DuplicatedLinear
        try:
            super().__init__(*arguments, **options)
        finally:
            multi_latent_attention.TELinear = before


def _local_layer_spec(config: TransformerConfig, *, is_moe: bool) -> ModuleSpec:
    is_mla = config.multi_latent_attention
    # MLA names its norms itself: q_layernorm and kv_layernorm exist whenever qk_layernorm is on
    spec = copy.deepcopy(
        gpt_layer_specs.get_gpt_layer_local_spec(
            num_experts=config.num_moe_experts if is_moe else None,
            moe_grouped_gemm=False,
            qk_layernorm=config.qk_layernorm,
            multi_latent_attention=is_mla,
            normalization="RMSNorm",
        )
    )
    layer, attention = spec.submodules, spec.submodules.self_attention.submodules
    layer.input_layernorm = layer.pre_mlp_layernorm = LocalRMSNorm
    attention.core_attention = SdpaCoreAttention
    keys: dict[str, str] = {}
    if is_mla:
        layer.self_attention.module = LocalMLASelfAttention
        attention.linear_q_down_proj = attention.linear_kv_down_proj = DuplicatedLinear
        attention.kv_layernorm = LocalRMSNorm
        attention.q_layernorm = LocalRMSNorm if config.q_lora_rank else IdentityOp
        keys["self_attention.q_layernorm."] = "self_attention.linear_q_up_proj.layer_norm_"
        keys["self_attention.kv_layernorm."] = "self_attention.linear_kv_up_proj.layer_norm_"
    else:
        keys["input_layernorm."] = "self_attention.linear_qkv.layer_norm_"
        if config.qk_layernorm:
            attention.q_layernorm = attention.k_layernorm = LocalRMSNorm
    if not is_moe:
        keys["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"
    layer.sharded_state_dict_keys_map = keys
    return spec


def _with_named_norms(block: TransformerBlockSubmodules) -> TransformerBlockSubmodules:
    block = copy.deepcopy(block)
    for layer in block.layer_specs:
        layer.submodules.self_attention.module = NamedNormsMLASelfAttention
    return block


def _with_sdpa(block: TransformerBlockSubmodules) -> TransformerBlockSubmodules:
    block = copy.deepcopy(block)
    for layer in block.layer_specs:
        layer.submodules.self_attention.submodules.core_attention = SdpaCoreAttention
    return block


def _at(frequency: int | list[int], layer: int) -> int:
    return frequency[layer] if isinstance(frequency, list) else int(layer % frequency == 0)
